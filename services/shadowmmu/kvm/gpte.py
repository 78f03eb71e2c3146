"""Formats of the guest's paging entries: one table per paging mode.

The algorithms (walk, fetch, sync, prefetch, update) read these tables; none of them asks which mode it works in.
Which bits are reserved depends on registers too: `rsvd_bits_mask` computes that when a context is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from shadowmmu.cpu.x86 import (
    PT32_ENT_PER_PAGE,
    PT32_LEVEL_BITS,
    PT32_ROOT_LEVEL,
    PT32E_ROOT_LEVEL,
    PT64_BASE_ADDR_MASK,
    PT64_ENT_PER_PAGE,
    PT64_LEVEL_BITS,
    PT64_ROOT_LEVEL,
)

__all__ = ["FORMAT_32", "FORMAT_64", "FORMAT_PAE", "GuestFormat", "ReservedBits", "pse36_gfn_delta"]

ReservedBits = tuple[list[int], list[int]]
"""Reserved bits by [bit 7 of the entry][level - 1]."""


class GuestFormat(msgspec.Struct, frozen=True):
    """How guest entries of one paging mode are laid out.

    `top_level` is the highest level that is read as a table in memory; PAE's four PDPTEs lie above it. `large_levels`
    has bit n set if an entry of level n with bit 7 maps a large page (in 32-bit mode only with CR4.PSE).
    """

    root_level: int
    top_level: int
    entry_size: int  # bytes
    level_bits: int  # address bits that index one table
    index_mask: int
    base_addr_mask: int
    large_levels: int
    has_nx: bool  # bit 63 of an entry forbids fetching
    has_pdptes: bool
    large_needs_pse: bool
    has_quadrants: bool  # a guest table covers more than one shadow page does

    def __reduce__(self) -> tuple[Callable[[int], GuestFormat], tuple[int]]:
        """A copy of a machine has the same formats, which are compared by identity."""
        return _format, (self.root_level,)


FORMAT_64: Final = GuestFormat(
    root_level=PT64_ROOT_LEVEL,
    top_level=PT64_ROOT_LEVEL,
    entry_size=8,
    level_bits=PT64_LEVEL_BITS,
    index_mask=PT64_ENT_PER_PAGE - 1,
    base_addr_mask=PT64_BASE_ADDR_MASK,
    large_levels=1 << 2 | 1 << 3,
    has_nx=True,
    has_pdptes=False,
    large_needs_pse=False,
    has_quadrants=False,
)

FORMAT_PAE: Final = GuestFormat(
    root_level=PT32E_ROOT_LEVEL,
    top_level=PT32_ROOT_LEVEL,
    entry_size=8,
    level_bits=PT64_LEVEL_BITS,
    index_mask=PT64_ENT_PER_PAGE - 1,
    base_addr_mask=PT64_BASE_ADDR_MASK,
    large_levels=1 << 2,
    has_nx=True,
    has_pdptes=True,
    large_needs_pse=False,
    has_quadrants=False,
)

FORMAT_32: Final = GuestFormat(
    root_level=PT32_ROOT_LEVEL,
    top_level=PT32_ROOT_LEVEL,
    entry_size=4,
    level_bits=PT32_LEVEL_BITS,
    index_mask=PT32_ENT_PER_PAGE - 1,
    base_addr_mask=0xFFFFF000,
    large_levels=1 << 2,
    has_nx=False,
    has_pdptes=False,
    large_needs_pse=True,
    has_quadrants=True,
)


def _format(root_level: int) -> GuestFormat:
    return next(fmt for fmt in (FORMAT_64, FORMAT_PAE, FORMAT_32) if fmt.root_level == root_level)


def bits(first: int, last: int) -> int:
    """The mask of bits `first` to `last`, both included (rsvd_bits)."""
    return ((1 << (last - first + 1)) - 1) << first


def rsvd_bits_mask(fmt: GuestFormat, old: ReservedBits, maxphyaddr: int, nx: bool, pse: bool) -> ReservedBits:
    """The reserved bits of a mode (reset_rsvds_bits_mask).

    Levels that the mode does not have keep their value of before (`old`): the kernel leaves them alone, and loading
    PDPTEs before the context is rebuilt reads one of them.
    """
    small, large = list(old[0]), list(old[1])
    no_exec = 0 if nx else bits(63, 63)
    if fmt is FORMAT_32:
        small[0:2] = [0, 0]
        large[0:2] = [0, bits(17, 21) if pse else 0]
    elif fmt is FORMAT_PAE:
        entry = no_exec | bits(maxphyaddr, 62)
        small[0:3] = [entry, entry, bits(maxphyaddr, 63) | bits(7, 8) | bits(1, 2)]
        large[0:2] = [entry, entry | bits(13, 20)]
    else:
        entry = no_exec | bits(maxphyaddr, 51)
        upper = entry | bits(7, 8)
        small[0:4] = [entry, entry, upper, upper]
        large[0:4] = [entry, entry | bits(13, 20), entry | bits(13, 29), upper]
    return small, large


def pse36_gfn_delta(gpte: int) -> int:
    """What PSE36 adds to the frame of a 4 MiB page: bits 13 to 16 of the entry are address bits 32 to 35."""
    return (gpte >> 13 & 0xF) << 20
