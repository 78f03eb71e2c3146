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
from shadowmmu.kvm.spte_update import mmu_spte_update

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
    if kvm.mmu_notifier_count == 0 and kvm.mmu_notifier_seq == seq:
        return False
    profile = kvm.profile  # without a fix, bug B19
    if kvm.mmu_notifier_count != 0 and profile.notifier_retry_count:
        return profile.notifier_retry
    return kvm.mmu_notifier_seq != seq and profile.notifier_retry_seq and profile.notifier_retry


def _raise_seq(kvm: Kvm) -> None:
    """Let faults at work find out that a notifier has run. Under mmu_lock; see _raise_seq_late."""
    if kvm.profile.notifier_retry_raise_late:
        kvm.mmu_notifier_seq += 1


def _raise_seq_late(kvm: Kvm) -> Operation[None]:
    """Bug B19 (notifier-retry-raise-late): only after mmu_lock was released."""
    if not kvm.profile.notifier_retry_raise_late:
        yield Point.NOTIFIER_SEQ_LATE
        kvm.mmu_notifier_seq += 1


def _rmaps(kvm: Kvm, page: int) -> list[tuple[KvmMemorySlot, int, int]]:
    """The reverse maps that may map a page: (slot, level, block)."""
    for slot in kvm.memslots:
        if slot.memory.base <= page < slot.memory.end:
            gfn = page - slot.hva_delta
            beside = _beside(kvm)
            return [(slot, level, (gfn >> (9 * (level - 1))) + beside * (level > 1)) for level in (1, 2, 3)]
    return []


def _beside(kvm: Kvm) -> int:
    """How far beside the right one the reverse maps of large pages are that notifiers look at: bug B18."""
    return 0 if kvm.profile.notifier_huge_index else 1


def _trace_age_page(kvm: Kvm, page: int, *, referenced: bool) -> None:
    """kvm_handle_hva has handled a page: what its tracepoint shows, whichever notifier it was for."""
    if kvm.tracepoints is not None:
        for slot in kvm.memslots:
            if slot.memory.base <= page < slot.memory.end:
                kvm.tracepoints.kvm_age_page(page << 12, page - slot.hva_delta, referenced=referenced)
                return


def _unmap(kvm: Kvm, page: int) -> Operation[bool]:
    """Drop every entry that maps the page (kvm_unmap_hva)."""
    dropped = False
    for slot, level, block in _rmaps(kvm, page):
        dropped |= yield from kvm_unmap_rmapp(kvm, slot, level, block)
    _trace_age_page(kvm, page, referenced=dropped)
    return dropped


def _unmap_range(kvm: Kvm, pages: range) -> Operation[bool]:
    """Drop every entry that maps one of the pages."""
    used: set[int] = set()  # pages for which something was dropped: of a large page, the first of the range
    for slot in kvm.memslots:
        delta = slot.hva_delta
        first, last = max(pages.start - delta, slot.base_gfn), min(pages.stop - delta, slot.end_gfn) - 1
        if first > last:
            continue
        for level in (1, 2, 3):
            shift = 9 * (level - 1)
            rmap = slot.rmap[level]
            beside = _beside(kvm) if level > 1 else 0
            blocks = range((first >> shift) + beside, (last >> shift) + 1 + beside)
            for block in [b for b in rmap if b in blocks] if len(rmap) < len(blocks) else blocks:
                if (yield from kvm_unmap_rmapp(kvm, slot, level, block)):
                    used.add(max(first, (block - beside) << shift) + delta)
    if kvm.tracepoints is not None:
        for page in pages:
            _trace_age_page(kvm, page, referenced=page in used)
    return bool(used)


def _deferred_flush(kvm: Kvm) -> bool:
    """Whether entries were dropped whose flush is still owed (tlbs_dirty); without fix B2 nobody asks.

    Bug A11 (tlbs-dirty-truncation): 3.1 puts the counter, a long, into an int first.
    """
    tlbs_dirty = kvm.tlbs_dirty
    if not kvm.profile.tlbs_dirty_truncation:
        tlbs_dirty &= (1 << kvm.config.tlbs_dirty_bits) - 1
    return kvm.profile.sync_drop_noflush and tlbs_dirty != 0


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
    _raise_seq(kvm)
    need_flush = (yield from _unmap(kvm, page)) | _deferred_flush(kvm)
    yield from _unlock_and_flush(kvm, need_flush, Point.NOTIFIER_UNLOCKED)
    yield from _raise_seq_late(kvm)


def kvm_mmu_notifier_invalidate_range_start(kvm: Kvm, pages: range) -> Operation[None]:
    """The host is about to take pages away; until range_end no fault maps anything. On return none is reached."""
    yield MmuLock.ACQUIRE
    kvm.mmu_notifier_count += 1
    need_flush = (yield from _unmap_range(kvm, pages)) | _deferred_flush(kvm)
    yield from _unlock_and_flush(kvm, need_flush, Point.NOTIFIER_RANGE_UNLOCKED)


def kvm_mmu_notifier_invalidate_range_end(kvm: Kvm) -> Operation[None]:
    """The range that was started is done with."""
    yield MmuLock.ACQUIRE
    _raise_seq(kvm)
    kvm.mmu_notifier_count -= 1
    yield MmuLock.RELEASE
    yield from _raise_seq_late(kvm)


def kvm_mmu_notifier_change_pte(kvm: Kvm, page: int, new_pfn: int, writable: bool) -> Operation[None]:
    """The host backs the page by another frame now; entries follow, read-only, or go if the frame is writable."""
    yield MmuLock.ACQUIRE
    _raise_seq(kvm)
    for slot, level, block in _rmaps(kvm, page):
        rmap = slot.rmap[level].get(block, 0)
        if not rmap:
            continue
        if writable:
            yield from kvm_unmap_rmapp(kvm, slot, level, block)
        else:
            clear = ~(
                PT64_BASE_ADDR_MASK | PT_WRITABLE_MASK | SPTE_HOST_WRITEABLE | kvm.spte_format.accessed_mask
            )
            for sptep in pte_list_entries(rmap):
                sp, index = _entry(kvm, sptep)
                seen = sp.spt[index]
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                exchange = kvm.profile.ad_bit_loss  # bug B20 without it
                mmu_spte_update(kvm, sp, index, seen, seen & clear | new_pfn << 12, exchange=exchange)
        yield from kvm_flush_remote_tlbs(kvm)
    _trace_age_page(kvm, page, referenced=False)  # kvm_set_pte_rmapp returns 0, whatever it has done
    yield MmuLock.RELEASE
    yield from _raise_seq_late(kvm)


def kvm_mmu_notifier_clear_flush_young(kvm: Kvm, page: int) -> Operation[bool]:
    """Was the page used since this was last asked? Clears the accessed bits (without such bits: drops the entries)."""
    yield MmuLock.ACQUIRE
    young = False
    accessed = kvm.spte_format.accessed_mask
    for slot, level, block in _rmaps(kvm, page):
        if not accessed:
            young |= yield from kvm_unmap_rmapp(kvm, slot, level, block)
            continue
        for sptep in pte_list_entries(slot.rmap[level].get(block, 0)):
            sp, index = _entry(kvm, sptep)
            if sp.spt[index] & accessed:
                young = True
                sp.spt[index] &= ~accessed  # clear_bit: atomic
    _trace_age_page(kvm, page, referenced=young)
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
    _trace_age_page(kvm, page, referenced=young)
    yield MmuLock.RELEASE
    return young


def _entry(kvm: Kvm, sptep: int) -> tuple[ShadowPage, int]:
    return kvm.page_header[sptep & ~0xFFF], (sptep & 0xFFF) >> 3
