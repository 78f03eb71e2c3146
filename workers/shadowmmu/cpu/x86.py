"""Architecture definitions of x86 that the processor and the model of KVM's MMU share.

Plain integers, because both sides work on raw 64-bit paging entries and error codes by the million; names follow the
Intel manual and Linux (PT_*, PFERR_*, X86_CR0_*). Relies on nothing.

A page is 4096 bytes; a *frame number* (gfn: guest frame, pfn: host frame) is an address divided by that. A paging
structure has 512 entries of 8 bytes (1024 of 4 bytes in 32-bit two-level paging). `level` 1 is the table whose
entries map 4 KiB pages, level 4 the root of 64-bit paging.
"""

from __future__ import annotations

from typing import Final

# Pages

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_OFFSET_MASK: Final = PAGE_SIZE - 1
PAGE_MASK: Final = ~PAGE_OFFSET_MASK

PT64_LEVEL_BITS: Final = 9
PT64_ENT_PER_PAGE: Final = 1 << PT64_LEVEL_BITS
PT64_INDEX_MASK: Final = PT64_ENT_PER_PAGE - 1
PT32_LEVEL_BITS: Final = 10
PT32_ENT_PER_PAGE: Final = 1 << PT32_LEVEL_BITS

PT_PAGE_TABLE_LEVEL: Final = 1
PT_DIRECTORY_LEVEL: Final = 2
PT_PDPE_LEVEL: Final = 3
PT64_ROOT_LEVEL: Final = 4
PT32E_ROOT_LEVEL: Final = 3
PT32_ROOT_LEVEL: Final = 2

# Bits of a paging entry (of the guest's, and of a shadow entry)

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_ACCESSED_MASK: Final = 1 << 5
PT_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7
PT_GLOBAL_MASK: Final = 1 << 8
PT64_NX_SHIFT: Final = 63
PT64_NX_MASK: Final = 1 << PT64_NX_SHIFT
PT64_BASE_ADDR_MASK: Final = ((1 << 52) - 1) & ~PAGE_OFFSET_MASK
"""Bits 12 to 51: the frame that a 64-bit entry names."""

U64_MASK: Final = (1 << 64) - 1

# Error code of a page fault

PFERR_PRESENT_MASK: Final = 1 << 0
PFERR_WRITE_MASK: Final = 1 << 1
PFERR_USER_MASK: Final = 1 << 2
PFERR_RSVD_MASK: Final = 1 << 3
PFERR_FETCH_MASK: Final = 1 << 4

# Control registers

X86_CR0_PE: Final = 1 << 0
X86_CR0_ET: Final = 1 << 4
X86_CR0_WP: Final = 1 << 16
X86_CR0_NW: Final = 1 << 29
X86_CR0_CD: Final = 1 << 30
X86_CR0_PG: Final = 1 << 31

X86_CR4_PSE: Final = 1 << 4
X86_CR4_PAE: Final = 1 << 5
X86_CR4_PGE: Final = 1 << 7
X86_CR4_PCIDE: Final = 1 << 17
X86_CR4_SMEP: Final = 1 << 20

EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11

CR0_AT_RESET: Final = X86_CR0_CD | X86_CR0_NW | X86_CR0_ET
"""CR0 of a vCPU that has just been made (0x60000010)."""


def pt64_index(address: int, level: int) -> int:
    """The index of `address` in a table of 512 entries at `level` (1 to 4)."""
    return (address >> (PAGE_SHIFT + PT64_LEVEL_BITS * (level - 1))) & PT64_INDEX_MASK
