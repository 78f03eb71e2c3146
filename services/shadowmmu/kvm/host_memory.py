"""Which host frame backs each guest frame, and whether it is there and writable.

Frames are at first present, writable, and number gfn + 0x100000; only deviations are kept. In a slot backed by huge
pages these are kept per host page, by its first frame (`key`). The operations that take frames away or move them,
which tell KVM through the MMU notifiers, are in `host`; here is what they and KVM's look-ups read and write.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.errors import NoSuchFrameError
from shadowmmu.kvm.memslots import Backing, KvmMemorySlot
from shadowmmu.protocol.events import FrameBacked

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["BAD_PFN", "FIRST_NEW_PFN", "FIRST_PFN", "HostMemory"]

FIRST_PFN: Final = 0x100000
"""Host frame of guest frame 0."""
FIRST_NEW_PFN: Final = 0x400000
"""First host frame handed out later (copy on write, swapped in elsewhere)."""
BAD_PFN: Final = -1
"""No frame: the look-up failed."""


class HostMemory:
    """The host's side of the guest's memory.

    `absent`, `readonly` and `swapped` hold keys (gfn of the first frame of a host page): not present; not writable;
    comes back in another frame. `in_change` counts the operations at work that have changed a page and not told KVM
    yet, by key. `new_pfn` maps the key of a moved page to its first host frame.
    """

    __slots__ = (
        "_kvm",
        "_next_pfn",
        "_owner",
        "absent",
        "in_change",
        "new_pfn",
        "readonly",
        "split_blocks",
        "swapped",
    )

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self.absent: set[int] = set()
        self.readonly: set[int] = set()
        self.swapped: set[int] = set()
        self.in_change: Counter[int] = Counter()
        self.new_pfn: dict[int, int] = {}
        self.split_blocks: set[int] = set()
        self._next_pfn = FIRST_NEW_PFN
        self._owner: dict[int, int] = {}

    def slot(self, gfn: int) -> KvmMemorySlot:
        """The slot that holds a guest frame; raises NoSuchFrameError."""
        slot = self._kvm.gfn_to_memslot(gfn)
        if slot is None:
            raise NoSuchFrameError(gfn)
        return slot

    def key(self, gfn: int) -> int:
        """The first guest frame of the host page that holds `gfn`; raises NoSuchFrameError."""
        return gfn & self.slot(gfn).host_mask

    def pfn(self, gfn: int) -> int:
        """The host frame of a guest frame, present or not; raises NoSuchFrameError."""
        key = self.key(gfn)
        first = self.new_pfn.get(key)
        return gfn + FIRST_PFN if first is None else first + gfn - key

    def is_present(self, gfn: int) -> bool:
        """Whether the host maps the frame; raises NoSuchFrameError."""
        return self.key(gfn) not in self.absent

    def is_writable(self, gfn: int) -> bool:
        """Whether the host maps the frame writable, if it maps it; raises NoSuchFrameError."""
        return self.key(gfn) not in self.readonly

    def gfn_of(self, pfn: int) -> int | None:
        """The guest frame that a host frame holds, or held last; None if it never held one."""
        gfn = self._owner.get(pfn)
        if gfn is None and self._kvm.gfn_to_memslot(pfn - FIRST_PFN) is not None:
            gfn = pfn - FIRST_PFN
        return gfn

    def atomic_pfn(self, slot: KvmMemorySlot, gfn: int) -> int:
        """Atomic look-up for write (gfn_to_pfn_memslot_atomic): the frame, or BAD_PFN if not present and writable."""
        key = gfn & slot.host_mask
        if key in self.absent or key in self.readonly:
            return BAD_PFN
        first = self.new_pfn.get(key)
        return gfn + FIRST_PFN if first is None else first + gfn - key

    def fault_in(self, slot: KvmMemorySlot, gfn: int) -> None:
        """What a sleeping look-up does first: a frame that is not present becomes present."""
        key = gfn & slot.host_mask
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
        """Let host frame `pfn` (and those after it, in a huge page) hold the page of guest frame `key`."""
        if pfn == key + FIRST_PFN:
            self.new_pfn.pop(key, None)
        else:
            self.new_pfn[key] = pfn
        for i in range(-slot.host_mask):
            if pfn + i != key + i + FIRST_PFN or pfn + i in self._owner:
                self._owner[pfn + i] = key + i

    def frames(self, slot: KvmMemorySlot, key: int) -> range:
        """The guest frames of a host page that are in the slot."""
        return range(max(key, slot.base_gfn), min(key - slot.host_mask, slot.end_gfn))

    def backed(self, slot: KvmMemorySlot, key: int) -> None:
        """Tell the trace that a host page backs its guest frames (again)."""
        trace = self._kvm.trace
        if trace is not None:
            for gfn in self.frames(slot, key):
                trace(FrameBacked(gfn, self.pfn(gfn)))

    def is_trans_huge(self, slot: KvmMemorySlot, gfn: int) -> bool:
        """Whether the frame is in a transparent huge page (PageTransCompound)."""
        if slot.backing is not Backing.THP:
            return False
        first = gfn & ~511
        return slot.base_gfn <= first and first + 512 <= slot.end_gfn and first not in self.split_blocks

    def deviations(self) -> list[tuple[int, int, int, int]]:
        """(gfn, pfn, present, writable) of each host page that is not as at the start, by its first frame."""
        out = []
        for key in sorted(self.absent | self.readonly | set(self.new_pfn)):
            first = self.new_pfn.get(key, key + FIRST_PFN)
            out.append((key, first, int(key not in self.absent), int(key not in self.readonly)))
        return out
