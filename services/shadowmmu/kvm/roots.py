"""Roots of shadow tables: loading them before a guest entry, giving them up.

A root page in use is counted (`root_count`) by each vCPU that has it loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT64_ROOT_LEVEL, PT_DIRECTORY_LEVEL, PT_PRESENT_MASK
from shadowmmu.kvm.constants import ACC_ALL, INVALID_PAGE, KVM_REQ_TRIPLE_FAULT
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pages import kvm_mmu_get_page
from shadowmmu.kvm.pdptrs import kvm_pdptr_read
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.sync import mmu_sync_roots
from shadowmmu.kvm.zap import kvm_mmu_commit_zap_page, kvm_mmu_free_some_pages, kvm_mmu_prepare_zap_page

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["has_single_root", "kvm_mmu_load", "mmu_free_roots", "root_pages"]


def has_single_root(vcpu: Vcpu) -> bool:
    """Whether the shadow table has one root of level 4, rather than four PAE root entries."""
    return vcpu.mmu.shadow_root_level == PT64_ROOT_LEVEL


def root_pages(vcpu: Vcpu) -> list[ShadowPage | None]:
    """The roots that are loaded: one, or four of which some may be absent (None); empty without a root."""
    mmu = vcpu.mmu
    page_header = vcpu.kvm.page_header
    if mmu.root_hpa == INVALID_PAGE:
        return []
    if has_single_root(vcpu):
        return [page_header[mmu.root_hpa]]
    return [
        None if root in (0, INVALID_PAGE) else page_header[root & PT64_BASE_ADDR_MASK]
        for root in mmu.pae_root
    ]


def _get_root(vcpu: Vcpu, gfn: int, gaddr: int, level: int, direct: bool) -> Operation[ShadowPage]:
    """One root page, counted, in a lock region of its own."""
    yield Point.LOAD_ROOT_LOCK
    yield MmuLock.ACQUIRE
    yield from kvm_mmu_free_some_pages(vcpu.kvm)
    sp = yield from kvm_mmu_get_page(vcpu, gfn, gaddr, level, direct, ACC_ALL, None, 0)
    sp.root_count += 1
    vcpu.mmu.loading_roots.append(sp)
    yield MmuLock.RELEASE
    return sp


def mmu_alloc_direct_roots(vcpu: Vcpu) -> Operation[bool]:
    """Roots of a direct map; never fails."""
    mmu = vcpu.mmu
    if mmu.shadow_root_level == PT64_ROOT_LEVEL:
        root = yield from _get_root(vcpu, 0, 0, PT64_ROOT_LEVEL, True)
        mmu.root_hpa = root.hpa
        mmu.loading_roots.clear()
        return True
    for i in range(4):
        root = yield from _get_root(vcpu, i << 18, i << 30, PT_DIRECTORY_LEVEL, True)
        mmu.pae_root[i] = root.hpa | PT_PRESENT_MASK
    mmu.root_hpa = 0
    mmu.loading_roots.clear()
    return True


def mmu_alloc_shadow_roots(vcpu: Vcpu) -> Operation[bool]:
    """Roots that follow the guest's; False (and a triple fault requested) if a guest root is in no slot.

    Bug A16 (pae-root-leak): in 3.1, if a later PAE root fails, those taken already keep their counts for ever. With the
    fix all PDPTEs are checked before a root is taken.
    """
    mmu = vcpu.mmu
    root_gfn = vcpu.cr3 >> 12
    if not mmu_check_root(vcpu, root_gfn):
        return False
    if mmu.root_level == PT64_ROOT_LEVEL:
        root = yield from _get_root(vcpu, root_gfn, 0, PT64_ROOT_LEVEL, False)
        mmu.root_hpa = root.hpa
        mmu.loading_roots.clear()
        return True
    pdptes: list[int] = []
    if mmu.fmt.has_pdptes and vcpu.kvm.profile.pae_root_leak:
        for i in range(4):
            pdptes.append((yield from kvm_pdptr_read(vcpu, i)))
            if pdptes[i] & PT_PRESENT_MASK and not mmu_check_root(vcpu, pdptes[i] >> 12):
                return False
    for i in range(4):
        if mmu.fmt.has_pdptes:
            pdpte = pdptes[i] if pdptes else (yield from kvm_pdptr_read(vcpu, i))
            if not pdpte & PT_PRESENT_MASK:
                mmu.pae_root[i] = 0
                continue
            root_gfn = pdpte >> 12
            if not pdptes and not mmu_check_root(vcpu, root_gfn):
                mmu.loading_roots.clear()
                return False
        root = yield from _get_root(vcpu, root_gfn, i << 30, PT_DIRECTORY_LEVEL, False)
        mmu.pae_root[i] = root.hpa | PT_PRESENT_MASK
    mmu.root_hpa = 0
    mmu.loading_roots.clear()
    return True


def mmu_check_root(vcpu: Vcpu, root_gfn: int) -> bool:
    """Whether the guest's root is in a slot (kvm_is_visible_gfn); if not, a triple fault is requested."""
    if vcpu.kvm.visible_memslot(root_gfn) is None:
        vcpu.requests |= KVM_REQ_TRIPLE_FAULT
        return False
    return True


def kvm_mmu_load(vcpu: Vcpu) -> Operation[bool]:
    """Load a root and synchronise below it; returns whether there is one now. The processor's TLB is then empty."""
    vcpu.kvm.work.root_loads += 1
    loaded = yield from vcpu.mmu.context.alloc_roots(vcpu)
    if not vcpu.kvm.profile.sync_on_load:  # bug B24 (in 3.1 kvm_mmu_get_page asks for it too)
        return loaded
    yield Point.LOAD_SYNC_LOCK
    yield MmuLock.ACQUIRE
    yield from mmu_sync_roots(vcpu)
    yield MmuLock.RELEASE
    return loaded


def mmu_free_roots(vcpu: Vcpu) -> Operation[None]:
    """Give the roots up; invalid ones that nobody else uses are freed (also kvm_mmu_unload)."""
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    if mmu.root_hpa == INVALID_PAGE:
        return
    yield Point.FREE_ROOTS_LOCK
    yield MmuLock.ACQUIRE
    invalid_list: list[ShadowPage] = []
    for sp in root_pages(vcpu):
        if sp is None:
            continue
        sp.root_count -= 1
        if not sp.root_count and sp.invalid:
            yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
    if not has_single_root(vcpu):
        mmu.pae_root = [INVALID_PAGE] * 4
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
    mmu.root_hpa = INVALID_PAGE
    yield MmuLock.RELEASE
