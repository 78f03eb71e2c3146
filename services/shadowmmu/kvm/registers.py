"""Control registers: what KVM does when the guest (or its user space) sets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    X86_CR0_CD,
    X86_CR0_ET,
    X86_CR0_NW,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PGE,
    X86_CR4_PSE,
    X86_CR4_SMEP,
)
from shadowmmu.kvm.contexts import kvm_mmu_reset_context
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.emulated_stores import emulated_stores_settled
from shadowmmu.kvm.pdptrs import load_pdptrs, pdptrs_changed
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_mmu_flush_tlb
from shadowmmu.kvm.role import ROLE_NXE
from shadowmmu.kvm.sync import kvm_mmu_sync_roots
from shadowmmu.protocol.events import PagingRegisters

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["kvm_set_cr0", "kvm_set_cr3", "kvm_set_cr4", "set_efer", "set_regs"]

CR0_MMU_BITS: Final = X86_CR0_PG | X86_CR0_WP | X86_CR0_NW | X86_CR0_CD
"""A change of these in CR0 rebuilds the paging context (update_bits)."""
CR4_MMU_BITS: Final = X86_CR4_PGE | X86_CR4_PSE | X86_CR4_PAE | X86_CR4_SMEP
"""A change of these in CR4 rebuilds the paging context (pdptr_bits); of PGE alone too."""
CR3_L_MODE_RESERVED_BITS: Final = 0xFFFFFF0000000FE7
CR3_PAE_RESERVED_BITS: Final = 0x17
"""PCD (bit 4) and bits 0 to 2; a quirk: PCD is not reserved on a processor."""


def kvm_set_cr3(vcpu: Vcpu, cr3: int) -> Operation[bool]:
    """MOV to CR3; returns whether it is refused with #GP (nothing is changed then but PDPTEs already loaded).

    The same value synchronises what the root reaches; another one gives the root up, the next entry loads one.
    """
    yield from emulated_stores_settled(vcpu.kvm)
    if cr3 == vcpu.cr3 and not (yield from pdptrs_changed(vcpu)):
        _take_effect(vcpu, "cr3")
        if vcpu.kvm.profile.sync_on_cr3_reload:  # bug B24 without it
            yield from kvm_mmu_sync_roots(vcpu)
        kvm_mmu_flush_tlb(vcpu)
        return False
    if vcpu.is_long_mode:
        if cr3 & CR3_L_MODE_RESERVED_BITS:
            return True
    elif vcpu.is_pae:
        if cr3 & CR3_PAE_RESERVED_BITS:
            return True
        if vcpu.is_paging and not (yield from load_pdptrs(vcpu, cr3)):
            return True
    if vcpu.kvm.gfn_to_memslot(cr3 >> 12) is None:
        return True
    vcpu.cr3 = cr3
    _take_effect(vcpu, "cr3")
    yield Point.SET_CR3
    yield from vcpu.mmu.context.new_cr3(vcpu)
    return False


def kvm_set_cr0(vcpu: Vcpu, cr0: int) -> Operation[bool]:
    """MOV to CR0; returns whether it is refused with #GP. Setting PG with EFER.LME enters long mode."""
    yield from emulated_stores_settled(vcpu.kvm)
    old = vcpu.cr0
    cr0 |= X86_CR0_ET
    if (
        cr0 >> 32
        or (cr0 & X86_CR0_NW and not cr0 & X86_CR0_CD)
        or (cr0 & X86_CR0_PG and not cr0 & X86_CR0_PE)
    ):
        return True
    efer = vcpu.efer
    if cr0 & X86_CR0_PG and not old & X86_CR0_PG:
        if efer & EFER_LME:
            if not vcpu.is_pae:
                return True
            efer |= EFER_LMA
        elif vcpu.is_pae and not (yield from load_pdptrs(vcpu, vcpu.cr3)):
            return True
    elif old & X86_CR0_PG and not cr0 & X86_CR0_PG:
        efer &= ~EFER_LMA
    vcpu.cr0 = cr0
    vcpu.efer = efer
    _take_effect(vcpu, "cr0")
    if (cr0 ^ old) & CR0_MMU_BITS:
        yield from kvm_mmu_reset_context(vcpu)
    return False


def kvm_set_cr4(vcpu: Vcpu, cr4: int) -> Operation[bool]:
    """MOV to CR4; returns whether it is refused with #GP."""
    yield from emulated_stores_settled(vcpu.kvm)
    old = vcpu.cr4
    if vcpu.is_long_mode:
        if not cr4 & X86_CR4_PAE:
            return True
    elif vcpu.is_paging and cr4 & X86_CR4_PAE and (cr4 ^ old) & CR4_MMU_BITS:
        if not (yield from load_pdptrs(vcpu, vcpu.cr3)):
            return True
    vcpu.cr4 = cr4
    _take_effect(vcpu, "cr4")
    if (cr4 ^ old) & CR4_MMU_BITS:
        yield from kvm_mmu_reset_context(vcpu)
    return False


def set_efer(vcpu: Vcpu, efer: int) -> Operation[bool]:
    """WRMSR to EFER; returns whether it is refused with #GP. LMA cannot be written."""
    yield from emulated_stores_settled(vcpu.kvm)
    old = vcpu.efer
    if vcpu.is_paging and (efer ^ old) & EFER_LME:
        return True
    vcpu.efer = efer = efer & ~EFER_LMA | old & EFER_LMA
    _take_effect(vcpu, "efer")
    _set_role_nxe(vcpu)
    if (efer ^ old) & EFER_NX:
        yield from kvm_mmu_reset_context(vcpu)
    return False


def set_regs(vcpu: Vcpu, cr0: int, cr3: int, cr4: int, efer: int) -> Operation[None]:
    """Set all of them at once, as user space does, and rebuild the context in any case.

    PDPTEs that cannot be loaded (judged by the context of before) stay as they were.
    """
    vcpu.cr0 = cr0
    vcpu.cr3 = cr3
    vcpu.cr4 = cr4
    vcpu.efer = efer
    if not vcpu.is_long_mode and vcpu.is_pae:
        yield from load_pdptrs(vcpu, cr3)
    _take_effect(vcpu, "")
    _set_role_nxe(vcpu)
    yield from kvm_mmu_reset_context(vcpu)


def _set_role_nxe(vcpu: Vcpu) -> None:
    mmu = vcpu.mmu
    kvm = vcpu.kvm
    nxe = vcpu.efer & EFER_NX and kvm.config.tdp is None and kvm.profile.role_bits_nxe  # bug B15 without it
    mmu.base_role = mmu.base_role & ~ROLE_NXE | (ROLE_NXE if nxe else 0)


def _take_effect(vcpu: Vcpu, register: str) -> None:
    """Trace that registers have been written, before anything is done with the new values."""
    kvm = vcpu.kvm
    if kvm.trace is not None:
        kvm.trace(
            PagingRegisters(
                vcpu.vcpu_id,
                register,
                vcpu.cr0,
                vcpu.cr3,
                vcpu.cr4,
                vcpu.efer,
                list(vcpu.pdptrs),
                kvm.config.guest_maxphyaddr,
                kvm.config.tdp is not None,
            )
        )
