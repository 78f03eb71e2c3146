"""Taking write access to a memory slot away, so that the next store to each of its frames is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import drop_spte

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_mmu_slot_remove_write_access"]


def kvm_mmu_slot_remove_write_access(kvm: Kvm, slot_id: int) -> Operation[None]:
    """Let no leaf of a page that ever mapped the slot be writable; always flushes all TLBs. Under mmu_lock.

    Leaves that map other slots lose write access too.
    """
    bit = 1 << slot_id
    present_test = kvm.spte_format.present_test
    for sp in reversed(kvm.active_mmu_pages.values()):
        if not sp.slot_bitmap & bit:
            continue
        for index, spte in list(sp.spt.items()):
            if spte & present_test != PT_PRESENT_MASK or not (sp.level == 1 or spte & PT_PAGE_SIZE_MASK):
                continue
            if spte & PT_PAGE_SIZE_MASK:
                drop_spte(kvm, sp, index)
                kvm.stat.lpages -= 1
            elif spte & PT_WRITABLE_MASK:
                old = sp.spt[index]
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                sp.spt[index] = old & ~PT_WRITABLE_MASK
    yield from kvm_flush_remote_tlbs(kvm)
