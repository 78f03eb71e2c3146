"""Taking write access to a memory slot away, so that the next store to each of its frames is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import drop_spte
from shadowmmu.kvm.spte_update import mmu_spte_update

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_mmu_slot_remove_write_access", "remove_write_access"]


def kvm_mmu_slot_remove_write_access(kvm: Kvm, slot_id: int) -> Operation[None]:
    """Let no leaf of a page that ever mapped the slot be writable; always flushes all TLBs. Under mmu_lock.

    Leaves that map other slots lose write access too.
    """
    profile = kvm.profile
    if not profile.dirty_log_flush_early:  # bug B17: TLBs get the entries again that are still writable
        yield from kvm_flush_remote_tlbs(kvm)
        yield Point.DIRTY_LOG_FLUSHED_EARLY
    yield from remove_write_access(kvm, slot_id)
    if profile.dirty_log_flush and profile.dirty_log_flush_early:  # bug B17 without one of them
        yield from kvm_flush_remote_tlbs(kvm)


def remove_write_access(kvm: Kvm, slot_id: int) -> Operation[None]:
    """The same without the flush."""
    bit = 1 << slot_id
    present_test = kvm.spte_format.present_test
    for sp in reversed(kvm.active_mmu_pages.values()):
        if not sp.slot_bitmap & bit:
            continue
        for index, spte in list(sp.spt.items()):
            kvm.work.rmap_entries += 1
            if spte & present_test != PT_PRESENT_MASK or not (sp.level == 1 or spte & PT_PAGE_SIZE_MASK):
                continue
            if spte & PT_PAGE_SIZE_MASK:
                if not kvm.profile.ro_large_spte_dirty_log and not spte & PT_WRITABLE_MASK:
                    continue  # bug C8
                drop_spte(kvm, sp, index)
                kvm.stat.lpages -= 1
            elif spte & PT_WRITABLE_MASK:
                old = sp.spt[index]
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                exchange = kvm.profile.ad_bit_loss_write_access  # bug B20 without it
                mmu_spte_update(kvm, sp, index, old, old & ~PT_WRITABLE_MASK, exchange=exchange)
