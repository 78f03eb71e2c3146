"""Synchronising shadow pages with their guest tables again. Under mmu_lock unless a function takes it.

`sync_page` itself belongs to the paging mode of the vCPU at work (`contexts`); here is what calls it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT64_ROOT_LEVEL
from shadowmmu.kvm.constants import INVALID_PAGE
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.mmio import vcpu_clear_mmio_info
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_mmu_flush_tlb
from shadowmmu.kvm.rmap import rmap_write_protect
from shadowmmu.kvm.role import ROLE_BASE_MASK
from shadowmmu.kvm.tracepoints import AuditPoint
from shadowmmu.kvm.unsync import PagePath, kvm_unlink_unsync_page, mmu_unsync_walk
from shadowmmu.kvm.zap import kvm_mmu_commit_zap_page, kvm_mmu_prepare_zap_page

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "kvm_mmu_sync_roots",
    "kvm_sync_page_transient",
    "kvm_sync_pages",
    "mmu_sync_children",
    "mmu_sync_roots",
    "write_protect_needs_flush",
]


def write_protect_needs_flush(kvm: Kvm, protected: bool) -> bool:
    """Whether the caller of rmap_write_protect must flush all TLBs.

    Bug A1 (tlbs-dirty-missed-wp): 3.1 flushes only if an entry lost write access. But an entry that sync_page dropped
    without a flush is in no reverse map, while a TLB may still hold it writable; tlbs_dirty says that there are such.
    """
    return protected or (kvm.profile.tlbs_dirty_missed_wp and kvm.tlbs_dirty != 0)


def kvm_sync_page(
    vcpu: Vcpu, sp: ShadowPage, invalid_list: list[ShadowPage], clear_unsync: bool
) -> Operation[bool]:
    """Bring a page in line with its guest table, or zap it if that fails; returns whether it was zapped.

    Without `clear_unsync` (the transient kind) it stays unsync.
    """
    kvm = vcpu.kvm
    if sp.cr4_pae == vcpu.is_pae:
        if clear_unsync and kvm.profile.selfref_sync:
            kvm_unlink_unsync_page(kvm, sp)
        if not (yield from vcpu.mmu.context.sync_page(vcpu, sp)):
            if clear_unsync and not kvm.profile.selfref_sync:
                # Bug B4: an entry that maps the page's own table may have been made as if it stayed unsync.
                kvm_unlink_unsync_page(kvm, sp)
            kvm_mmu_flush_tlb(vcpu)
            return False
    yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
    return True


def kvm_sync_page_transient(vcpu: Vcpu, sp: ShadowPage) -> Operation[bool]:
    """Synchronise a page that stays unsync; returns whether it had to be zapped."""
    invalid_list: list[ShadowPage] = []
    zapped = yield from kvm_sync_page(vcpu, sp, invalid_list, clear_unsync=False)
    yield from kvm_mmu_commit_zap_page(vcpu.kvm, invalid_list)
    return zapped


def kvm_sync_pages(vcpu: Vcpu, gfn: int) -> Operation[None]:
    """Synchronise every unsync page of `gfn`, write-protected already: it is shadowed at a higher level now."""
    kvm = vcpu.kvm
    invalid_list: list[ShadowPage] = []
    flush = False
    for sp in reversed(kvm.mmu_page_hash.get(gfn, ())):
        if not sp.unsync or sp.direct or sp.invalid:
            continue
        kvm_unlink_unsync_page(kvm, sp)
        # Bug A7 (sync-wrong-role): 3.1 reads the table as this vCPU's mode has it, whatever the page's role.
        other_role = kvm.profile.sync_wrong_role and (sp.role ^ vcpu.mmu.base_role) & ROLE_BASE_MASK
        if other_role or sp.cr4_pae != vcpu.is_pae or (yield from vcpu.mmu.context.sync_page(vcpu, sp)):
            yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
        else:
            flush = True
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
    if flush:
        kvm_mmu_flush_tlb(vcpu)


def mmu_sync_children(vcpu: Vcpu, parent: ShadowPage, may_resched: bool = True) -> Operation[None]:
    """Synchronise every unsync page below `parent`, 15 or so at a time.

    Between the rounds mmu_lock is dropped and taken again (cond_resched_lock), unless not `may_resched`, or nobody
    says that the time slice is over.
    """
    kvm = vcpu.kvm
    path = PagePath(parent)
    invalid_list: list[ShadowPage] = []
    while mmu_unsync_walk(kvm, parent, path):
        protected = False
        for sp in path.leaves():
            protected |= yield from rmap_write_protect(kvm, sp.gfn)
        if write_protect_needs_flush(kvm, protected):  # bug A1
            yield from kvm_flush_remote_tlbs(kvm)
        for sp in path.leaves():
            yield from kvm_sync_page(vcpu, sp, invalid_list, clear_unsync=True)
            path.clear_parents()
        yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
        if may_resched and kvm.need_resched:
            yield MmuLock.RELEASE
            yield Point.COND_RESCHED_LOCK
            yield MmuLock.ACQUIRE
        path.restart(parent)


def mmu_sync_roots(vcpu: Vcpu) -> Operation[None]:
    """Synchronise everything that this vCPU's root reaches."""
    mmu = vcpu.mmu
    kvm = vcpu.kvm
    if mmu.direct_map or mmu.root_hpa == INVALID_PAGE:
        return
    vcpu_clear_mmio_info(vcpu)
    if kvm.tracepoints is not None:
        kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.PRE_SYNC)
    if mmu.root_level == PT64_ROOT_LEVEL:
        yield from mmu_sync_children(vcpu, kvm.page_header[mmu.root_hpa])
    else:
        for i in range(4):
            root = mmu.pae_root[i]
            if root not in (0, INVALID_PAGE):
                yield from mmu_sync_children(vcpu, kvm.page_header[root & PT64_BASE_ADDR_MASK])
    if kvm.tracepoints is not None:
        kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.POST_SYNC)


def _may_be_unsync(vcpu: Vcpu) -> bool:
    """Whether the root seems to reach unsync pages, looked at without mmu_lock."""
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    if mmu.direct_map or mmu.root_hpa == INVALID_PAGE:
        return False
    vcpu_clear_mmio_info(vcpu)
    roots = [mmu.root_hpa] if mmu.root_level == PT64_ROOT_LEVEL else mmu.pae_root
    return any(
        kvm.page_header[root & PT64_BASE_ADDR_MASK].unsync_children
        for root in roots
        if root not in (0, INVALID_PAGE)
    )


def kvm_mmu_sync_roots(vcpu: Vcpu) -> Operation[None]:
    """mmu_sync_roots with mmu_lock taken."""
    if not vcpu.kvm.profile.lockless_sync_roots and not _may_be_unsync(vcpu):
        return  # bug C2
    yield Point.SYNC_ROOTS_LOCK
    yield MmuLock.ACQUIRE
    yield from mmu_sync_roots(vcpu)
    yield MmuLock.RELEASE
