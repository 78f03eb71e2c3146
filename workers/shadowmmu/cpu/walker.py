"""The page walk that the processor does on a TLB miss, in the tables that the hypervisor gave it (shadow tables).

The walk is a generator that yields before each read of an entry: whoever drives it lets others act there, as they can
between the memory accesses of a real walk. What it does to the tables and which error code it reports is
conformance/FORMAT.md 2.2, exactly. How tables are found and stored is the caller's: `Tables` is all it needs.
Relies on the architecture's bits (`x86`) and the access flags.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final, Protocol, TypeAlias, TypeVar

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.protocol.events import AccessFlag

__all__ = [
    "EptMisconfig",
    "PendingWalk",
    "Tables",
    "Translation",
    "WalkFault",
    "WalkResult",
    "hardware_walk",
    "leaf_frame",
]

T = TypeVar("T")

RESERVED_MASK: Final = ((1 << 52) - 1) & ~((1 << 40) - 1)
"""Bits 40 to 51: reserved on a processor with 40 bits of physical address."""

_WRITABLE_AND_USER: Final = x86.PT_WRITABLE_MASK | x86.PT_USER_MASK


class Translation(msgspec.Struct, frozen=True, tag="translation", gc=False):
    """A walk's success. `pfn` of the leaf's first 4 KiB frame; `level` of the leaf; `flags`: AccessFlag bits 8 up."""

    pfn: int
    level: int
    flags: int


class WalkFault(msgspec.Struct, frozen=True, tag="walk_fault", gc=False):
    """A walk's failure. `error_code`: PFERR bits."""

    error_code: int


class EptMisconfig(msgspec.Struct, frozen=True, tag="ept_misconfig", gc=False):
    """A walk of EPT tables met an entry whose bits contradict one another: KVM's mark for a frame without memory."""


WalkResult: TypeAlias = Translation | WalkFault | EptMisconfig
PendingWalk: TypeAlias = Generator[None, None, WalkResult]
"""A walk under way: it yields before each read of an entry."""


class Tables(Protocol[T]):
    """Paging structures, in whatever form; `T` names one table."""

    def read(self, table: T, index: int) -> int:
        """The entry, as the processor's load sees it."""
        ...

    def child(self, table: T, index: int, entry: int) -> T:
        """The table that `entry`, read at `index` of `table`, leads to."""
        ...

    def set_bits(self, table: T, index: int, expected: int, bits: int) -> bool:
        """Atomically set `bits` in the entry if it is still `expected`. Whether it was."""
        ...


def hardware_walk(
    tables: Tables[T],
    root: T,
    gva: int,
    flags: int,
    level: int = x86.PT64_ROOT_LEVEL,
    *,
    smep: bool = False,
) -> PendingWalk:
    """Translate `gva` for an access of type `flags` (AccessFlag bits 0 to 4); yields before each entry's read.

    `level` is that of `root`: 4 for a 4-level table, 3 for the four PAE root entries, which are chosen by address
    bits 31:30, carry no permissions and have no accessed bit. `smep`: CR4.SMEP is set, so that the supervisor may not
    fetch from what every level lets users access.

    A successful walk sets A in every entry that it used, and D in the leaf for a write, each by an atomic update; if
    an entry has changed since it was read, the walk starts again. A faulting walk sets nothing.
    """
    write = bool(flags & AccessFlag.WRITE)
    user = bool(flags & AccessFlag.USER)
    fetch = bool(flags & AccessFlag.FETCH)
    request = (
        (x86.PFERR_WRITE_MASK if write else 0)
        | (x86.PFERR_USER_MASK if user else 0)
        | (x86.PFERR_FETCH_MASK if fetch else 0)
    )
    pae = level == x86.PT32E_ROOT_LEVEL
    while True:
        table = root
        at = level
        rights = _WRITABLE_AND_USER
        no_execute = 0
        used: list[tuple[T, int, int]] = []
        while True:
            index = (gva >> 30) & 3 if pae and at == level else x86.pt64_index(gva, at)
            yield
            entry = tables.read(table, index)
            if not entry & x86.PT_PRESENT_MASK:
                return WalkFault(request)
            if entry & RESERVED_MASK:
                return WalkFault(request | x86.PFERR_PRESENT_MASK | x86.PFERR_RSVD_MASK)
            if pae and at == level:
                table = tables.child(table, index, entry)
                at -= 1
                continue
            rights &= entry
            no_execute |= entry & x86.PT64_NX_MASK
            used.append((table, index, entry))
            if at == x86.PT_PAGE_TABLE_LEVEL or (at <= x86.PT_PDPE_LEVEL and entry & x86.PT_PAGE_SIZE_MASK):
                break
            table = tables.child(table, index, entry)
            at -= 1
        if (
            (write and not rights & x86.PT_WRITABLE_MASK)
            or (user and not rights & x86.PT_USER_MASK)
            or (fetch and (no_execute or (smep and not user and rights & x86.PT_USER_MASK)))
        ):
            return WalkFault(request | x86.PFERR_PRESENT_MASK)
        leaf = used[-1][2]
        if _set_accessed_dirty(tables, used, write):
            break
    result = 0
    if rights & x86.PT_WRITABLE_MASK:
        result |= AccessFlag.MAY_WRITE
    if rights & x86.PT_USER_MASK:
        result |= AccessFlag.MAY_USER
        if smep:
            result |= AccessFlag.SMEP
    if not no_execute:
        result |= AccessFlag.MAY_FETCH
    if write or leaf & x86.PT_DIRTY_MASK:
        result |= AccessFlag.DIRTY
    if at > x86.PT_PAGE_TABLE_LEVEL:
        result |= AccessFlag.LARGE
    return Translation(leaf_frame(leaf, at), at, int(result))


def leaf_frame(leaf: int, level: int) -> int:
    """The first 4 KiB frame of what the entry `leaf` at `level` maps."""
    frame = (leaf & x86.PT64_BASE_ADDR_MASK) >> x86.PAGE_SHIFT
    return frame & ~((1 << (x86.PT64_LEVEL_BITS * (level - 1))) - 1)


def _set_accessed_dirty(tables: Tables[T], used: list[tuple[T, int, int]], write: bool) -> bool:
    """Set the bits of a successful walk, top down. False if an entry had changed."""
    last = len(used) - 1
    for position, (table, index, entry) in enumerate(used):
        bits = x86.PT_ACCESSED_MASK
        if write and position == last:
            bits |= x86.PT_DIRTY_MASK
        if entry & bits != bits and not tables.set_bits(table, index, entry, bits):
            return False
    return True
