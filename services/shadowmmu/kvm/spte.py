"""Shadow entries: which bits mean what (the masks of kvm_mmu_set_mask_ptes and kvm_mmu_set_mmio_spte_mask).

A shadow entry is a plain 64-bit integer. A format is data: the same algorithms work with the formats of shadow paging
and of two-dimensional paging.

The value of an entry that maps nothing is 0, except before "remove bypass_guest_pf" with that parameter on: there it is
SHADOW_TRAP_NONPRESENT_PTE, which makes the processor exit, and 0 ("notrap") means that the guest's entry is not present
either, so that the processor may give the fault to the guest without an exit.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.x86 import (
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)

__all__ = [
    "PT64_PERM_MASK",
    "SHADOW_TRAP_NONPRESENT_PTE",
    "SPTE_HOST_WRITEABLE",
    "VMX_EPT_EXECUTABLE_MASK",
    "SpteFormat",
    "ept_format",
    "shadow_format",
]

SPTE_HOST_WRITEABLE: Final = 1 << 9
"""The host maps the frame writable (a software bit)."""

SHADOW_TRAP_NONPRESENT_PTE: Final = 0xFFFF_FFFF_FFFF_F001
"""Bit 0 and reserved bits: a fault with P = 1."""

VMX_EPT_EXECUTABLE_MASK: Final = 1 << 2
VMX_EPT_MT_MASK: Final = 0x70
"""Memory type write-back, and the guest's own type ignored."""

PT64_PERM_MASK: Final = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT64_NX_MASK


class SpteFormat(msgspec.Struct, frozen=True):
    """Masks of shadow entries (shadow_*_mask).

    `mmio_mask` are the bits of an entry that stands for a frame without memory. `leaf_bits` is what every leaf has
    besides (the memory type). `present_test`: an entry maps something or leads somewhere ("shadow present") exactly if
    `spte & present_test == PT_PRESENT_MASK`.
    """

    accessed_mask: int
    dirty_mask: int
    user_mask: int
    nx_mask: int
    x_mask: int
    mmio_mask: int
    present_test: int
    leaf_bits: int
    link_bits: int  # what an entry that leads to a table has besides its address
    direct_link_bits: int  # the same in a direct map

    def is_shadow_present(self, spte: int) -> bool:
        """Whether the entry maps a frame or leads to a table (is_shadow_present_pte)."""
        return spte & self.present_test == PT_PRESENT_MASK

    def is_mmio(self, spte: int) -> bool:
        """Whether the entry stands for a frame without memory (is_mmio_spte)."""
        return spte & self.mmio_mask == self.mmio_mask

    def mmio_spte(self, gfn: int, access: int) -> int:
        """The entry for a frame without memory; of `access`, write and user count (mark_mmio_spte)."""
        return self.mmio_mask | access & (PT_WRITABLE_MASK | PT_USER_MASK) | gfn << 12

    def mmio_gfn(self, spte: int) -> int:
        """The guest frame of an MMIO entry (get_mmio_spte_gfn)."""
        return (spte & ~self.mmio_mask & ~0xFFF & ~PT64_NX_MASK) >> 12

    def mmio_access(self, spte: int) -> int:
        """The rights in an MMIO entry (get_mmio_spte_access)."""
        return spte & ~self.mmio_mask & 0xFFF & (PT_WRITABLE_MASK | PT_USER_MASK)


def shadow_format(host_phys_bits: int) -> SpteFormat:
    """The format of shadow paging and of nested page tables (NPT).

    `host_phys_bits`: of a physical address on the host (40 to 51).
    """
    mmio_mask = (((1 << 63) - 1) & ~((1 << host_phys_bits) - 1)) | PT_PRESENT_MASK
    link = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK
    return SpteFormat(
        accessed_mask=PT_ACCESSED_MASK,
        dirty_mask=PT_DIRTY_MASK,
        user_mask=PT_USER_MASK,
        nx_mask=PT64_NX_MASK,
        x_mask=0,
        mmio_mask=mmio_mask,
        present_test=PT_PRESENT_MASK | 1 << host_phys_bits,
        leaf_bits=0,
        link_bits=link,
        direct_link_bits=link,
    )


def ept_format() -> SpteFormat:
    """The format of extended page tables (EPT): read, write, execute; no accessed and dirty bits.

    An MMIO entry is one that the processor calls misconfigured: it may be written and executed, but not read.
    """
    link = PT_PRESENT_MASK | PT_WRITABLE_MASK | VMX_EPT_EXECUTABLE_MASK
    return SpteFormat(
        accessed_mask=0,
        dirty_mask=0,
        user_mask=0,
        nx_mask=0,
        x_mask=VMX_EPT_EXECUTABLE_MASK,
        mmio_mask=0xFF << 49 | VMX_EPT_EXECUTABLE_MASK | PT_WRITABLE_MASK,
        present_test=PT_PRESENT_MASK,
        leaf_bits=VMX_EPT_MT_MASK,
        link_bits=link,
        direct_link_bits=link,
    )
