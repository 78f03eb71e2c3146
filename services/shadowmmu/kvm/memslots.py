"""Memory slots: the ranges of guest frames that have memory, with what KVM keeps per frame.

Each slot has the guest's memory of its range, the reverse maps (which shadow entries map a frame, or a block of
512 or 262144 frames) and the write counts that forbid large pages (struct kvm_memory_slot, kvm_lpage_info).
"""

from __future__ import annotations

import enum
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import msgspec

from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.pte_list import PteList

__all__ = ["Backing", "KvmMemorySlot", "MemorySlot", "check_memslots"]


class Backing(enum.Enum):
    """How the host backs a slot."""

    SMALL = "4k"
    HUGE_2M = "2m"  # hugetlbfs: every host page has 2 MiB
    HUGE_1G = "1g"
    THP = "thp"  # host pages of 4 KiB, but aligned blocks of 512 are one transparent huge page until they are split

    @property
    def level(self) -> int:
        """The size of the host's pages: 1, 2 or 3."""
        return {Backing.HUGE_2M: 2, Backing.HUGE_1G: 3}.get(self, 1)


class MemorySlot(msgspec.Struct, frozen=True):
    """A slot as configured: number, first guest frame, frames, and how the host backs it."""

    id: int
    base_gfn: int
    npages: int
    backing: Backing = Backing.SMALL


class KvmMemorySlot:
    """A slot in use.

    `words` is its memory as aligned 8-byte words. `rmap[level]` maps a frame number (level 1) or block number (frame
    number >> 9 or >> 18) to its list of shadow entries; absent means empty. `write_count[level]` likewise for levels 2
    and 3. `dirty_bitmap` is the set of dirty guest frames, or None without dirty logging. `host_mask` rounds a frame
    number down to the first frame of its host page.
    """

    __slots__ = (
        "backing",
        "base_gfn",
        "bit",
        "data",
        "dirty_bitmap",
        "dwords",
        "end_gfn",
        "host_mask",
        "id",
        "npages",
        "rmap",
        "words",
        "write_count",
    )

    def __init__(self, slot: MemorySlot) -> None:
        self.id = slot.id
        self.bit = 1 << slot.id  # in the slot bitmaps of shadow pages
        self.base_gfn = slot.base_gfn
        self.npages = slot.npages
        self.end_gfn = slot.base_gfn + slot.npages
        self.backing = slot.backing
        self.host_mask = -kvm_pages_per_hpage(slot.backing.level)
        # Anonymous memory costs nothing until it is touched; a bytearray of 1 GiB would be filled with zeros first.
        self.data = memoryview(mmap(-1, slot.npages << 12, flags=MAP_PRIVATE | MAP_ANONYMOUS))
        self.words: memoryview[int] = self.data.cast("Q")
        self.dwords: memoryview[int] = self.data.cast("I")
        self.dirty_bitmap: set[int] | None = None
        self.rmap: tuple[dict[int, PteList], ...] = ({}, {}, {}, {})
        self.write_count: tuple[dict[int, int], ...] = ({}, {}, {}, {})
        for level in (2, 3):
            self._forbid_incomplete_blocks(level)

    def _forbid_incomplete_blocks(self, level: int) -> None:
        """A first or last block that the slot does not fill may never be a large page."""
        pages = kvm_pages_per_hpage(level)
        shift = 9 * (level - 1)
        counts = self.write_count[level]
        if self.base_gfn & (pages - 1):
            counts[self.base_gfn >> shift] = 1
        if self.end_gfn & (pages - 1):
            counts[self.end_gfn >> shift] = 1

    def __contains__(self, gfn: int) -> bool:
        return self.base_gfn <= gfn < self.end_gfn

    def __repr__(self) -> str:
        return f"<KvmMemorySlot {self.id} frames {self.base_gfn}..{self.end_gfn - 1} {self.backing.value}>"


def check_memslots(slots: tuple[MemorySlot, ...]) -> None:
    """Raises ConfigError unless the slots have pages, different numbers and no frame in common."""
    if not slots:
        raise ConfigError("a virtual machine needs at least one memory slot")
    if len({slot.id for slot in slots}) != len(slots):
        raise ConfigError("two memory slots have the same id")
    end = 0
    for slot in sorted(slots, key=lambda s: s.base_gfn):
        if slot.npages <= 0 or slot.base_gfn < 0 or slot.id < 0:
            raise ConfigError(f"memory slot {slot.id} has no pages or a negative number")
        if slot.base_gfn < end:
            raise ConfigError(f"memory slot {slot.id} overlaps another")
        end = slot.base_gfn + slot.npages
