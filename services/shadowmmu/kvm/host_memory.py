"""Which host frame backs each page of user space's memory, and whether it is there and writable.

Frames are at first present, writable, and number page + 0x100000, where `page` is the host virtual page number: the
guest frame number in the slots that a machine begins with. Only deviations are kept. In memory backed by huge pages
these are kept per host page, by its first page (`key`). The operations that take frames away or move them, which tell
KVM through the MMU notifiers, are in `host`; here is what they and KVM's look-ups read and write.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.errors import NoSuchFrameError
from shadowmmu.kvm.memslots import Backing, KvmMemorySlot, MemorySlot
from shadowmmu.kvm.user_memory import FrameCopy, UserMemory
from shadowmmu.protocol.events import FrameBacked

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["BAD_PFN", "FIRST_NEW_PFN", "FIRST_PFN", "HostMemory"]

FIRST_PFN: Final = 0x100000
"""Host frame of host virtual page 0."""
FIRST_NEW_PFN: Final = 0x400000
"""First host frame handed out later (copy on write, swapped in elsewhere)."""
BAD_PFN: Final = -1
"""No frame: the look-up failed."""


class HostMemory:
    """The host's side of the guest's memory.

    `absent`, `readonly` and `swapped` hold keys (first page of a host page): not present; not writable; comes back in
    another frame. `in_change`: an operation at work has changed the page and not told KVM yet. `cleared`: not present,
    and whoever looks for it waits, until another frame is there. `old_frames` are pages as the host frames have them
    that they were copied from, by frame, as long as KVM does not know of the copy.
    `dirty_frames` are the host frames that KVM has said to be dirty since they were written to swap (PageDirty), and
    `dirty_blocks` the first ones of large pages; `UserMemory.written` has what was stored through the host's tables.
    `swap_space` has the contents of pages as they were last written to swap.
    `new_pfn` maps the key of a moved page to its first host frame. `split_blocks` are the first pages of transparent
    huge pages that were split.
    """

    __slots__ = (
        "_bases",
        "_kvm",
        "_last",
        "_memories",
        "_next_pfn",
        "_owner",
        "absent",
        "cleared",
        "dirty_blocks",
        "dirty_frames",
        "in_change",
        "new_pfn",
        "old_frames",
        "readonly",
        "split_blocks",
        "swap_space",
        "swapped",
    )

    def __init__(self, kvm: Kvm, memories: Iterable[UserMemory]) -> None:
        self._kvm = kvm
        self.absent: set[int] = set()
        self.readonly: set[int] = set()
        self.swapped: set[int] = set()
        self.in_change: set[int] = set()
        self.cleared: set[int] = set()
        self.old_frames: dict[int, FrameCopy] = {}
        self.new_pfn: dict[int, int] = {}
        self.split_blocks: set[int] = set()
        self.dirty_frames: set[int] = set()
        self.dirty_blocks: set[int] = set()
        self.swap_space: dict[int, bytes] = {}
        self._next_pfn = FIRST_NEW_PFN
        self._owner: dict[int, int] = {}  # pages by host frame, where not the first frame of a page
        self._memories = sorted(memories, key=lambda m: m.base)  # those that are unmapped too
        self._bases = [memory.base for memory in self._memories]
        self._last = self._memories[0]

    @property
    def memories(self) -> list[UserMemory]:
        """All of user space's memory that ever was behind a slot, by host virtual page."""
        return self._memories

    def map_memory(self, slot: MemorySlot) -> UserMemory:
        """New memory for a slot, in frames that were never used, aligned as the guest frames are."""
        pages = max(512, kvm_pages_per_hpage(slot.backing.level))
        first = max(self._next_pfn, self._memories[-1].end + FIRST_PFN)
        pfn = first + (slot.base_gfn - first) % pages
        self._next_pfn = pfn + slot.npages
        memory = UserMemory(pfn - FIRST_PFN, slot.npages, slot.base_gfn)
        self._memories.append(memory)
        self._bases.append(memory.base)
        return memory

    def forget(self, memory: UserMemory, keys: Iterable[int]) -> None:
        """User space has unmapped its memory, which has these host pages."""
        memory.unmap()
        for key in keys:
            for pages in (self.absent, self.readonly, self.swapped, self.split_blocks):
                pages.discard(key)
            self.swap_space.pop(key, None)
            self.dirty_frames.discard(self.new_pfn.pop(key, key + FIRST_PFN))

    def locate(self, pfn: int) -> tuple[UserMemory, int] | None:
        """The memory, and its page, that a host frame holds, or held last; None if it never held one."""
        if self.old_frames and (copy := self.old_frames.get(pfn)) is not None:
            return copy, copy.base
        page = self._owner.get(pfn)
        if page is None:
            page = pfn - FIRST_PFN
        memory = self._last
        if not memory.base <= page < memory.end:
            index = bisect_right(self._bases, page) - 1
            if index < 0 or page >= self._memories[index].end:
                return None
            self._last = memory = self._memories[index]
        return memory, page

    def gfn_of(self, pfn: int) -> int | None:
        """The guest frame that a host frame holds, or held last; None if it never held one."""
        located = self.locate(pfn)
        return None if located is None else located[0].gfn(located[1])

    def slot(self, gfn: int) -> KvmMemorySlot:
        """The slot that holds a guest frame; raises NoSuchFrameError."""
        slot = self._kvm.gfn_to_memslot(gfn)
        if slot is None:
            raise NoSuchFrameError(gfn)
        return slot

    def page(self, gfn: int) -> int:
        """The host virtual page of a guest frame; raises NoSuchFrameError."""
        return gfn + self.slot(gfn).hva_delta

    def pfn(self, gfn: int) -> int:
        """The host frame of a guest frame, present or not; raises NoSuchFrameError."""
        slot = self.slot(gfn)
        return self.page_pfn(slot, gfn + slot.hva_delta)

    def page_pfn(self, slot: KvmMemorySlot, page: int) -> int:
        """The host frame of a page of the slot's memory, present or not."""
        key = page & slot.host_mask
        first = self.new_pfn.get(key)
        return page + FIRST_PFN if first is None else first + page - key

    def is_present(self, gfn: int) -> bool:
        """Whether the host maps the frame; raises NoSuchFrameError."""
        slot = self.slot(gfn)
        return gfn + slot.hva_delta & slot.host_mask not in self.absent

    def is_writable(self, gfn: int) -> bool:
        """Whether the host maps the frame writable, if it maps it; raises NoSuchFrameError."""
        slot = self.slot(gfn)
        return gfn + slot.hva_delta & slot.host_mask not in self.readonly

    def atomic_pfn(self, slot: KvmMemorySlot, gfn: int) -> int:
        """Atomic look-up for write (gfn_to_pfn_memslot_atomic): the frame, or BAD_PFN if not present and writable."""
        page = gfn + slot.hva_delta
        key = page & slot.host_mask
        if key in self.absent or key in self.readonly:
            return BAD_PFN
        first = self.new_pfn.get(key)
        return page + FIRST_PFN if first is None else first + page - key

    def fault_in(self, slot: KvmMemorySlot, gfn: int) -> None:
        """What a sleeping look-up does first: a frame that is not present becomes present."""
        key = gfn + slot.hva_delta & slot.host_mask
        if key not in self.absent or key in self.cleared:
            return
        self.absent.discard(key)
        if key in self.swapped:
            self.swapped.discard(key)
            self.assign(slot, key, self.take_pfn(slot))
        self.backed(slot, key)

    def set_pfn_dirty(self, pfn: int, level: int) -> None:
        """KVM says that the guest has written the frame, or the large page of `level` that begins there."""
        (self.dirty_frames if level == 1 else self.dirty_blocks).add(pfn)

    def is_dirty(self, slot: KvmMemorySlot, page: int, pfn: int) -> bool:
        """Whether the host thinks that the page, in that frame, differs from what is in swap."""
        known = pfn in self.dirty_frames or pfn & ~511 in self.dirty_blocks
        return known or page - slot.memory.base in slot.memory.written

    def carry_dirty(self, slot: KvmMemorySlot, page: int, pfn: int) -> None:
        """The page is in another frame than `pfn` now, and as dirty as it was there."""
        if self.is_dirty(slot, page, pfn):
            self.dirty_frames.discard(pfn)
            self.dirty_frames.add(self.page_pfn(slot, page))

    def page_out(self, slot: KvmMemorySlot, page: int, pfn: int) -> None:
        """The page, in that frame, has gone from all tables. If the host thinks it dirty, it is written to swap.

        If it is thought clean the frame is freed as it is: from now on its contents are what is in swap. Huge pages are
        not swapped out. If somebody has brought the page back meanwhile, it stays, and is as dirty as it was.
        """
        if slot.host_mask != -1:
            return
        if page not in self.swapped:
            self.carry_dirty(slot, page, pfn)
            return
        dirty = self.is_dirty(slot, page, pfn)
        self.dirty_frames.discard(pfn)
        memory = slot.memory
        index = page - memory.base
        memory.written.discard(index)
        contents = memory.data[index << 12 : index + 1 << 12]
        if dirty or page not in self.swap_space:
            self.swap_space[page] = bytes(contents)
        else:
            contents[:] = self.swap_space[page]

    def take_pfn(self, slot: KvmMemorySlot) -> int:
        """A host frame that was never used (the first of a host page's)."""
        pages = kvm_pages_per_hpage(slot.backing.level)
        pfn = -(-self._next_pfn // pages) * pages
        self._next_pfn = pfn + pages
        return pfn

    def assign(self, slot: KvmMemorySlot, key: int, pfn: int) -> None:
        """Let host frame `pfn` (and those after it, in a huge page) hold the host page."""
        if pfn == key + FIRST_PFN:
            self.new_pfn.pop(key, None)
        else:
            self.new_pfn[key] = pfn
        for i in range(-slot.host_mask):
            if pfn + i != key + i + FIRST_PFN or pfn + i in self._owner:
                self._owner[pfn + i] = key + i

    def clear_pte(self, key: int) -> None:
        """Nobody finds a frame for the host page until `set_pte`."""
        self.absent.add(key)
        self.cleared.add(key)

    def set_pte(self, key: int, writable: bool) -> None:
        """The host page is present from now on, writable or not."""
        for pages in (self.absent, self.cleared, self.swapped):
            pages.discard(key)
        (self.readonly.discard if writable else self.readonly.add)(key)

    def keep_old_frame(self, slot: KvmMemorySlot, page: int, pfn: int) -> int:
        """The page is about to be copied to `pfn`: its frame, the contents of which are in `old_frames` from now on.

        Huge pages are not kept: the kernel does not change them like this (hugetlb_cow invalidates a range).
        """
        old = self.page_pfn(slot, page)
        if slot.host_mask == -1 and old != pfn and page not in self.absent:
            self.old_frames[old] = FrameCopy(slot.memory, page)
        return old

    def pages(self, slot: KvmMemorySlot, key: int) -> range:
        """The pages of a host page that are in the slot's memory."""
        return range(max(key, slot.memory.base), min(key - slot.host_mask, slot.memory.end))

    def keys(self, slot: KvmMemorySlot) -> list[int]:
        """The first page of each host page of the slot's memory."""
        return list(range(slot.memory.base & slot.host_mask, slot.memory.end, -slot.host_mask))

    def backed(self, slot: KvmMemorySlot, key: int) -> None:
        """Tell the trace that a host page backs its guest frames (again)."""
        trace = self._kvm.trace
        if trace is not None:
            for page in self.pages(slot, key):
                trace(FrameBacked(slot.memory.gfn(page), self.page_pfn(slot, page)))

    def is_trans_huge(self, slot: KvmMemorySlot, gfn: int) -> bool:
        """Whether the frame is in a transparent huge page (PageTransCompound)."""
        if slot.backing is not Backing.THP:
            return False
        first = gfn + slot.hva_delta & ~511
        memory = slot.memory
        return memory.base <= first and first + 512 <= memory.end and first not in self.split_blocks

    def deviations(self) -> list[tuple[int, int, int, int]]:
        """(gfn, pfn, present, writable) of each host page that is not as at the start, by its first frame."""
        out = []
        for key in sorted(self.absent | self.readonly | set(self.new_pfn)):
            memory = self._memories[max(0, bisect_right(self._bases, key) - 1)]
            first = self.new_pfn.get(key, key + FIRST_PFN)
            out.append((memory.gfn(key), first, int(key not in self.absent), int(key not in self.readonly)))
        return out
