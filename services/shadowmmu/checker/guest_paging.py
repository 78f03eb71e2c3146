"""The guest's paging as the architecture defines it: formats of entries, reserved bits, rights.

The checker's own reading of the manual (Intel SDM vol. 3A, chapter 4), on purpose not shared with the model of the
kernel: what both got from one source could be wrong in both. Where processors of the two vendors differ, an entry is
*malformed* only if it is so for both, and a reserved-bit fault is *possible* if either would raise it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.protocol.events import PagingRegisters

__all__ = [
    "ACCESSED",
    "DIRTY",
    "EXECUTE",
    "GLOBAL",
    "LARGE",
    "PDPT",
    "PRESENT",
    "USER",
    "WRITE",
    "Format",
    "Paging",
    "access_types",
    "describe_type",
    "is_table_level",
    "own_rights",
    "paging_of",
]

PRESENT: Final = 1 << 0
WRITE: Final = 1 << 1
USER: Final = 1 << 2
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
LARGE: Final = 1 << 7
GLOBAL: Final = 1 << 8
NO_EXECUTE: Final = 1 << 63
EXECUTE: Final = 1 << 3
"""The right to fetch, among rights; beside WRITE and USER, which have the places of their bits in an entry."""

CR0_PG: Final = 1 << 31
CR0_WP: Final = 1 << 16
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_PGE: Final = 1 << 7
CR4_SMEP: Final = 1 << 20
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11

PDPT: Final = 5
"""The level of PAE's table of four page-directory pointers; 1 to 4 are those of entries of 8 bytes."""
TABLE_32: Final = 11
DIRECTORY_32: Final = 12
"""The two levels of 32-bit paging, whose entries have 4 bytes."""


class Format(msgspec.Struct, frozen=True):
    """A paging mode: its levels from the root down, (level, lowest address bit of the index, bits of the index)."""

    name: str
    levels: tuple[tuple[int, int, int], ...]
    entry_size: int
    address_mask: int


LONG: Final = Format("64-bit", ((4, 39, 9), (3, 30, 9), (2, 21, 9), (1, 12, 9)), 8, ((1 << 52) - 1) & ~0xFFF)
PAE: Final = Format("PAE", ((PDPT, 30, 2), (2, 21, 9), (1, 12, 9)), 8, ((1 << 52) - 1) & ~0xFFF)
TWO_LEVEL: Final = Format("32-bit", ((DIRECTORY_32, 22, 10), (TABLE_32, 12, 10)), 4, 0xFFFFF000)


def is_table_level(level: int) -> bool:
    """Whether entries of the level can lead to another table."""
    return level not in (1, TABLE_32)


def _bits(first: int, last: int) -> int:
    return ((1 << (last - first + 1)) - 1) << first if last >= first else 0


class Paging(msgspec.Struct, frozen=True):
    """How a vCPU's processor reads the guest's tables: all that registers say.

    `root` is the first table's address (bytes). `malformed` and `malformed_large` by level: the bits of which none may
    be set in an entry (without, with bit 7); `suspect` and `suspect_large`: those that some processors refuse.
    """

    format: Format
    root: int
    pse: bool
    malformed: dict[int, int]
    malformed_large: dict[int, int]
    suspect: dict[int, int]
    suspect_large: dict[int, int]

    def is_leaf(self, level: int, entry: int) -> bool:
        """Whether an entry that is present maps a page."""
        if level in (1, TABLE_32):
            return True
        if not entry & LARGE:
            return False
        return self.pse if level == DIRECTORY_32 else level in (2, 3)

    def is_malformed(self, level: int, entry: int) -> bool:
        """Whether every processor refuses the entry because of reserved bits."""
        return entry & (self.malformed_large if entry & LARGE else self.malformed)[level] != 0

    def is_suspect(self, level: int, entry: int) -> bool:
        """Whether some processor does."""
        return entry & (self.suspect_large if entry & LARGE else self.suspect)[level] != 0

    def frame(self, level: int, shift: int, entry: int, gva: int) -> int:
        """The guest frame that a leaf maps the address to."""
        inside = (1 << shift) - 1
        frame = (entry & self.format.address_mask & ~inside | gva & inside) >> 12
        if level == DIRECTORY_32:
            frame += (entry >> 13 & 0xF) << 20  # PSE-36
        return frame

    def child(self, entry: int) -> int:
        """The guest frame of the table that an entry leads to."""
        return (entry & self.format.address_mask) >> 12


def own_rights(entry: int) -> int:
    """What an entry allows by itself: WRITE, USER, EXECUTE."""
    return entry & (WRITE | USER) | (0 if entry >> 63 & 1 else EXECUTE)


def paging_of(registers: PagingRegisters, *, no_execute: bool) -> Paging | None:
    """How tables are read under these registers; None if paging is off.

    `no_execute`: bit 63 is not reserved, or was not at some time that still counts.
    """
    if not registers.cr0 & CR0_PG or registers.tdp:
        return None
    maxphyaddr = registers.maxphyaddr
    malformed: dict[int, int]
    if registers.efer & EFER_LMA or registers.cr4 & CR4_PAE:
        nx = 0 if no_execute else NO_EXECUTE
        if registers.efer & EFER_LMA:
            fmt, root = LONG, registers.cr3 & LONG.address_mask
            entry = _bits(maxphyaddr, 51) | nx
        else:
            fmt, root = PAE, registers.cr3 & 0xFFFFFFE0
            entry = _bits(maxphyaddr, 62) | nx
        malformed = {1: entry, 2: entry, 3: entry, 4: entry, PDPT: 0}
        large = {1: entry, 2: entry | _bits(13, 20), 3: entry | _bits(13, 29), 4: entry | LARGE, PDPT: 0}
        # KVM follows the AMD manual, where bits 7 and 8 of the upper levels must be zero.
        refused = 0 if registers.efer & EFER_NXE else NO_EXECUTE
        suspect = {level: bits | refused for level, bits in malformed.items() if level != PDPT}
        suspect_large = {level: bits | refused for level, bits in large.items() if level != PDPT}
        suspect |= {3: suspect[3] | GLOBAL, 4: suspect[4] | GLOBAL | LARGE}
        suspect_large |= {4: suspect_large[4] | GLOBAL}
        return Paging(fmt, root, True, malformed, large, suspect, suspect_large)
    pse = registers.cr4 & CR4_PSE != 0
    malformed = {TABLE_32: 0, DIRECTORY_32: 0}
    large = {TABLE_32: 0, DIRECTORY_32: _bits(17, 21) if pse else 0}
    return Paging(TWO_LEVEL, registers.cr3 & 0xFFFFF000, pse, malformed, large, malformed, large)


def _types(rights: int, dirty: bool, write_protect: bool, smep: bool) -> int:
    found = 0
    for kind in range(8):
        write, fetch, user = kind & 1, kind & 2, kind & 4
        if write and not (dirty and (rights & WRITE or not (user or write_protect))):
            continue
        if user and not rights & USER:
            continue
        if fetch and (not rights & EXECUTE or (smep and not user and rights & USER)):
            continue
        found |= 1 << kind
    return found


_TYPES: Final = {
    (rights, dirty, write_protect, smep): _types(rights, dirty, write_protect, smep)
    for rights in range(16)
    for dirty in (False, True)
    for write_protect in (False, True)
    for smep in (False, True)
}


def access_types(rights: int, dirty: bool, registers: PagingRegisters) -> int:
    """The access types that rights allow: bit n is type n of AccessFlag's WRITE 1, FETCH 2, USER 4.

    `dirty`: of the leaf; without it nothing may be written (TLB_RULES R8).
    """
    return _TYPES[
        rights & (WRITE | USER | EXECUTE),
        dirty,
        registers.cr0 & CR0_WP != 0,
        registers.cr4 & CR4_SMEP != 0,
    ]


def describe_type(kind: int) -> str:
    """An access type in words."""
    what = "write" if kind & 1 else "fetch" if kind & 2 else "read"
    return f"{'user' if kind & 4 else 'supervisor'} {what}"
