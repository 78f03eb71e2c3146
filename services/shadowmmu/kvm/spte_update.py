"""Changing an entry that maps a frame while processors set its A and D bits (mmu_spte_update). Under mmu_lock.

The D bit of a shadow entry is all that says that a guest has written the frame. Where it disappears the host is told,
or it takes the frame for clean and frees it without writing it to swap (bug B20). So the new value is exchanged for the
old one, not just stored: a processor may have set the bit since the old value was read. (Dropping entries: `rmap`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK

if TYPE_CHECKING:
    from shadowmmu.kvm.page import ShadowPage
    from shadowmmu.kvm.vm import Kvm

__all__ = ["mmu_spte_update"]


def mmu_spte_update(kvm: Kvm, sp: ShadowPage, index: int, seen: int, spte: int, *, exchange: bool) -> None:
    """Put `spte` in the place of the present entry that was `seen`, and tell the host of a D bit that is gone.

    Without `exchange` (a bug) what a processor has set since the entry was seen goes unnoticed.
    """
    spt = sp.spt
    old = spt[index] if exchange else seen
    spt[index] = spte
    if old & ~spte & kvm.spte_format.dirty_mask:
        kvm.host.set_pfn_dirty((old & PT64_BASE_ADDR_MASK) >> 12, sp.level)
