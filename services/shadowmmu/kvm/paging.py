"""What a guest with paging does: page faults, sync, update after a table write; for every format of entries.

These are the functions of paging_tmpl.h; the format (`vcpu.mmu.fmt`) says how entries are laid out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import (
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_BASE_ADDR_MASK,
    X86_CR4_SMEP,
)
from shadowmmu.kvm.constants import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, kvm_pages_per_hpage
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.fetch import fetch
from shadowmmu.kvm.host import gfn_to_pfn_prot
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.mapping_level import mapping_level, mapping_level_dirty_bitmap, transparent_hugepage_adjust
from shadowmmu.kvm.mmio import handle_mmio_page_fault, vcpu_cache_mmio_info
from shadowmmu.kvm.notifiers import mmu_notifier_retry
from shadowmmu.kvm.notrap import drop_invalid_gpte
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import drop_spte
from shadowmmu.kvm.set_spte import NO_SLOT_PFN, mmu_set_spte, set_spte
from shadowmmu.kvm.spte import SPTE_HOST_WRITEABLE
from shadowmmu.kvm.tracepoints import AuditPoint
from shadowmmu.kvm.walker import GuestWalker, gpte_access, inject_page_fault, walk_addr
from shadowmmu.kvm.zap import kvm_mmu_free_some_pages
from shadowmmu.protocol.events import TlbsDirtyRaised

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["paging_page_fault", "paging_sync_page", "paging_update_pte"]


def paging_page_fault(vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
    """A page fault of a guest with paging (FNAME(page_fault)); returns 1 to emulate, 0 to go on.

    The guest's tables are walked without the lock, then the host frame is looked up, then under the lock the shadow is
    built. If the guest's tables do not allow the access, the fault is the guest's own: it is queued in
    `vcpu.exception`, unless it is a `prefault` (nobody waits for the access). 0 without it means: try again.
    """
    kvm = vcpu.kvm
    if error_code & PFERR_RSVD_MASK and kvm.mmio_sptes:
        return handle_mmio_page_fault(vcpu, gva, direct=False)
    write_fault = error_code & PFERR_WRITE_MASK != 0
    walker = yield from walk_addr(vcpu, gva, error_code)
    if walker.fault is not None:
        if not prefault:
            if kvm.profile.pf_injection_no_sync:
                # Bug A6: in 3.1 what the shadow has for the address outlives the fault. (Upstream's fix does this only
                # if the error code has P; any fault removes the translation on a processor. The exit took it from
                # this vCPU's TLB.)
                yield from vcpu.mmu.context.invlpg(vcpu, gva)
            inject_page_fault(vcpu, walker.fault, gva)
            vcpu.last_pt_write_count = 0
        return 0
    yield Point.WALK_DONE
    level = 1
    force_pt_level = walker.level < 2 or mapping_level_dirty_bitmap(kvm, walker.gfn)
    if not force_pt_level:
        level = min(walker.level, mapping_level(kvm, walker.gfn))
        walker.gfn &= -kvm_pages_per_hpage(level)
    seq = kvm.mmu_notifier_seq
    yield Point.GFN_TO_PFN
    pfn, map_writable = yield from gfn_to_pfn_prot(kvm, walker.gfn, write_fault)
    if not kvm.profile.notifier_retry_late_seq:  # bug B19: what has happened since the look-up goes unnoticed
        yield Point.LATE_SEQ
        seq = kvm.mmu_notifier_seq
    if pfn == NO_SLOT_PFN:
        vcpu_cache_mmio_info(vcpu, gva, walker.gfn, walker.pte_access)
        if not kvm.mmio_sptes:
            return 1
    user_fault = error_code & PFERR_USER_MASK != 0
    if kvm.profile.wp0_dirty_missed and write_fault and pfn != NO_SLOT_PFN:
        _grant_wp0_write(vcpu, walker, user_fault)
    yield Point.BEFORE_LOCK
    yield MmuLock.ACQUIRE
    emulate = False
    if not mmu_notifier_retry(kvm, seq):
        if kvm.tracepoints is not None:
            kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.PRE_PAGE_FAULT)
        yield from kvm_mmu_free_some_pages(kvm)
        if not force_pt_level:
            walker.gfn, pfn, level = transparent_hugepage_adjust(kvm, walker.gfn, pfn, level)
        emulate = yield from fetch(vcpu, walker, user_fault, write_fault, level, pfn, map_writable, prefault)
        if not emulate:
            vcpu.last_pt_write_count = 0
        kvm.stat.pf_fixed += 1
        if kvm.tracepoints is not None:
            kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.POST_PAGE_FAULT)
    yield MmuLock.RELEASE
    return int(emulate)


def _grant_wp0_write(vcpu: Vcpu, walker: GuestWalker, user_fault: bool) -> None:
    """With CR0.WP = 0 the kernel writes what the guest's tables let it read: for the kernel only, then.

    Bug A15 (wp0-dirty-missed): 3.1 does this when it writes the shadow entry, in a page that all read-only mappings of
    the frame share.
    """
    if user_fault or walker.pte_access & ACC_WRITE_MASK or vcpu.is_write_protection:
        return
    profile = vcpu.kvm.profile
    walker.pte_access |= ACC_WRITE_MASK
    if profile.role_bits_user:  # bug B15 without it
        walker.pte_access &= ~ACC_USER_MASK
    if vcpu.cr4 & X86_CR4_SMEP and profile.role_bits_smep:  # bug B15 without it
        walker.pte_access &= ~ACC_EXEC_MASK


def _dropped_without_flush(kvm: Kvm) -> None:
    """sync_page dropped an entry; the guest owes itself the flush, but the host must know that TLBs may have it."""
    if kvm.profile.sync_flush_now:  # the other fix of A1: sync_page flushes, nothing is put off
        return
    if not kvm.profile.sync_drop_noflush_count:  # bug B2: nobody knows
        return
    kvm.tlbs_dirty += 1
    if kvm.trace is not None:
        kvm.trace(TlbsDirtyRaised(kvm.tlbs_dirty))


def paging_sync_page(vcpu: Vcpu, sp: ShadowPage) -> Operation[bool]:
    """Bring the entries of a page of level 1 in line with its guest table (FNAME(sync_page)). Under mmu_lock.

    Entries whose guest entry is gone, unused or maps another frame are dropped, the flush being put off; rights of the
    others are adjusted. Nothing new is mapped. Returns whether the page should be zapped: the table cannot be read
    without sleeping, or no entry is left.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    gfmt = mmu.fmt
    fmt = kvm.spte_format
    spt = sp.spt
    slot = kvm.visible_memslot(sp.gfn)
    nr_present = 0
    dropped = False
    inherited = sp.access if kvm.profile.inherited_in_sync else ACC_ALL  # bug B28
    base = 0
    entries = None
    if slot is not None:
        base = sp.gfn - slot.base_gfn << 12
        if gfmt.entry_size == 8:
            base >>= 3
            entries = slot.words
        else:
            base >>= 2
            if kvm.profile.quadrant_sync:  # bug B29 without it
                base += sp.quadrant << 9
            entries = slot.dwords
    for index in sorted([index for index, spte in spt.items() if spte] if kvm.bypass_guest_pf else spt):
        kvm.work.sptes_synced += 1
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        if slot is None or entries is None or sp.gfn + slot.hva_delta & slot.host_mask in kvm.host.absent:
            return True
        gpte = entries[base + index]
        if kvm.point_gpte_read:
            yield Point.GPTE_READ
        gfn = (gpte & gfmt.base_addr_mask) >> 12
        if gpte & mmu.valid_gpte_test != mmu.valid_gpte:
            kvm.notrap.on_sync += drop_invalid_gpte(vcpu, sp, index, gpte)
            _dropped_without_flush(kvm)
            dropped = True
            continue
        access = inherited & gpte_access(mmu, gpte, True)
        spte = spt[index]
        if spte & fmt.mmio_mask == fmt.mmio_mask:
            if fmt.mmio_gfn(spte) != gfn:
                del spt[index]
            else:
                nr_present += 1
                if kvm.tracepoints is not None:
                    shown = access & (ACC_WRITE_MASK | ACC_USER_MASK)
                    kvm.tracepoints.mark_mmio_spte(sp.hpa + (index << 3), gfn, shown)
                spt[index] = fmt.mmio_spte(gfn, access)
            continue
        if gfn != sp.gfns[index]:
            drop_spte(kvm, sp, index)
            _dropped_without_flush(kvm)
            dropped = True
            continue
        nr_present += 1
        pfn = (spte & PT64_BASE_ADDR_MASK) >> 12
        host_writable = spte & SPTE_HOST_WRITEABLE != 0
        target = kvm.gfn_to_memslot(gfn)
        yield from set_spte(
            vcpu, sp, index, target, access, False, False, 1, gfn, pfn, True, False, host_writable
        )
    if dropped and kvm.profile.sync_flush_now:
        yield from kvm_flush_remote_tlbs(kvm)
    return nr_present == 0


def paging_update_pte(vcpu: Vcpu, sp: ShadowPage, index: int, gpte: int) -> Operation[None]:
    """Map the new value of a guest entry that was just written, speculatively (FNAME(update_pte)). Under mmu_lock.

    Leaves the shadow entry empty if the guest entry is invalid or unused, or the frame is not at hand.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    if gpte & mmu.valid_gpte_test != mmu.valid_gpte:
        kvm.notrap.on_pte_write += drop_invalid_gpte(vcpu, sp, index, gpte)
        return
    access = gpte_access(mmu, gpte, True)
    if kvm.profile.inherited_in_pte_write:  # bug B28 without it
        access &= sp.access
    gfn = (gpte & mmu.fmt.base_addr_mask) >> 12
    slot = kvm.visible_memslot(gfn)
    pfn = NO_SLOT_PFN if slot is None else kvm.host.atomic_pfn(slot, gfn)
    if pfn != BAD_PFN and (slot is not None or kvm.mmio_sptes):
        yield from mmu_set_spte(vcpu, sp, index, slot, access, False, False, 1, gfn, pfn, True, True)
