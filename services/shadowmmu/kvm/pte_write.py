"""What KVM does when the guest writes a shadowed table and the store was emulated (kvm_mmu_pte_write)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PAGE_OFFSET_MASK, PT64_BASE_ADDR_MASK
from shadowmmu.kvm.constants import LAST_PT_WRITE_FLOOD
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_mmu_flush_tlb
from shadowmmu.kvm.role import ROLE_PTE_WRITE_MASK
from shadowmmu.kvm.spte import PT64_PERM_MASK
from shadowmmu.kvm.tracepoints import AuditPoint
from shadowmmu.kvm.zap import (
    kvm_mmu_commit_zap_page,
    kvm_mmu_free_some_pages,
    kvm_mmu_prepare_zap_page,
    mmu_page_zap_pte,
)

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_mmu_pte_write"]


def need_remote_flush(kvm: Kvm, old: int, new: int) -> bool:
    """Whether a change of a shadow entry takes something away that TLBs may have."""
    fmt = kvm.spte_format
    if not fmt.is_shadow_present(old):
        return False
    if not fmt.is_shadow_present(new) or (old ^ new) & PT64_BASE_ADDR_MASK:
        return True
    return (old ^ fmt.nx_mask) & ~(new ^ fmt.nx_mask) & PT64_PERM_MASK != 0


def _detect_flood(vcpu: Vcpu, gfn: int) -> bool:
    """Count the writes to one table; True from the third on without a sign that its entries are used.

    The sign is the accessed bit of the last entry that was set speculatively; the write itself counts as a use of an
    entry that maps the table.
    """
    kvm = vcpu.kvm
    accessed = kvm.spte_format.accessed_mask
    last = vcpu.last_pte_updated
    used = False
    if last:
        spt = kvm.page_header[last & ~0xFFF].spt
        index = (last & 0xFFF) >> 3
        spte = spt.get(index, 0)
        if vcpu.last_pte_gfn == gfn and kvm.spte_format.is_shadow_present(spte):
            spt[index] = spte = spte | accessed
        used = spte & accessed != 0
    if gfn == vcpu.last_pt_write_gfn and not used:
        vcpu.last_pt_write_count += 1
        return vcpu.last_pt_write_count >= LAST_PT_WRITE_FLOOD
    vcpu.last_pt_write_gfn = gfn
    vcpu.last_pt_write_count = 1
    vcpu.last_pte_updated = 0
    return False


def _written_entries(kvm: Kvm, sp: ShadowPage, offset: int) -> range | None:
    """The entries of `sp` that a store at byte `offset` of its guest table changes; None if another quadrant's."""
    if sp.cr4_pae:
        return range(offset >> 3, (offset >> 3) + 1)
    offset <<= 1  # an entry of the guest has 4 bytes, ours 8
    entries = 1
    if sp.level == 2:
        # A guest entry of 4 MiB is two of ours.
        offset = (offset & ~7) << 1
        entries = 2
    if offset >> 12 != sp.quadrant and kvm.profile.quadrant:  # bug B29 without it
        return None
    first = (offset & PAGE_OFFSET_MASK) >> 3
    return range(first, first + entries)


def _read_gpte_atomic(kvm: Kvm, gpa: int, size: int) -> int:
    """The guest entry at `gpa`; 0 if it cannot be read without sleeping."""
    slot = kvm.visible_memslot(gpa >> 12)
    if slot is None or (gpa >> 12) + slot.hva_delta & slot.host_mask in kvm.host.absent:
        return 0
    return kvm.memory.read_in(slot, gpa, size)


def kvm_mmu_pte_write(
    vcpu: Vcpu, gpa: int, data: int | None, size: int, guest_initiated: bool
) -> Operation[None]:
    """The `size` bytes at `gpa` have just been written with `data` (None: look at memory). Takes mmu_lock.

    Each shadow page of that table loses the entry; level 1 gets the new one at once. Pages whose table is written in
    ways that no page table is, or too often, are zapped.
    """
    kvm = vcpu.kvm
    stat = kvm.stat
    store_buffer = vcpu.store_buffer  # None with memory model sc
    if store_buffer and kvm.profile.pte_write_fastexit_barrier:
        store_buffer.drain()
    if not kvm.indirect_shadow_pages:
        # Bug A5 (pte-write-fastexit-barrier): in 3.1 the store may still be on its way, and who counts a page from now
        # on reads the guest's old entry.
        if store_buffer:
            yield Point.PTE_WRITE_NO_SHADOW
        return
    gfn = gpa >> 12
    offset = gpa & PAGE_OFFSET_MASK
    invlpg_counter = kvm.invlpg_counter
    if data is None or (size == 4 and vcpu.is_pae):
        if vcpu.is_pae:
            gpa &= ~7
            size = 8
        yield Point.PTE_WRITE_READ
        data = 0
        slot = kvm.visible_memslot(gfn)
        if slot is not None:
            if kvm.point_read_guest_memory:
                yield Point.READ_GUEST_MEMORY
            kvm.host.fault_in(slot, gfn)
            data = kvm.memory.read_in(slot, gpa, size)
            if store_buffer:
                data = store_buffer.forward(slot, gpa, size, data)
    gentry = data if size in (4, 8) else 0
    yield Point.PTE_WRITE_LOCK
    if store_buffer:
        store_buffer.drain()  # taking the lock is a locked operation
    yield MmuLock.ACQUIRE
    if kvm.invlpg_counter != invlpg_counter and kvm.profile.invlpg_prefault_race:  # bug B8 without it
        gentry = 0
    elif gentry and kvm.profile.emulated_write_race and (guest_initiated or kvm.profile.invlpg_prefault_race):
        # Bug A4: 3.1 takes the value from before the lock, though another vCPU may have stored and updated since.
        # (Without fix B8 what invlpg has read stays as it was.)
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        gentry = _read_gpte_atomic(kvm, gpa, size)
    yield from kvm_mmu_free_some_pages(kvm)
    stat.mmu_pte_write += 1
    if kvm.tracepoints is not None:
        kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.PRE_PTE_WRITE)
    flooded = guest_initiated and _detect_flood(vcpu, gfn)
    invalid_list: list[ShadowPage] = []
    zapped = remote_flush = local_flush = False
    for sp in reversed(kvm.mmu_page_hash.get(gfn, ())):
        if sp.direct or sp.invalid:
            continue
        entry_size = 8 if sp.cr4_pae else 4
        crosses = (offset ^ (offset + size - 1)) & -entry_size
        if crosses or size < 4 or flooded:
            zapped |= (yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)) != 0
            stat.mmu_flooded += 1
            continue
        entries = _written_entries(kvm, sp, offset)
        if entries is None:
            continue
        local_flush = True
        for index in entries:
            old = sp.spt.get(index, 0)
            mmu_page_zap_pte(kvm, sp, index)
            if gentry and not (sp.role ^ vcpu.mmu.base_role) & ROLE_PTE_WRITE_MASK:
                if sp.level > 1:
                    stat.mmu_pde_zapped += 1
                else:
                    stat.mmu_pte_updated += 1
                    if kvm.point_gpte_read:
                        yield Point.GPTE_READ
                    yield from vcpu.mmu.context.update_pte(vcpu, sp, index, gentry)
            remote_flush = remote_flush or need_remote_flush(kvm, old, sp.spt.get(index, 0))
    if not zapped:
        if remote_flush:
            yield from kvm_flush_remote_tlbs(kvm)
        elif local_flush:
            kvm_mmu_flush_tlb(vcpu)
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
    if kvm.tracepoints is not None:
        kvm.tracepoints.kvm_mmu_audit(vcpu.cpu, AuditPoint.POST_PTE_WRITE)
    yield MmuLock.RELEASE
