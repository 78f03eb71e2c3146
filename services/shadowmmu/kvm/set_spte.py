"""Writing leaf entries: set_spte and mmu_set_spte. Under mmu_lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.x86 import (
    PT64_BASE_ADDR_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    X86_CR0_WP,
    X86_CR4_SMEP,
)
from shadowmmu.kvm.constants import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, RMAP_RECYCLE_THRESHOLD
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_mmu_flush_tlb
from shadowmmu.kvm.rmap import drop_parent_pte, drop_spte, has_wrprotected_page, kvm_unmap_rmapp, rmap_add
from shadowmmu.kvm.spte import SPTE_HOST_WRITEABLE
from shadowmmu.kvm.spte_update import mmu_spte_update
from shadowmmu.kvm.unsync import mmu_need_write_protect, unsync_late
from shadowmmu.protocol.events import AuditFailed

if TYPE_CHECKING:
    from shadowmmu.kvm.memslots import KvmMemorySlot
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["NO_SLOT_PFN", "mmu_set_spte", "set_spte"]

NO_SLOT_PFN: Final = -2
"""The "frame" of a guest frame that no slot holds: it gets an MMIO entry."""


def make_spte(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu,
    slot: KvmMemorySlot | None,
    current: int,
    pte_access: int,
    user_fault: bool,
    write_fault: bool,
    level: int,
    gfn: int,
    pfn: int,
    speculative: bool,
    can_unsync: bool,
    host_writable: bool,
) -> tuple[int, bool]:
    """The entry that maps `gfn` to `pfn`, and whether write access was refused (set_spte's return value).

    `slot` is the one that holds `gfn`; without one the entry is an MMIO entry.

    May make the shadow pages of `gfn` unsync, and marks `gfn` dirty if the entry lets the guest write it. The entry
    is 0 if a large page may not be mapped at all because there are shadowed tables in it. `current` is the entry as
    it is. A write with CR0.WP = 0 gets W without the guest's right to it, and is then for the kernel only; such a
    mapping is not marked dirty (a quirk).
    """
    kvm = vcpu.kvm
    fmt = kvm.spte_format
    kvm.work.sptes_set += 1
    if slot is None:
        return fmt.mmio_spte(gfn, pte_access), False
    spte = PT_PRESENT_MASK | pfn << 12 | fmt.leaf_bits
    if not speculative:
        spte |= fmt.accessed_mask
    spte |= fmt.x_mask if pte_access & ACC_EXEC_MASK else fmt.nx_mask
    if pte_access & ACC_USER_MASK:
        spte |= fmt.user_mask
    if level > 1:
        spte |= PT_PAGE_SIZE_MASK
    if host_writable:
        spte |= SPTE_HOST_WRITEABLE
    else:
        pte_access &= ~ACC_WRITE_MASK
    refused = False
    if pte_access & ACC_WRITE_MASK or (
        not kvm.profile.wp0_dirty_missed  # bug A15
        and write_fault
        and not user_fault
        and not vcpu.cr0 & X86_CR0_WP
        and not vcpu.mmu.direct_map
    ):
        if level > 1 and has_wrprotected_page(kvm, gfn, level):
            return 0, True
        spte |= PT_WRITABLE_MASK
        if not pte_access & ACC_WRITE_MASK and not vcpu.mmu.direct_map:
            if kvm.profile.role_bits_user:  # bug B15 without it
                spte &= ~PT_USER_MASK
            if vcpu.cr4 & X86_CR4_SMEP and kvm.profile.role_bits_smep:  # bug B15 without it
                spte |= fmt.nx_mask
        if not can_unsync and current & PT_WRITABLE_MASK:
            return spte, False
        if gfn in kvm.mmu_page_hash and mmu_need_write_protect(kvm, gfn, can_unsync):
            refused = True
            pte_access &= ~ACC_WRITE_MASK
            spte &= ~PT_WRITABLE_MASK
    if pte_access & ACC_WRITE_MASK and slot.dirty_bitmap is not None:
        slot.dirty_bitmap.add(gfn)
    return spte, refused


def set_spte(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu,
    sp: ShadowPage,
    index: int,
    slot: KvmMemorySlot | None,
    pte_access: int,
    user_fault: bool,
    write_fault: bool,
    level: int,
    gfn: int,
    pfn: int,
    speculative: bool,
    can_unsync: bool,
    host_writable: bool,
) -> Operation[bool]:
    """Set a leaf entry; returns whether write access was refused (source: set_spte).

    An entry that was present keeps its D bit. If it was writable and is no longer, all TLBs are flushed, or write
    protection would later find it read-only and not flush.
    """
    kvm = vcpu.kvm
    old = sp.spt.get(index, 0)
    spte, refused = make_spte(
        vcpu,
        slot,
        old,
        pte_access,
        user_fault,
        write_fault,
        level,
        gfn,
        pfn,
        speculative,
        can_unsync,
        host_writable,
    )
    if slot is None:
        sp.spt[index] = spte
        return False
    if not spte:
        drop_spte(kvm, sp, index)
        return True
    fmt = kvm.spte_format
    if old & fmt.present_test == PT_PRESENT_MASK:
        carry = kvm.profile.ad_bit_loss_carry  # bug B20 without it
        if carry:
            spte |= old & fmt.dirty_mask
        if kvm.point_spte_update:
            yield Point.SPTE_UPDATE
        if carry:
            mmu_spte_update(kvm, sp, index, old, spte, exchange=kvm.profile.ad_bit_loss_update)
        else:
            sp.spt[index] = spte
    else:
        sp.spt[index] = spte
    if kvm.late_unsync:  # bug C2
        yield from unsync_late(kvm)
    if old & PT_WRITABLE_MASK and not spte & PT_WRITABLE_MASK and kvm.profile.wr_ro_noflush:  # bug B1
        yield from kvm_flush_remote_tlbs(kvm)
    return refused


def _wrong_direct_page(kvm: Kvm, sp: ShadowPage, index: int, gfn: int) -> None:
    """What following a direct page of other frames, or of another role, ends in (bugs A8, A9).

    The kernel stops with BUG in kvm_mmu_page_set_gfn. Here the run is told, and goes on.
    """
    if kvm.trace is not None:
        text = f"entry {index} of {sp!r} maps frame {gfn}, not {sp.get_gfn(index)}: the kernel stops here"
        kvm.trace(AuditFailed("kvm_mmu_page_set_gfn", text))


def mmu_set_spte(  # noqa: PLR0917 - the kernel's arguments
    vcpu: Vcpu,
    sp: ShadowPage,
    index: int,
    slot: KvmMemorySlot | None,
    pte_access: int,
    user_fault: bool,
    write_fault: bool,
    level: int,
    gfn: int,
    pfn: int,
    speculative: bool,
    host_writable: bool,
) -> Operation[bool]:
    """Map `gfn`, of `slot`, to `pfn` by entry `index`, whatever it was; returns whether the access must be emulated.

    Replacing a table or another frame flushes all TLBs first. The old mapping is judged by its host frame alone: with
    the same one, the guest frame recorded for it and the reverse map stay as they are (a quirk).
    """
    kvm = vcpu.kvm
    spt = sp.spt
    present_test = kvm.spte_format.present_test
    old = spt.get(index, 0)
    was_rmapped = False
    if old & present_test == PT_PRESENT_MASK:
        if level > 1 and not old & PT_PAGE_SIZE_MASK:
            drop_parent_pte(kvm.child(old), sp, index)
            if kvm.profile.small_to_large:  # bug B11 without it
                yield from kvm_flush_remote_tlbs(kvm)
            old = 0
        elif (old & PT64_BASE_ADDR_MASK) >> 12 != pfn:
            if kvm.profile.pfn_overwrite_drop or slot is None:
                drop_spte(kvm, sp, index)
                if kvm.profile.pfn_overwrite:  # bug B12 without it
                    yield from kvm_flush_remote_tlbs(kvm)
                old = 0
            else:
                was_rmapped = True  # bug B12 (pfn-overwrite-drop): taken for a mapping of the same frame
        else:
            was_rmapped = True
    if old:
        refused = yield from set_spte(
            vcpu,
            sp,
            index,
            slot,
            pte_access,
            user_fault,
            write_fault,
            level,
            gfn,
            pfn,
            speculative,
            True,
            host_writable,
        )
        spte = spt.get(index, 0)
    else:  # the usual case, without the work that only an old entry makes
        spte, refused = make_spte(
            vcpu,
            slot,
            0,
            pte_access,
            user_fault,
            write_fault,
            level,
            gfn,
            pfn,
            speculative,
            True,
            host_writable,
        )
        if spte:
            spt[index] = spte
        if kvm.late_unsync:  # bug C2
            yield from unsync_late(kvm)
    emulate = False
    if refused:
        emulate = write_fault
        kvm_mmu_flush_tlb(vcpu)
    if spte & present_test == PT_PRESENT_MASK:
        if not was_rmapped and spte & PT_PAGE_SIZE_MASK:
            kvm.stat.lpages += 1
        assert slot is not None  # without one it is an MMIO entry
        sp.slot_bitmap |= slot.bit
        if not was_rmapped:
            if not sp.direct:
                sp.gfns[index] = gfn
            elif gfn != sp.get_gfn(index):
                _wrong_direct_page(kvm, sp, index, gfn)
            kvm.work.rmap_entries += 1
            if rmap_add(slot, gfn, sp.level, sp.hpa + (index << 3)) > RMAP_RECYCLE_THRESHOLD:
                yield from kvm_unmap_rmapp(kvm, slot, sp.level, gfn >> (9 * (sp.level - 1)))
                yield from kvm_flush_remote_tlbs(kvm)
    elif spte:
        emulate = True  # an MMIO entry
        if kvm.tracepoints is not None:
            access = pte_access & (ACC_WRITE_MASK | ACC_USER_MASK)
            kvm.tracepoints.mark_mmio_spte(sp.hpa + (index << 3), gfn, access)
    if speculative:
        vcpu.last_pte_updated = sp.hpa + (index << 3)
        vcpu.last_pte_gfn = gfn
    return emulate
