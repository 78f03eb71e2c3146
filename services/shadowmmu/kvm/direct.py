"""Direct maps: shadow tables that follow no guest table.

They serve guests whose paging is off, and all guests with two-dimensional paging, where the processor walks the guest's
tables itself. Also the direct pages that split a guest's large page into smaller host pages are prefetched here
(nonpaging_map, tdp_page_fault, __direct_map, __direct_pte_prefetch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import (
    PAGE_MASK,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
    PT64_BASE_ADDR_MASK,
    PT_DIRECTORY_LEVEL,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
)
from shadowmmu.kvm.constants import (
    ACC_ALL,
    ACC_WRITE_MASK,
    MAX_PAGE_TABLE_LEVELS,
    PTE_PREFETCH_NUM,
    kvm_pages_per_hpage,
)
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.host import gfn_to_pfn_prot
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.mapping_level import mapping_level, mapping_level_dirty_bitmap, transparent_hugepage_adjust
from shadowmmu.kvm.mmio import handle_mmio_page_fault, vcpu_cache_mmio_info
from shadowmmu.kvm.notifiers import mmu_notifier_retry
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pages import kvm_mmu_get_page
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.set_spte import NO_SLOT_PFN, mmu_set_spte
from shadowmmu.kvm.shadow_walk import shadow_walk_init
from shadowmmu.kvm.zap import kvm_mmu_free_some_pages

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["direct_pte_prefetch", "nonpaging_page_fault", "tdp_page_fault"]


def nonpaging_page_fault(vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
    """A page fault of a guest whose paging is off: map the frame of the address. Returns 1 to emulate, 0 to go on."""
    # The root is a PAE table, which has no entries of 1 GiB.
    return _direct_page_fault(vcpu, gva, error_code, prefault, PT_DIRECTORY_LEVEL, gva & PAGE_MASK)


def tdp_page_fault(vcpu: Vcpu, gpa: int, error_code: int, prefault: bool) -> Operation[int]:
    """A violation with two-dimensional paging: map the frame of the guest physical address. Returns as the above."""
    return _direct_page_fault(vcpu, gpa, error_code, prefault, MAX_PAGE_TABLE_LEVELS, 0)


def _direct_page_fault(  # noqa: PLR0917 - the one caller is one of two lines
    vcpu: Vcpu, gpa: int, error_code: int, prefault: bool, max_level: int, mmio_gva: int
) -> Operation[int]:
    """Map the frame of `gpa` by an entry of at most `max_level`; `mmio_gva` is what the MMIO cache notes for it."""
    kvm = vcpu.kvm
    if error_code & PFERR_RSVD_MASK and kvm.mmio_sptes:
        return handle_mmio_page_fault(vcpu, gpa, direct=True)
    write = error_code & PFERR_WRITE_MASK != 0
    gfn = gpa >> 12
    force_pt_level = mapping_level_dirty_bitmap(kvm, gfn)
    level = 1
    if not force_pt_level:
        level = min(mapping_level(kvm, gfn), max_level)
        gfn &= -kvm_pages_per_hpage(level)
    seq = kvm.mmu_notifier_seq
    yield Point.DIRECT_GFN_TO_PFN
    pfn, map_writable = yield from gfn_to_pfn_prot(kvm, gfn, write)
    if not kvm.profile.notifier_retry_late_seq:  # bug B19
        yield Point.LATE_SEQ
        seq = kvm.mmu_notifier_seq
    if pfn == NO_SLOT_PFN:
        vcpu_cache_mmio_info(vcpu, mmio_gva, gfn, ACC_ALL)
        if not kvm.mmio_sptes:
            return 1
    yield Point.DIRECT_BEFORE_LOCK
    yield MmuLock.ACQUIRE
    emulate = False
    if not mmu_notifier_retry(kvm, seq):
        yield from kvm_mmu_free_some_pages(kvm)
        if not force_pt_level:
            gfn, pfn, level = transparent_hugepage_adjust(kvm, gfn, pfn, level)
        emulate = yield from direct_map(vcpu, write, map_writable, level, gfn, pfn, prefault)
    yield MmuLock.RELEASE
    return int(emulate)


def direct_map(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu, write: bool, map_writable: bool, level: int, gfn: int, pfn: int, prefault: bool
) -> Operation[bool]:
    """Map `gfn` at its own address by an entry of `level`; returns whether to emulate (source: __direct_map).

    A large entry met above that level ends the walk with nothing done.
    """
    kvm = vcpu.kvm
    fmt = kvm.spte_format
    address = gfn << 12
    sp, at = shadow_walk_init(vcpu, address)
    while sp is not None:
        index = address >> (12 + 9 * (at - 1)) & 511
        if at == level:
            emulate = yield from mmu_set_spte(
                vcpu,
                sp,
                index,
                None if pfn == NO_SLOT_PFN else kvm.gfn_to_memslot(gfn),
                ACC_ALL,
                False,
                write,
                level,
                gfn,
                pfn,
                prefault,
                map_writable,
            )
            if fmt.accessed_mask and level == 1:
                yield from direct_pte_prefetch(vcpu, sp, index)
            kvm.stat.pf_fixed += 1
            return emulate
        spte = sp.spt.get(index, 0)
        if spte & fmt.present_test != PT_PRESENT_MASK:
            base = gfn & -kvm_pages_per_hpage(at)
            child = yield from kvm_mmu_get_page(vcpu, base, address, at - 1, True, ACC_ALL, sp, index)
            sp.spt[index] = spte = child.hpa | fmt.direct_link_bits
        elif spte & PT_PAGE_SIZE_MASK:
            return False
        sp = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        at -= 1
    return False


def direct_pte_prefetch(vcpu: Vcpu, sp: ShadowPage, index: int) -> Operation[None]:
    """Map the empty neighbours of entry `index` in its aligned group of eight.

    Runs of empty entries that a used one, or the faulting one, ends are mapped; a run that reaches the end of the
    group is not (a quirk).
    """
    present_test = vcpu.kvm.spte_format.present_test
    first = index & -PTE_PREFETCH_NUM
    start = -1
    for i in range(first, first + PTE_PREFETCH_NUM):
        if i == index or sp.spt.get(i, 0) & present_test == PT_PRESENT_MASK:
            if start >= 0 and not (yield from _direct_pte_prefetch_many(vcpu, sp, start, i)):
                return
            start = -1
        elif start < 0:
            start = i


def _direct_pte_prefetch_many(vcpu: Vcpu, sp: ShadowPage, start: int, end: int) -> Operation[bool]:
    """Map entries `start` to `end` - 1 up to the first frame not at hand; False if not even the first could be."""
    kvm = vcpu.kvm
    access = sp.access
    gfn = sp.get_gfn(start)
    slot = kvm.visible_memslot(gfn)
    if slot is None or (access & ACC_WRITE_MASK and slot.dirty_bitmap is not None):
        return False
    if gfn + end - start > slot.end_gfn:
        return False
    pfns = []
    for i in range(gfn, gfn + end - start):
        pfn = kvm.host.atomic_pfn(slot, i)
        if pfn == BAD_PFN:
            break
        pfns.append(pfn)
    for offset, pfn in enumerate(pfns):
        yield from mmu_set_spte(
            vcpu, sp, start + offset, slot, access, False, False, 1, gfn + offset, pfn, True, True
        )
    return bool(pfns)
