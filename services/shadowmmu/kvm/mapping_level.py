"""How large a page a fault may map (mapping_level, transparent_hugepage_adjust)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT_DIRECTORY_LEVEL, PT_PAGE_TABLE_LEVEL
from shadowmmu.kvm.constants import MAX_PAGE_TABLE_LEVELS, kvm_pages_per_hpage
from shadowmmu.kvm.rmap import has_wrprotected_page
from shadowmmu.kvm.set_spte import NO_SLOT_PFN

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["mapping_level", "mapping_level_dirty_bitmap", "transparent_hugepage_adjust"]


def mapping_level_dirty_bitmap(kvm: Kvm, gfn: int) -> bool:
    """Whether only small pages may map the frame: no slot, or its slot has dirty logging."""
    slot = kvm.visible_memslot(gfn)
    small = slot is None or slot.dirty_bitmap is not None
    return small is kvm.profile.dirty_log_large_maps  # bug B17: the other way round


def mapping_level(kvm: Kvm, gfn: int) -> int:
    """The largest level that the host's page and the shadowed tables around the frame allow.

    Read without mmu_lock: set_spte looks at the tables again.
    """
    slot = kvm.visible_memslot(gfn)
    host_level = 1 if slot is None else min(slot.backing.level, MAX_PAGE_TABLE_LEVELS)
    level = 1
    while level < host_level and not has_wrprotected_page(kvm, gfn, level + 1):
        level += 1
    return level


def transparent_hugepage_adjust(kvm: Kvm, gfn: int, pfn: int, level: int) -> tuple[int, int, int]:
    """(gfn, pfn, level) of the 2 MiB page around a small one, if the host has one and no table is shadowed in it."""
    if level != PT_PAGE_TABLE_LEVEL or pfn == NO_SLOT_PFN:
        return gfn, pfn, level
    slot = kvm.gfn_to_memslot(gfn)
    if (
        slot is None
        or not kvm.host.is_trans_huge(slot, gfn)
        or has_wrprotected_page(kvm, gfn, PT_DIRECTORY_LEVEL)
    ):
        return gfn, pfn, level
    pages = kvm_pages_per_hpage(PT_DIRECTORY_LEVEL)
    return gfn & -pages, pfn & -pages, PT_DIRECTORY_LEVEL
