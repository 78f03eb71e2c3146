"""The processor of the recordings: no TLB, each access walks the shadow tables anew (FORMAT.md section 2.2)."""

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
)
from shadowmmu.kvm import InstructionKind, ShadowPage, Vcpu, shadow_walk_init

__all__ = ["Fault", "Translation", "hardware_walk"]

RESERVED_BITS: Final = ((1 << 52) - 1) & ~((1 << 40) - 1)


class Fault(msgspec.Struct, frozen=True):
    """The walk faulted, with this error code."""

    error_code: int


class Translation(msgspec.Struct, frozen=True):
    """The walk succeeded: the leaf entry after it, its level, and the 4 KiB frames of host and guest accessed."""

    spte: int
    level: int
    pfn: int
    gfn: int


def hardware_walk(vcpu: Vcpu, gva: int, kind: InstructionKind, user: bool) -> Fault | Translation:
    """Translate an address by the shadow tables, as the processor does with CR0.WP and EFER.NX set.

    Accessed bits, and for a write the dirty bit, are set if the walk succeeds.
    """
    write = kind is InstructionKind.WRITE
    fetch = kind is InstructionKind.EXECUTE
    error_code = (
        (PFERR_WRITE_MASK if write else 0)
        | (PFERR_USER_MASK if user else 0)
        | (PFERR_FETCH_MASK if fetch else 0)
    )
    rights = PT_WRITABLE_MASK | PT_USER_MASK
    no_execute = 0
    used: list[tuple[ShadowPage, int]] = []
    sp, level = shadow_walk_init(vcpu, gva)
    while sp is not None:
        index = gva >> (12 + 9 * (level - 1)) & 511
        spte = sp.spt.get(index, 0)
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
            or (fetch and no_execute)
        ):
            return Fault(error_code | PFERR_PRESENT_MASK)
        for table, entry in used:
            table.spt[entry] |= PT_ACCESSED_MASK
        if write:
            sp.spt[index] |= PT_DIRTY_MASK
        spte = sp.spt[index]
        offset = gva >> 12 & ((1 << (9 * (level - 1))) - 1)
        return Translation(
            spte, level, ((spte & PT64_BASE_ADDR_MASK) >> 12) + offset, sp.get_gfn(index) + offset
        )
    return Fault(error_code)
