"""Building the shadow of one guest walk, down to the entry that maps the address, and prefetching its neighbours.

Under mmu_lock. The guest may change its tables at any moment until they are write-protected. So each table is
protected first (get_page), then the entry that the walk had read from it is read again, and only if it is unchanged is
the shadow table linked (FNAME(fetch), FNAME(gpte_changed), FNAME(pte_prefetch)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_ACCESSED_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.constants import ACC_WRITE_MASK, PTE_PREFETCH_NUM, kvm_pages_per_hpage
from shadowmmu.kvm.direct import direct_pte_prefetch
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.notrap import drop_invalid_gpte
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pages import kvm_mmu_get_page, kvm_mmu_put_page
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import drop_parent_pte, drop_spte
from shadowmmu.kvm.set_spte import NO_SLOT_PFN, mmu_set_spte
from shadowmmu.kvm.shadow_walk import shadow_walk_init
from shadowmmu.kvm.sync import mmu_sync_children
from shadowmmu.kvm.walker import GuestWalker, gpte_access

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["drop_large_spte", "fetch", "link_shadow_page"]


def gpte_changed(vcpu: Vcpu, walker: GuestWalker, level: int) -> bool:
    """Whether the guest entry of `level` differs from what the walk read, or cannot be read without sleeping.

    At level 1 the aligned group of eight entries is read and kept for prefetching. (The memory point before the read
    is the caller's.)
    """
    kvm = vcpu.kvm
    pte_gpa = walker.pte_gpa[level - 1]
    gfn = pte_gpa >> 12
    slot = kvm.visible_memslot(gfn)
    if slot is None or gfn + slot.hva_delta & slot.host_mask in kvm.host.absent:
        return True
    offset = pte_gpa - (slot.base_gfn << 12)
    if vcpu.mmu.fmt.entry_size == 8:
        entries, index = slot.words, offset >> 3
    else:
        entries, index = slot.dwords, offset >> 2
    if level == 1:
        first = index & -PTE_PREFETCH_NUM
        walker.prefetch_ptes = entries[first : first + PTE_PREFETCH_NUM].tolist()
    return entries[index] != walker.ptes[level - 1]


def drop_large_spte(kvm: Kvm, sp: ShadowPage, index: int) -> Operation[None]:
    """If the entry maps a large page, drop it and flush all TLBs: a table is to take its place."""
    if sp.spt.get(index, 0) & PT_PAGE_SIZE_MASK:
        drop_spte(kvm, sp, index)
        yield from kvm_flush_remote_tlbs(kvm)


def validate_direct_spte(kvm: Kvm, sp: ShadowPage, index: int, direct_access: int) -> Operation[None]:
    """Unlink a direct page that gives other rights than the guest's large entry does now."""
    spte = sp.spt.get(index, 0)
    if spte & kvm.spte_format.present_test == PT_PRESENT_MASK and not spte & PT_PAGE_SIZE_MASK:
        child = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        if child.access != direct_access:
            drop_parent_pte(child, sp, index)
            yield from kvm_flush_remote_tlbs(kvm)


def link_shadow_page(kvm: Kvm, sp: ShadowPage, index: int, child: ShadowPage) -> None:
    """Let the entry lead to a table; what it allows, the entries below restrict."""
    sp.spt[index] = child.hpa | kvm.spte_format.link_bits


def fetch(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu,
    walker: GuestWalker,
    user_fault: bool,
    write_fault: bool,
    hlevel: int,
    pfn: int,
    map_writable: bool,
    prefault: bool,
) -> Operation[bool]:
    """Map `walker.gfn` to `pfn` by an entry of level `hlevel`; returns whether the access must be emulated.

    Gives up quietly (the access is then tried again) if a guest table changed since the walk.

    All indirect pages get the rights of the whole walk above the last entry, also of levels below them (bug A3).
    """
    kvm = vcpu.kvm
    address = walker.address
    access = walker.pt_access
    direct_access = walker.pte_access
    present_test = kvm.spte_format.present_test
    gw_level = walker.level
    if kvm.point_read_guest_memory:
        yield Point.READ_GUEST_MEMORY
    if gpte_changed(vcpu, walker, vcpu.mmu.fmt.top_level):
        return False
    sp, level = shadow_walk_init(vcpu, address)
    if sp is None:
        # No root, or an absent PAE root entry whose PDPTE became present without a CR3 load: 3.1 would use an
        # uninitialised pointer here.
        return False
    index = address >> (12 + 9 * (level - 1)) & 511
    while level > gw_level:
        child: ShadowPage | None = None
        spte = sp.spt.get(index, 0)
        if spte & PT_PAGE_SIZE_MASK:
            yield from drop_large_spte(kvm, sp, index)
            spte = 0
        if spte & present_test != PT_PRESENT_MASK:
            child = yield from kvm_mmu_get_page(
                vcpu, walker.table_gfn[level - 2], address, level - 1, False, access, sp, index
            )
            if kvm.profile.link_before_sync and child.unsync_children:
                # Bug A2: 3.1 links first and lets the next guest entry of this vCPU alone synchronise.
                yield from mmu_sync_children(vcpu, child, may_resched=False)
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        if gpte_changed(vcpu, walker, level - 1):
            if child is not None:
                kvm_mmu_put_page(child, sp, index)
            return False
        if child is None:
            child = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        else:
            if kvm.point_gpte_read:
                yield Point.GPTE_READ
            link_shadow_page(kvm, sp, index, child)
        sp = child
        level -= 1
        index = address >> (12 + 9 * (level - 1)) & 511
    while level > hlevel:
        yield from validate_direct_spte(kvm, sp, index, direct_access)
        yield from drop_large_spte(kvm, sp, index)
        spte = sp.spt.get(index, 0)
        if spte & present_test == PT_PRESENT_MASK:
            sp = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        else:
            first_gfn = walker.gfn & -kvm_pages_per_hpage(level)
            child = yield from kvm_mmu_get_page(
                vcpu, first_gfn, address, level - 1, True, direct_access, sp, index
            )
            link_shadow_page(kvm, sp, index, child)
            sp = child
        level -= 1
        index = address >> (12 + 9 * (level - 1)) & 511
    if kvm.point_gpte_read:
        yield Point.GPTE_READ
    emulate = yield from mmu_set_spte(
        vcpu,
        sp,
        index,
        None if pfn == NO_SLOT_PFN else kvm.gfn_to_memslot(walker.gfn),
        direct_access,
        user_fault,
        write_fault,
        level,
        walker.gfn,
        pfn,
        prefault,
        map_writable,
    )
    if level == 1:
        if sp.direct:
            yield from direct_pte_prefetch(vcpu, sp, index)
        else:
            yield from pte_prefetch(vcpu, sp, index, walker.prefetch_ptes)
    return emulate


def pte_prefetch(vcpu: Vcpu, sp: ShadowPage, index: int, gptes: list[int]) -> Operation[None]:
    """Map the neighbours of entry `index` in its aligned group of eight, as far as that needs no sleep.

    `gptes` are the group's guest entries. Entries that the guest has not used (A clear) are left; at the first frame
    that cannot be had at once, all stops. A writable mapping of a guest table makes that table unsync, here too.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    host = kvm.host
    bypass = kvm.bypass_guest_pf
    spt = sp.spt
    present_test = kvm.spte_format.present_test
    valid_gpte_test = mmu.valid_gpte_test
    base_addr_mask = mmu.fmt.base_addr_mask
    first = index & -PTE_PREFETCH_NUM
    for i, gpte in enumerate(gptes, first):
        spte = spt.get(i, 0)
        if i == index or spte & present_test == PT_PRESENT_MASK or (bypass and i in spt):
            continue
        if gpte & valid_gpte_test != PT_PRESENT_MASK | PT_ACCESSED_MASK:
            if spte or bypass:
                kvm.notrap.on_prefetch += drop_invalid_gpte(vcpu, sp, i, gpte)
            continue
        access = sp.access & gpte_access(mmu, gpte, True)
        gfn = (gpte & base_addr_mask) >> 12
        slot = kvm.visible_memslot(gfn)
        if slot is None or (slot.dirty_bitmap is not None and access & ACC_WRITE_MASK):
            return
        pfn = host.atomic_pfn(slot, gfn)
        if pfn == BAD_PFN:
            return
        if kvm.point_gpte_read:
            yield Point.GPTE_READ
        yield from mmu_set_spte(vcpu, sp, i, slot, access, False, False, 1, gfn, pfn, True, True)
