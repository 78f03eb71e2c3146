"""Memory slots: the ranges of guest frames that have memory, with what KVM keeps per frame.

Each slot has the guest's memory of its range, the reverse maps (which shadow entries map a frame, or a block of
512 or 262144 frames) and the write counts that forbid large pages (struct kvm_memory_slot, kvm_lpage_info).
"""

from __future__ import annotations

import enum
from typing import Any, Final

import msgspec

from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.pte_list import PteList
from shadowmmu.kvm.user_memory import UserMemory

__all__ = ["KVM_MEMORY_SLOTS", "NO_SLOT", "Backing", "KvmMemorySlot", "MemorySlot", "check_memslots"]

KVM_MEMORY_SLOTS: Final = 32
"""Slots that user space may have; numbers count from 0."""


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

    `memory` is user space's memory, `words` its aligned 8-byte words from the slot's first frame on; `hva_delta` is
    what to add to a guest frame number for the host virtual page number, and `host_mask` rounds that down to the first
    of its host page. `rmap[level]` maps a frame number (level 1) or block number (frame number >> 9 or >> 18) to its
    list of shadow entries; absent means empty. `write_count[level]` likewise for levels 2 and 3. `dirty_bitmap` is the
    set of dirty guest frames, or None without dirty logging. `invalid` (KVM_MEMSLOT_INVALID): the slot is going; KVM
    finds what it keeps for it, but reaches its memory no more.
    """

    __slots__ = (
        "backing",
        "base_gfn",
        "bit",
        "dirty_bitmap",
        "dwords",
        "end_gfn",
        "host_mask",
        "hva_delta",
        "id",
        "invalid",
        "memory",
        "npages",
        "rmap",
        "words",
        "write_count",
    )

    def __init__(self, slot: MemorySlot, memory: UserMemory) -> None:
        self.id = slot.id
        self.bit = 1 << slot.id  # in the slot bitmaps of shadow pages
        self.base_gfn = slot.base_gfn
        self.npages = slot.npages
        self.end_gfn = slot.base_gfn + slot.npages
        self.backing = slot.backing
        self.host_mask = -kvm_pages_per_hpage(slot.backing.level)
        self.memory = memory
        self.hva_delta = memory.base - slot.base_gfn
        self.words = memory.words
        self.dwords = memory.dwords
        self.invalid = False
        self.dirty_bitmap: set[int] | None = None
        self.rmap: tuple[dict[int, PteList], ...] = ({}, {}, {}, {})
        self.write_count: tuple[dict[int, int], ...] = ({}, {}, {}, {})
        for level in (2, 3):
            self._forbid_incomplete_blocks(level)

    def __getstate__(self) -> dict[str, object]:
        """For a copy: `words` and `dwords` are the memory's."""
        return {name: getattr(self, name) for name in self.__slots__ if name not in {"words", "dwords"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.words = self.memory.words
        self.dwords = self.memory.dwords

    def _forbid_incomplete_blocks(self, level: int) -> None:
        """A first or last block that the slot does not fill may never be a large page."""
        pages = kvm_pages_per_hpage(level)
        shift = 9 * (level - 1)
        counts = self.write_count[level]
        if self.base_gfn & (pages - 1):
            counts[self.base_gfn >> shift] = 1
        if self.end_gfn & (pages - 1):
            counts[self.end_gfn >> shift] = 1

    def moved(self, base_gfn: int) -> KvmMemorySlot:
        """The slot at another place in guest memory. Reverse maps go with it, as arrays would; write counts are new."""
        slot = KvmMemorySlot(MemorySlot(self.id, base_gfn, self.npages, self.backing), self.memory)
        slot.rmap = self.rmap  # whoever holds the old slot adds to the same ones
        for level in (1, 2, 3):
            shift = 9 * (level - 1)
            delta = (base_gfn >> shift) - (self.base_gfn >> shift)
            rmap = self.rmap[level]
            items = [(block + delta, sptes) for block, sptes in rmap.items()]
            rmap.clear()
            rmap.update(items)
        if self.dirty_bitmap is not None:
            slot.dirty_bitmap = {gfn - self.base_gfn + base_gfn for gfn in self.dirty_bitmap}
        return slot

    def __contains__(self, gfn: int) -> bool:
        return self.base_gfn <= gfn < self.end_gfn

    def __repr__(self) -> str:
        return f"<KvmMemorySlot {self.id} frames {self.base_gfn}..{self.end_gfn - 1} {self.backing.value}>"


NO_SLOT: Final = KvmMemorySlot(MemorySlot(0, 0, 0), UserMemory(0, 0, 0))
"""A slot that holds no frame."""


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
        if slot.id >= KVM_MEMORY_SLOTS:
            raise ConfigError(f"memory slot {slot.id}: there are {KVM_MEMORY_SLOTS} slots")
        if slot.base_gfn < end:
            raise ConfigError(f"memory slot {slot.id} overlaps another")
        end = slot.base_gfn + slot.npages
