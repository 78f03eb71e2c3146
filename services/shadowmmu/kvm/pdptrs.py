"""The four page-directory pointers of PAE paging, which the processor reads when CR3 is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PFERR_USER_MASK, PFERR_WRITE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.points import Point

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import PagingUnit

__all__ = ["kvm_pdptr_read", "load_pdptrs", "pdptrs_changed"]


def _read_pdptes(vcpu: PagingUnit, cr3: int) -> Operation[list[int] | None]:
    """The four entries in memory at `cr3` (low five bits ignored); None outside of memory."""
    kvm = vcpu.kvm
    gfn = cr3 >> 12
    translate = vcpu.mmu.translate_gpa
    if translate is not None:
        real = yield from translate(gfn << 12, PFERR_USER_MASK | PFERR_WRITE_MASK)
        if real.fault is not None:
            return None
        gfn = real.gfn
    slot = kvm.visible_memslot(gfn)
    if slot is None:
        return None
    if kvm.point_read_guest_memory:
        yield Point.READ_GUEST_MEMORY
    if kvm.host.absent:
        kvm.host.fault_in(slot, gfn)
    first = ((gfn - slot.base_gfn << 12) + (cr3 & 0xFE0)) >> 3
    return slot.words[first : first + 4].tolist()


def load_pdptrs(vcpu: PagingUnit, cr3: int) -> Operation[bool]:
    """Load the PDPTEs; returns False and keeps the old ones if they cannot be read or a present one is malformed.

    The reserved bits are those of the context in force, for a small entry of level 3.
    """
    pdptes = yield from _read_pdptes(vcpu, cr3)
    if pdptes is None:
        return False
    reserved = vcpu.mmu.rsvd_bits_mask[0][2]
    if any(pdpte & PT_PRESENT_MASK and pdpte & reserved for pdpte in pdptes):
        return False
    vcpu.pdptrs = pdptes
    return True


def kvm_pdptr_read(vcpu: PagingUnit, index: int) -> Operation[int]:
    """One PDPTE: the register, which writes of CR3, CR0 and CR4 load.

    Finding N2 (pdpte-reread): 3.1 reads all four from memory each time (kvm_pdptr_read_mmu); what cannot be loaded
    stays as it was. For the guest of a guest that is right, as SVM has it.
    """
    if vcpu.mmu.translate_gpa is not None or not vcpu.kvm.profile.pdpte_reread:
        yield from load_pdptrs(vcpu, vcpu.cr3)
    return vcpu.pdptrs[index]


def pdptrs_changed(vcpu: PagingUnit) -> Operation[bool]:
    """Whether the PDPTEs in memory differ from those loaded; False outside of PAE mode."""
    if vcpu.is_long_mode or not vcpu.is_pae:
        return False
    pdptes = yield from _read_pdptes(vcpu, vcpu.cr3)
    return pdptes != vcpu.pdptrs
