"""The processor of the recordings: no TLB, each access walks the tables anew (FORMAT.md sections 2.2, 5 and 9)."""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.x86 import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_BASE_ADDR_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    X86_CR0_PG,
    X86_CR4_SMEP,
)
from shadowmmu.kvm import InstructionKind, ShadowPage, Vcpu, shadow_walk_init
from shadowmmu.kvm.spte import VMX_EPT_EXECUTABLE_MASK
from shadowmmu.protocol.messages import Tdp

__all__ = ["Fault", "Misconfiguration", "Translation", "hardware_walk"]

RESERVED_BITS: Final = ((1 << 52) - 1) & ~((1 << 40) - 1)
PERMISSIONS: Final = PT_PRESENT_MASK | PT_WRITABLE_MASK | VMX_EPT_EXECUTABLE_MASK
"""EPT entries: read, write, execute."""

PF_ERROR_CODE: Final = {
    InstructionKind.READ: 0,
    InstructionKind.WRITE: PFERR_WRITE_MASK,
    InstructionKind.EXECUTE: PFERR_FETCH_MASK,
}
EPT_VIOLATION: Final = {InstructionKind.READ: 1, InstructionKind.WRITE: 2, InstructionKind.EXECUTE: 0}
"""What is reported of a violation, whatever its cause (FORMAT.md section 5)."""
EPT_NEEDED: Final = {
    InstructionKind.READ: PT_PRESENT_MASK,
    InstructionKind.WRITE: PT_WRITABLE_MASK,
    InstructionKind.EXECUTE: VMX_EPT_EXECUTABLE_MASK,
}


class Fault(msgspec.Struct, frozen=True):
    """The walk faulted, with this error code."""

    error_code: int


class Misconfiguration(msgspec.Struct, frozen=True):
    """The walk met an EPT entry of a kind that is not allowed: KVM marks frames without memory like that."""


class Translation(msgspec.Struct, frozen=True):
    """The walk succeeded: the leaf entry after it, its level, and the 4 KiB frames of host and guest accessed."""

    spte: int
    level: int
    pfn: int
    gfn: int


def hardware_walk(
    vcpu: Vcpu, gva: int, kind: InstructionKind, user: bool
) -> Fault | Misconfiguration | Translation:
    """Translate an address by the tables that KVM has made for the processor."""
    if vcpu.kvm.config.tdp is Tdp.EPT:
        return _ept_walk(vcpu, gva, kind)
    return _shadow_walk(vcpu, gva, kind, user or vcpu.kvm.config.tdp is Tdp.NPT)


def _shadow_walk(vcpu: Vcpu, gva: int, kind: InstructionKind, user: bool) -> Fault | Translation:
    """A walk of shadow or nested page tables, with CR0.WP and EFER.NX set in the host.

    Accessed bits, and for a write the dirty bit, are set if the walk succeeds.
    """
    write = kind is InstructionKind.WRITE
    smep = not user and vcpu.cr4 & X86_CR4_SMEP and vcpu.cr0 & X86_CR0_PG
    error_code = PF_ERROR_CODE[kind] | (PFERR_USER_MASK if user else 0)
    rights = PT_WRITABLE_MASK | PT_USER_MASK
    no_execute = 0
    used: list[tuple[ShadowPage, int]] = []
    sp, level = shadow_walk_init(vcpu, gva)
    while sp is not None:
        index = gva >> (12 + 9 * (level - 1)) & 511
        spte = sp.spt.get(index, vcpu.kvm.shadow_trap_nonpresent_pte)
        if not spte & PT_PRESENT_MASK:
            break
        if spte & RESERVED_BITS:
            return Fault(error_code | PFERR_PRESENT_MASK | PFERR_RSVD_MASK)
        rights &= spte
        no_execute |= spte & PT64_NX_MASK
        used.append((sp, index))
        if level > 1 and not spte & PT_PAGE_SIZE_MASK:
            sp = vcpu.kvm.page_header[spte & PT64_BASE_ADDR_MASK]
            level -= 1
            continue
        if (
            (write and not rights & PT_WRITABLE_MASK)
            or (user and not rights & PT_USER_MASK)
            or (kind is InstructionKind.EXECUTE and (no_execute or (smep and rights & PT_USER_MASK)))
        ):
            return Fault(error_code | PFERR_PRESENT_MASK)
        for table, entry in used:
            table.spt[entry] |= PT_ACCESSED_MASK
        if write:
            sp.spt[index] |= PT_DIRTY_MASK
        return _translation(sp, index, level, gva)
    return Fault(error_code)


def _ept_walk(vcpu: Vcpu, gpa: int, kind: InstructionKind) -> Fault | Misconfiguration | Translation:
    """A walk of extended page tables: it changes nothing."""
    rights = PERMISSIONS
    sp, level = shadow_walk_init(vcpu, gpa)
    while sp is not None:
        index = gpa >> (12 + 9 * (level - 1)) & 511
        spte = sp.spt.get(index, 0)
        if spte & PERMISSIONS == PT_WRITABLE_MASK | VMX_EPT_EXECUTABLE_MASK:
            return Misconfiguration()
        rights &= spte
        if not rights & EPT_NEEDED[kind]:
            break
        if level == 1 or spte & PT_PAGE_SIZE_MASK:
            return _translation(sp, index, level, gpa)
        sp = vcpu.kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        level -= 1
    return Fault(EPT_VIOLATION[kind])


def _translation(sp: ShadowPage, index: int, level: int, address: int) -> Translation:
    spte = sp.spt[index]
    offset = address >> 12 & ((1 << (9 * (level - 1))) - 1)
    return Translation(spte, level, ((spte & PT64_BASE_ADDR_MASK) >> 12) + offset, sp.get_gfn(index) + offset)
