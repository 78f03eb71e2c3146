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
from shadowmmu.kvm.user_memory import UserMemory
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
    another frame. `in_change`: an operation at work has changed the page and not told KVM yet.
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
        "in_change",
        "new_pfn",
        "readonly",
        "split_blocks",
        "swapped",
    )

    def __init__(self, kvm: Kvm, memories: Iterable[UserMemory]) -> None:
        self._kvm = kvm
        self.absent: set[int] = set()
        self.readonly: set[int] = set()
        self.swapped: set[int] = set()
        self.in_change: set[int] = set()
        self.new_pfn: dict[int, int] = {}
        self.split_blocks: set[int] = set()
        self._next_pfn = FIRST_NEW_PFN
        self._owner: dict[int, int] = {}  # pages by host frame, where not the first frame of a page
        self._memories = sorted(memories, key=lambda m: m.base)  # those that are unmapped too
        self._bases = [memory.base for memory in self._memories]
        self._last = self._memories[0]

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
            self.new_pfn.pop(key, None)

    def locate(self, pfn: int) -> tuple[UserMemory, int] | None:
        """The memory, and its page, that a host frame holds, or held last; None if it never held one."""
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
        if key not in self.absent:
            return
        self.absent.discard(key)
        if key in self.swapped:
            self.swapped.discard(key)
            self.assign(slot, key, self.take_pfn(slot))
        self.backed(slot, key)

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
