"""Finding or making the shadow page for a guest table (kvm_mmu_get_page). Under mmu_lock unless it takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.constants import KVM_REQ_MMU_SYNC
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_list import pte_list_add, pte_list_remove
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import rmap_write_protect
from shadowmmu.kvm.role import page_role
from shadowmmu.kvm.sync import kvm_sync_page_transient, kvm_sync_pages, write_protect_needs_flush
from shadowmmu.kvm.unsync import kvm_mmu_mark_parents_unsync
from shadowmmu.kvm.zap import account_shadowed, kvm_mmu_commit_zap_page, kvm_mmu_prepare_zap_page
from shadowmmu.protocol.events import ShadowPageCreated

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "kvm_mmu_get_page",
    "kvm_mmu_put_page",
    "kvm_mmu_unprotect_page",
    "kvm_mmu_unprotect_page_virt",
    "kvm_pv_mmu_op_release_pt",
    "shadow_page_role",
]


def shadow_page_role(vcpu: Vcpu, gaddr: int, level: int, direct: bool, access: int) -> int:
    """The role of the shadow page of `level` on this vCPU's way to address `gaddr`."""
    mmu = vcpu.mmu
    quadrant = 0
    if not mmu.direct_map and mmu.fmt.has_quadrants:
        quadrant = (gaddr >> (12 + 9 * level)) & ((1 << level) - 1)
    return page_role(mmu.base_role, level, quadrant, direct, access)


def kvm_mmu_get_page(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu,
    gfn: int,
    gaddr: int,
    level: int,
    direct: bool,
    access: int,
    parent: ShadowPage | None,
    index: int,
) -> Operation[ShadowPage]:
    """The shadow page of this vCPU's role for the guest table in frame `gfn`; made if there is none.

    `gaddr` is the address being mapped; entry `index` of `parent` (None for a root) is noted as a parent, not yet
    linked. A new page of a guest table is write-protected and empty. An unsync page that is found is synchronised and
    stays unsync; a page that has unsync ones below makes the vCPU synchronise before it enters the guest.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    role = shadow_page_role(vcpu, gaddr, level, direct, access)
    need_sync = False
    kvm.work.page_lookups += 1
    kvm.work.rmap_entries += 1
    for sp in reversed(kvm.mmu_page_hash.get(gfn, ())):
        need_sync |= sp.unsync
        if sp.role != role:
            continue
        if sp.unsync and (yield from kvm_sync_page_transient(vcpu, sp)):
            break
        if parent is not None:
            sp.parent_ptes, _ = pte_list_add(sp.parent_ptes, parent.hpa + (index << 3))
        if sp.unsync_children:
            # Bug A2 (link-before-sync): 3.1 leaves the pages below to the next entry of this vCPU alone. With the fix
            # whoever links the page synchronises it first, and roots are synchronised after they are loaded.
            if not kvm.profile.link_before_sync:
                vcpu.requests |= KVM_REQ_MMU_SYNC
            kvm_mmu_mark_parents_unsync(kvm, sp)
        elif sp.unsync:
            kvm_mmu_mark_parents_unsync(kvm, sp)
        if kvm.tracepoints is not None:
            kvm.tracepoints.kvm_mmu_get_page(sp, created=False)
        return sp
    kvm.stat.mmu_cache_miss += 1
    sp = kvm.new_shadow_page(gfn, role)
    if parent is not None:
        sp.parent_ptes = parent.hpa + (index << 3)
    kvm.page_header[sp.hpa] = sp
    kvm.active_mmu_pages[sp.hpa] = sp
    kvm.n_used_mmu_pages += 1
    kvm.mmu_page_hash.setdefault(gfn, []).append(sp)
    if not direct:
        protected = yield from rmap_write_protect(kvm, gfn)
        if write_protect_needs_flush(kvm, protected):  # bug A1
            yield from kvm_flush_remote_tlbs(kvm)
        if level > 1 and need_sync:
            yield from kvm_sync_pages(vcpu, gfn)
        account_shadowed(kvm, gfn, 1)
    if kvm.bypass_guest_pf:
        yield from mmu.context.prefetch_page(vcpu, sp)
    if kvm.trace is not None:
        kvm.trace(ShadowPageCreated(sp.serial, gfn, level, direct, role))
    if kvm.tracepoints is not None:
        kvm.tracepoints.kvm_mmu_get_page(sp, created=True)
    return sp


def kvm_mmu_put_page(sp: ShadowPage, parent: ShadowPage, index: int) -> None:
    """Undo the note of a parent that get_page made; the page stays, perhaps without parents."""
    sp.parent_ptes = pte_list_remove(sp.parent_ptes, parent.hpa + (index << 3))


def kvm_mmu_unprotect_page(kvm: Kvm, gfn: int) -> Operation[bool]:
    """Zap every shadow page of the guest table in `gfn`; returns whether there was one (mmu_unshadow)."""
    found = False
    invalid_list: list[ShadowPage] = []
    for sp in reversed(kvm.mmu_page_hash.get(gfn, ())):
        if not sp.direct and not sp.invalid:
            found = True
            yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
    return found


def kvm_mmu_unprotect_page_virt(vcpu: Vcpu, gva: int) -> Operation[bool]:
    """What a failed emulation does: unprotect the page of an address, so that the guest may try again.

    Translates as a supervisor read; nothing is injected if that fails. Returns whether a page was zapped. Takes
    mmu_lock.
    """
    if vcpu.mmu.direct_map:
        return False
    walk = yield from vcpu.mmu.context.gva_to_gpa(vcpu, gva, 0)
    if walk.fault is not None:
        return False
    yield Point.UNPROTECT_LOCK
    yield MmuLock.ACQUIRE
    found = yield from kvm_mmu_unprotect_page(vcpu.kvm, walk.gpa >> 12)
    yield MmuLock.RELEASE
    return found


def kvm_pv_mmu_op_release_pt(vcpu: Vcpu, gpa: int) -> Operation[int]:
    """The paravirtual "this frame is no page table any more"; returns 1. Takes mmu_lock."""
    yield Point.UNPROTECT_LOCK
    yield MmuLock.ACQUIRE
    yield from kvm_mmu_unprotect_page(vcpu.kvm, gpa >> 12)
    yield MmuLock.RELEASE
    return 1
