"""Shadow entries: which bits mean what (the masks of kvm_mmu_set_mask_ptes and kvm_mmu_set_mmio_spte_mask).

A shadow entry is a plain 64-bit integer; 0 is the non-present value. A format is data: the same algorithms work with
the formats of shadow paging and of two-dimensional paging.
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
    "SPTE_HOST_WRITEABLE",
    "SpteFormat",
    "shadow_format",
]

SPTE_HOST_WRITEABLE: Final = 1 << 9
"""The host maps the frame writable (a software bit)."""

PT64_PERM_MASK: Final = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT64_NX_MASK


class SpteFormat(msgspec.Struct, frozen=True):
    """Masks of shadow entries (shadow_*_mask).

    `mmio_mask` are the bits of an entry that stands for a frame without memory, `mmio_bit` one of them that no other
    entry has. `present_test`: an entry maps something or leads somewhere ("shadow present") exactly if
    `spte & present_test == PT_PRESENT_MASK`.
    """

    accessed_mask: int
    dirty_mask: int
    user_mask: int
    nx_mask: int
    x_mask: int
    mmio_mask: int
    mmio_bit: int
    present_test: int
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
    """The format of shadow paging on a host with that many bits of physical address (40 to 51)."""
    mmio_mask = (((1 << 63) - 1) & ~((1 << host_phys_bits) - 1)) | PT_PRESENT_MASK
    link = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK
    return SpteFormat(
        accessed_mask=PT_ACCESSED_MASK,
        dirty_mask=PT_DIRTY_MASK,
        user_mask=PT_USER_MASK,
        nx_mask=PT64_NX_MASK,
        x_mask=0,
        mmio_mask=mmio_mask,
        mmio_bit=1 << host_phys_bits,
        present_test=PT_PRESENT_MASK | 1 << host_phys_bits,
        link_bits=link,
        direct_link_bits=link,
    )
