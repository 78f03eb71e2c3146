"""Building the shadow of one guest walk, down to the entry that maps the address, and prefetching its neighbours.

Under mmu_lock. The guest may change its tables at any moment until they are write-protected. So each table is
protected first (get_page), then the entry that the walk had read from it is read again, and only if it is unchanged is
the shadow table linked (FNAME(fetch), FNAME(gpte_changed), FNAME(pte_prefetch)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.constants import ACC_ALL, ACC_WRITE_MASK, PTE_PREFETCH_NUM, kvm_pages_per_hpage
from shadowmmu.kvm.direct import direct_pte_prefetch
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.notrap import drop_invalid_gpte
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pages import kvm_mmu_get_page, kvm_mmu_put_page, shadow_page_role
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


def change_is_noticed(kvm: Kvm, walker: GuestWalker, level: int, is_new: bool) -> bool:
    """Whether a guest entry that has changed since the walk makes fetch give up: always, but for bugs B5 and B6.

    `is_new`: the page that shadows its table was made just now.
    """
    profile = kvm.profile
    if level == walker.level:
        return profile.fetch_revalidate_leaf and (is_new or profile.fetch_revalidate_leaf_existing)
    return is_new or profile.fetch_revalidate_all


def large_gpte_gfn(vcpu: Vcpu, walker: GuestWalker) -> int:
    """The first frame of a guest's large page as its entry has it, without PSE36 (only with bug B14)."""
    fmt = vcpu.mmu.fmt
    page_mask = (1 << 12 + fmt.level_bits * (walker.level - 1)) - 1
    return (walker.ptes[walker.level - 1] & fmt.base_addr_mask & ~page_mask) >> 12


def drop_large_spte(kvm: Kvm, sp: ShadowPage, index: int) -> Operation[None]:
    """If the entry maps a large page, drop it and flush all TLBs: a table is to take its place."""
    if sp.spt.get(index, 0) & PT_PAGE_SIZE_MASK:
        drop_spte(kvm, sp, index)
        if kvm.profile.large_to_normal:  # bug B10 without it
            yield from kvm_flush_remote_tlbs(kvm)


def is_unexpected(  # noqa: PLR0917 - what a child is
    vcpu: Vcpu, child: ShadowPage, address: int, gfn: int, direct: bool, access: int
) -> bool:
    """Whether a page found on the way to `address` does not stand for `gfn` in the role that the walk needs.

    Bugs A8 (unexpected-gfn), A9 (unexpected-role): 3.1 does not ask. The guest's table may have changed behind KVM's
    back, or by an emulated store of which kvm_mmu_pte_write has not heard yet.
    """
    profile = vcpu.kvm.profile
    if profile.unexpected_gfn and child.gfn != gfn:
        return True
    return profile.unexpected_role and child.role != shadow_page_role(
        vcpu, address, child.level, direct, access
    )


def unlink(kvm: Kvm, sp: ShadowPage, index: int, child: ShadowPage) -> Operation[None]:
    """Take a page that is not the right one out of the entry, and flush all TLBs."""
    drop_parent_pte(child, sp, index)
    yield from kvm_flush_remote_tlbs(kvm)


def validate_direct_spte(  # noqa: PLR0917 - what a child is
    vcpu: Vcpu, sp: ShadowPage, index: int, address: int, first_gfn: int, direct_access: int
) -> Operation[None]:
    """Unlink a direct page that gives other rights than the guest's large entry does now (or is not what it maps)."""
    kvm = vcpu.kvm
    if not kvm.profile.direct_sp_access:  # bug B13
        return
    spte = sp.spt.get(index, 0)
    if spte & kvm.spte_format.present_test == PT_PRESENT_MASK and not spte & PT_PAGE_SIZE_MASK:
        child = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        if child.access != direct_access or is_unexpected(
            vcpu, child, address, first_gfn, True, direct_access
        ):
            yield from unlink(kvm, sp, index, child)


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
    """
    kvm = vcpu.kvm
    profile = kvm.profile
    address = walker.address
    access = walker.pt_access
    # Bug B13 (direct-sp-access-leaf): a direct page that read-only and writable large entries share.
    direct_access = walker.pte_access if profile.direct_sp_access_leaf else walker.pt_access
    present_test = kvm.spte_format.present_test
    gw_level = walker.level
    if kvm.point_read_guest_memory:
        yield Point.READ_GUEST_MEMORY
    top_level = vcpu.mmu.fmt.top_level
    if gpte_changed(vcpu, walker, top_level) and change_is_noticed(kvm, walker, top_level, is_new=False):
        return False
    sp, level = shadow_walk_init(vcpu, address)
    if sp is None:
        # No root, or an absent PAE root entry whose PDPTE became present without a CR3 load: 3.1 would use an
        # uninitialised pointer here.
        return False
    index = address >> (12 + 9 * (level - 1)) & 511
    while level > gw_level:
        child: ShadowPage | None = None
        changed: bool | None = None
        spte = sp.spt.get(index, 0)
        if spte & PT_PAGE_SIZE_MASK:
            yield from drop_large_spte(kvm, sp, index)
            spte = 0
        table_gfn = walker.table_gfn[level - 2]
        if profile.inherited_perms:
            # Bug A3: 3.1 gives every page the rights of all levels above the last entry, those below it too.
            access = walker.inherited_access[level - 2]
        if spte & present_test == PT_PRESENT_MASK:
            existing = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
            if is_unexpected(vcpu, existing, address, table_gfn, False, access):  # bugs A8, A9
                yield from unlink(kvm, sp, index, existing)
                spte = 0
        if spte & present_test != PT_PRESENT_MASK:
            if not profile.read_before_wp:  # bug B7: the guest can still change the entry after this
                changed = gpte_changed(vcpu, walker, level - 1)
                if kvm.point_gpte_read:
                    yield Point.GPTE_READ
            child = yield from kvm_mmu_get_page(vcpu, table_gfn, address, level - 1, False, access, sp, index)
            if profile.link_before_sync and child.unsync_children:
                # Bug A2: 3.1 links first and lets the next guest entry of this vCPU alone synchronise.
                yield from mmu_sync_children(vcpu, child, may_resched=False)
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        if changed is None:
            changed = gpte_changed(vcpu, walker, level - 1)
        if changed and change_is_noticed(kvm, walker, level - 1, child is not None):
            if child is not None and profile.unreachable_child:  # bug B26 without it
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
        first_gfn = walker.gfn & -kvm_pages_per_hpage(level)
        if not profile.direct_gfn:  # bug B14: which part of the large page it is gets lost
            first_gfn = large_gpte_gfn(vcpu, walker)
        yield from validate_direct_spte(vcpu, sp, index, address, first_gfn, direct_access)
        yield from drop_large_spte(kvm, sp, index)
        spte = sp.spt.get(index, 0)
        if spte & present_test == PT_PRESENT_MASK:
            sp = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        else:
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
        walker.pte_access,
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
    valid_gpte_test, valid_gpte = mmu.valid_gpte_test, mmu.valid_gpte
    inherited = sp.access if kvm.profile.inherited_in_prefetch else ACC_ALL  # bug B28
    base_addr_mask = mmu.fmt.base_addr_mask
    first = index & -PTE_PREFETCH_NUM
    for i, gpte in enumerate(gptes, first):
        spte = spt.get(i, 0)
        if i == index or spte & present_test == PT_PRESENT_MASK or (bypass and i in spt):
            continue
        if gpte & valid_gpte_test != valid_gpte:
            if spte or bypass:
                kvm.notrap.on_prefetch += drop_invalid_gpte(vcpu, sp, i, gpte)
            continue
        access = inherited & gpte_access(mmu, gpte, True)
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
