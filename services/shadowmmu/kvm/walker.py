"""The walk of the guest's page tables (FNAME(walk_addr)), for every format of guest entries.

Takes no lock and may sleep; guest tables may change under it. Accessed and dirty bits are set by compare-and-exchange,
and the walk starts again if an entry changed in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import (
    PAGE_OFFSET_MASK,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_NX_SHIFT,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    X86_CR0_WP,
    X86_CR4_SMEP,
)
from shadowmmu.kvm.constants import ACC_ALL, ACC_EXEC_MASK, ACC_WRITE_MASK, UNMAPPED_GVA
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.gpte import pse36_gfn_delta
from shadowmmu.kvm.host import break_cow, sleeping_lookup
from shadowmmu.kvm.pdptrs import kvm_pdptr_read
from shadowmmu.kvm.points import Point
from shadowmmu.protocol.events import GpteUpdate, Injected

if TYPE_CHECKING:
    from shadowmmu.kvm.memslots import KvmMemorySlot
    from shadowmmu.kvm.vcpu import Mmu, PagingUnit, Vcpu

__all__ = ["GuestWalker", "gpte_access", "inject_page_fault", "walk_addr"]


class GuestWalker:
    """What a walk found (struct guest_walker).

    Lists are indexed by level - 1. `fault` is the error code if the walk faulted, else None. `gfn` is the frame that
    the address maps to, `level` the level of the entry that maps it; `pt_access` the rights of all levels above it,
    `pte_access` those with it (ACC_*); `inherited_access` those of the levels above each. `prefetch_ptes` is filled by
    fetch. `nested_fault`: (address, error code) if it was the translation of a guest physical address that faulted (see
    `nested`), else None.
    """

    __slots__ = (
        "address",
        "fault",
        "gfn",
        "inherited_access",
        "level",
        "nested_fault",
        "prefetch_ptes",
        "pt_access",
        "pte_access",
        "pte_gpa",
        "ptes",
        "table_gfn",
    )

    def __init__(self, address: int) -> None:
        self.address = address
        self.fault: int | None = None
        self.nested_fault: tuple[int, int] | None = None
        self.gfn = 0
        self.level = 0
        self.table_gfn = [0, 0, 0, 0]
        self.pte_gpa = [0, 0, 0, 0]
        self.ptes = [0, 0, 0, 0]
        self.inherited_access = [ACC_ALL, ACC_ALL, ACC_ALL, ACC_ALL]
        self.pt_access = ACC_ALL
        self.pte_access = ACC_ALL
        self.prefetch_ptes: list[int] = []

    @property
    def gpa(self) -> int:
        """The guest physical address, UNMAPPED_GVA after a fault."""
        if self.fault is not None or self.nested_fault is not None:
            return UNMAPPED_GVA
        return self.gfn << 12 | self.address & PAGE_OFFSET_MASK


def gpte_access(mmu: Mmu, gpte: int, last: bool) -> int:
    """The rights (ACC_*) that a guest entry gives; the `last` one gives no write access while its D bit is clear."""
    access = gpte & (PT_WRITABLE_MASK | PT_USER_MASK) | ACC_EXEC_MASK
    if last and not gpte & PT_DIRTY_MASK:
        access &= ~ACC_WRITE_MASK
    if mmu.nx:
        access &= ~(gpte >> PT64_NX_SHIFT)
    return access


def inject_page_fault(vcpu: Vcpu, error_code: int, address: int) -> None:
    """Queue a page fault for the guest; its CR2 gets the address (bytes)."""
    vcpu.kvm.stat.pf_guest += 1
    vcpu.cr2 = address
    vcpu.exception = (error_code, address)
    if vcpu.kvm.trace is not None:
        vcpu.kvm.trace(Injected(vcpu.vcpu_id, error_code, address))


def walk_addr(vcpu: PagingUnit, address: int, access: int) -> Operation[GuestWalker]:
    """Walk the guest's tables for an access of kind `access` (PFERR_WRITE, _USER, _FETCH bits).

    Rights are checked level by level, but a lack of them ends the walk only after the last level: not-present and
    reserved-bit faults win. A is set in each entry up to the first that lacks a right, D in the last one for a write.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    fmt = mmu.fmt
    host = kvm.host
    tracepoints = kvm.tracepoints
    write = access & PFERR_WRITE_MASK
    user = access & PFERR_USER_MASK
    fetch = access & PFERR_FETCH_MASK and fmt.has_nx
    # 3.1 means this, but looks at a variable that has no value yet.
    smep = access & PFERR_FETCH_MASK and not user and vcpu.cr4 & X86_CR4_SMEP
    entry_size = fmt.entry_size
    level_bits = fmt.level_bits
    base_addr_mask = fmt.base_addr_mask
    rsvd_small, rsvd_large = mmu.rsvd_bits_mask
    translate = mmu.translate_gpa
    walker = GuestWalker(address)
    table_gfns, pte_gpas, ptes = walker.table_gfn, walker.pte_gpa, walker.ptes
    inherited_access = walker.inherited_access
    if tracepoints is not None:
        pferr = access & (PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK)
        tracepoints.kvm_mmu_pagetable_walk(vcpu.vcpu_id, address, pferr)
    while True:  # each turn is one walk; it starts again if an entry changes under it
        pt_access = ACC_ALL
        error = PFERR_PRESENT_MASK
        denied = False
        lost = False
        level = fmt.top_level
        pte = vcpu.cr3
        if fmt.has_pdptes:
            pte = yield from kvm_pdptr_read(vcpu, address >> 30 & 3)
            if tracepoints is not None:
                tracepoints.kvm_mmu_paging_element(vcpu.vcpu_id, pte, fmt.root_level)
            if not pte & PT_PRESENT_MASK:
                error = 0
                break
        while True:
            index = address >> (12 + level_bits * (level - 1)) & fmt.index_mask
            table_gfn = (pte & base_addr_mask) >> 12
            pte_gpa = (table_gfn << 12) + index * entry_size
            table_gfns[level - 1] = table_gfn
            pte_gpas[level - 1] = pte_gpa
            if translate is not None:
                real = yield from translate(table_gfn << 12, PFERR_USER_MASK | PFERR_WRITE_MASK)
                if real.fault is not None:
                    walker.nested_fault = table_gfn << 12, real.fault
                    error = 0
                    break
                table_gfn = real.gfn
                pte_gpa = (table_gfn << 12) + index * entry_size
            if kvm.point_read_guest_memory:
                yield Point.READ_GUEST_MEMORY
            slot = kvm.visible_memslot(table_gfn)
            if slot is None:
                error = 0
                break
            if host.absent:
                yield from sleeping_lookup(kvm, slot, table_gfn)
            kvm.work.guest_walk_levels += 1
            offset = pte_gpa - (slot.base_gfn << 12)
            pte = slot.words[offset >> 3] if entry_size == 8 else slot.dwords[offset >> 2]
            if tracepoints is not None:
                tracepoints.kvm_mmu_paging_element(vcpu.vcpu_id, pte, level)
            if not pte & PT_PRESENT_MASK:
                error = 0
                break
            if pte & (rsvd_large if pte & PT_PAGE_SIZE_MASK else rsvd_small)[level - 1]:
                error = PFERR_PRESENT_MASK | PFERR_RSVD_MASK
                break
            if write and not pte & PT_WRITABLE_MASK and (user or vcpu.cr0 & X86_CR0_WP):
                denied = True
            if user and not pte & PT_USER_MASK:
                denied = True
            if fetch and pte >> PT64_NX_SHIFT:
                denied = True
            last = level == 1 or (pte & PT_PAGE_SIZE_MASK and mmu.large_levels >> level & 1)
            if smep and last and pt_access & pte & PT_USER_MASK:
                denied = True
            if not pte & PT_ACCESSED_MASK and not denied:
                if tracepoints is not None:
                    tracepoints.kvm_mmu_set_accessed_bit(vcpu.vcpu_id, pte_gpas[level - 1])
                if not (yield from _cmpxchg_gpte(vcpu, slot, pte_gpa, pte, pte | PT_ACCESSED_MASK)):
                    lost = True
                    break
                pte |= PT_ACCESSED_MASK
            ptes[level - 1] = pte
            if last:
                if denied:
                    break
                shift = 12 + level_bits * (level - 1)
                page_mask = (1 << shift) - 1
                gfn = (pte & base_addr_mask & ~page_mask) + (address & page_mask) >> 12
                if level > 1 and fmt.large_needs_pse:
                    gfn += pse36_gfn_delta(pte)
                if translate is not None:
                    real = yield from translate(gfn << 12, access)
                    if real.fault is not None:
                        walker.nested_fault = gfn << 12, real.fault
                        return walker
                    gfn = real.gfn
                if write and not pte & PT_DIRTY_MASK:
                    if tracepoints is not None:
                        tracepoints.kvm_mmu_set_dirty_bit(vcpu.vcpu_id, pte_gpas[level - 1])
                    if not (yield from _cmpxchg_gpte(vcpu, slot, pte_gpa, pte, pte | PT_DIRTY_MASK)):
                        lost = True
                        break
                    pte |= PT_DIRTY_MASK
                    ptes[level - 1] = pte
                walker.gfn = gfn
                walker.level = level
                walker.pt_access = pt_access
                walker.pte_access = pt_access & gpte_access(mmu, pte, True)
                walker.fault = None
                return walker
            pt_access &= gpte_access(mmu, pte, False)
            level -= 1
            inherited_access[level - 1] = pt_access
            yield Point.WALK_LEVEL
        if not lost:
            break
    walker.level = level
    reports_fetch = access & PFERR_FETCH_MASK and (mmu.nx or vcpu.cr4 & X86_CR4_SMEP)
    walker.fault = error | write | user | (PFERR_FETCH_MASK if reports_fetch else 0)
    if tracepoints is not None:
        tracepoints.kvm_mmu_walker_error(vcpu.vcpu_id, walker.fault)
    return walker


def _cmpxchg_gpte(vcpu: PagingUnit, slot: KvmMemorySlot, pte_gpa: int, old: int, new: int) -> Operation[bool]:
    """Set A or D in a guest entry; returns False if it is no longer `old`. Looks its frame up for write."""
    kvm = vcpu.kvm
    gfn = pte_gpa >> 12
    yield Point.WALK_CMPXCHG
    if kvm.host.absent:
        kvm.host.fault_in(slot, gfn)
    if kvm.host.readonly:
        yield from break_cow(kvm, slot, gfn)
    size = vcpu.mmu.fmt.entry_size
    if kvm.memory.read_in(slot, pte_gpa, size) != old:
        return False
    kvm.memory.write_in(slot, pte_gpa, size, new)
    if slot.dirty_bitmap is not None:
        slot.dirty_bitmap.add(gfn)
    if kvm.trace is not None:
        kvm.trace(GpteUpdate(vcpu.vcpu_id, pte_gpa, size, new))
    return True
