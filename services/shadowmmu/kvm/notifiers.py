"""The MMU notifiers: how the host tells KVM that it changes, ages or takes away the frames of a guest.

A page fault looks its frame up before it takes mmu_lock; `mmu_notifier_seq` and `mmu_notifier_count` let it find out
that a notifier ran meanwhile. All functions take mmu_lock. Pages are named by host virtual page number (`user_memory`):
that is the guest frame number in the slots that a machine begins with. Slots that are going count too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_list import pte_list_entries
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import kvm_unmap_rmapp
from shadowmmu.kvm.spte import SPTE_HOST_WRITEABLE

if TYPE_CHECKING:
    from shadowmmu.kvm.memslots import KvmMemorySlot
    from shadowmmu.kvm.page import ShadowPage
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "kvm_mmu_notifier_change_pte",
    "kvm_mmu_notifier_clear_flush_young",
    "kvm_mmu_notifier_invalidate_page",
    "kvm_mmu_notifier_invalidate_range_end",
    "kvm_mmu_notifier_invalidate_range_start",
    "kvm_mmu_notifier_test_young",
    "mmu_notifier_retry",
]


def mmu_notifier_retry(kvm: Kvm, seq: int) -> bool:
    """Whether a frame looked up when mmu_notifier_seq was `seq` may be gone by now. Under mmu_lock."""
    return kvm.mmu_notifier_count != 0 or kvm.mmu_notifier_seq != seq


def _rmaps(kvm: Kvm, page: int) -> list[tuple[KvmMemorySlot, int, int]]:
    """The reverse maps that may map a page: (slot, level, block)."""
    for slot in kvm.memslots:
        if slot.memory.base <= page < slot.memory.end:
            gfn = page - slot.hva_delta
            return [(slot, level, gfn >> (9 * (level - 1))) for level in (1, 2, 3)]
    return []


def _unmap(kvm: Kvm, page: int) -> bool:
    """Drop every entry that maps the page (kvm_unmap_hva)."""
    dropped = False
    for slot, level, block in _rmaps(kvm, page):
        dropped |= kvm_unmap_rmapp(kvm, slot, level, block)
    return dropped


def _unmap_range(kvm: Kvm, pages: range) -> bool:
    """Drop every entry that maps one of the pages."""
    dropped = False
    for slot in kvm.memslots:
        delta = slot.hva_delta
        first, last = max(pages.start - delta, slot.base_gfn), min(pages.stop - delta, slot.end_gfn) - 1
        if first > last:
            continue
        for level in (1, 2, 3):
            shift = 9 * (level - 1)
            rmap = slot.rmap[level]
            blocks = range(first >> shift, (last >> shift) + 1)
            for block in [b for b in rmap if b in blocks] if len(rmap) < len(blocks) else blocks:
                dropped |= kvm_unmap_rmapp(kvm, slot, level, block)
    return dropped


def _deferred_flush(kvm: Kvm) -> bool:
    """Whether entries were dropped whose flush is still owed (tlbs_dirty); without fix B2 nobody asks."""
    return kvm.profile.sync_drop_noflush and kvm.tlbs_dirty != 0


def _unlock_and_flush(kvm: Kvm, need_flush: bool, point: Point) -> Operation[None]:
    """Release mmu_lock and flush all TLBs if need be.

    Bug A10 (notifier-flush-outside-lock): 3.1 flushes after it has released the lock, so that others see entries
    gone while TLBs still have them. With the fix the order is the other way round.
    """
    if kvm.profile.notifier_flush_outside_lock:
        if need_flush:
            yield from kvm_flush_remote_tlbs(kvm)
        yield MmuLock.RELEASE
        return
    yield MmuLock.RELEASE
    if need_flush:
        yield point
        yield from kvm_flush_remote_tlbs(kvm)


def kvm_mmu_notifier_invalidate_page(kvm: Kvm, page: int) -> Operation[None]:
    """The host takes one page away; on return no vCPU reaches its frame."""
    yield MmuLock.ACQUIRE
    kvm.mmu_notifier_seq += 1
    need_flush = _unmap(kvm, page) | _deferred_flush(kvm)
    yield from _unlock_and_flush(kvm, need_flush, Point.NOTIFIER_UNLOCKED)


def kvm_mmu_notifier_invalidate_range_start(kvm: Kvm, pages: range) -> Operation[None]:
    """The host is about to take pages away; until range_end no fault maps anything. On return none is reached."""
    yield MmuLock.ACQUIRE
    kvm.mmu_notifier_count += 1
    need_flush = _unmap_range(kvm, pages) | _deferred_flush(kvm)
    yield from _unlock_and_flush(kvm, need_flush, Point.NOTIFIER_RANGE_UNLOCKED)


def kvm_mmu_notifier_invalidate_range_end(kvm: Kvm) -> Operation[None]:
    """The range that was started is done with."""
    yield MmuLock.ACQUIRE
    kvm.mmu_notifier_seq += 1
    kvm.mmu_notifier_count -= 1
    yield MmuLock.RELEASE


def kvm_mmu_notifier_change_pte(kvm: Kvm, page: int, new_pfn: int, writable: bool) -> Operation[None]:
    """The host backs the page by another frame now; entries follow, read-only, or go if the frame is writable."""
    yield MmuLock.ACQUIRE
    kvm.mmu_notifier_seq += 1
    for slot, level, block in _rmaps(kvm, page):
        rmap = slot.rmap[level].get(block, 0)
        if not rmap:
            continue
        if writable:
            kvm_unmap_rmapp(kvm, slot, level, block)
        else:
            clear = ~(
                PT64_BASE_ADDR_MASK | PT_WRITABLE_MASK | SPTE_HOST_WRITEABLE | kvm.spte_format.accessed_mask
            )
            for sptep in pte_list_entries(rmap):
                sp, index = _entry(kvm, sptep)
                spte = sp.spt[index] & clear | new_pfn << 12
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                sp.spt[index] = spte
        yield from kvm_flush_remote_tlbs(kvm)
    yield MmuLock.RELEASE


def kvm_mmu_notifier_clear_flush_young(kvm: Kvm, page: int) -> Operation[bool]:
    """Was the page used since this was last asked? Clears the accessed bits (without such bits: drops the entries)."""
    yield MmuLock.ACQUIRE
    young = False
    accessed = kvm.spte_format.accessed_mask
    for slot, level, block in _rmaps(kvm, page):
        if not accessed:
            young |= kvm_unmap_rmapp(kvm, slot, level, block)
            continue
        for sptep in pte_list_entries(slot.rmap[level].get(block, 0)):
            sp, index = _entry(kvm, sptep)
            if sp.spt[index] & accessed:
                young = True
                sp.spt[index] &= ~accessed  # clear_bit: atomic
    yield from _unlock_and_flush(kvm, young, Point.NOTIFIER_YOUNG_UNLOCKED)
    return young


def kvm_mmu_notifier_test_young(kvm: Kvm, page: int) -> Operation[bool]:
    """Was the page used since its accessed bits were last cleared? Changes nothing."""
    yield MmuLock.ACQUIRE
    accessed = kvm.spte_format.accessed_mask
    young = False
    for slot, level, block in _rmaps(kvm, page):
        for sptep in pte_list_entries(slot.rmap[level].get(block, 0)):
            sp, index = _entry(kvm, sptep)
            young |= sp.spt[index] & accessed != 0
    yield MmuLock.RELEASE
    return young


def _entry(kvm: Kvm, sptep: int) -> tuple[ShadowPage, int]:
    return kvm.page_header[sptep & ~0xFFF], (sptep & 0xFFF) >> 3
