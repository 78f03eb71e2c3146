"""What a guest's own paging structures say, by the processor manuals (Intel SDM volume 3, "Paging").

This is the yardstick for the shadow: it knows nothing of KVM and shares no code with `shadowmmu.kvm.walker`. It reads
memory through a function and changes nothing, so accessed and dirty flags are reported, not set. Modes: 64-bit (four
levels, pages of 4 KiB, 2 MiB and 1 GiB), PAE, 32-bit two-level with PSE and PSE-36, paging off. No SMEP, no global
pages, no PCID. A structure outside of memory reads as not present (the manuals leave that to the chipset, KVM does so).
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec

from shadowmmu.kvm import InstructionKind

Read = Callable[[int, int], int | None]
"""(guest physical address, bytes) to an unsigned number; None where there is no memory."""

P, W, U, A, D, PS = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7
NX = 1 << 63
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE = 1 << 4, 1 << 5
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11

FAULT_PRESENT, FAULT_WRITE, FAULT_USER, FAULT_RESERVED, FAULT_FETCH = 1, 2, 4, 8, 16


class PagingMode(enum.Enum):
    """How the control registers let the processor translate."""

    OFF = "off"
    TWO_LEVEL = "32-bit"
    PAE = "pae"
    LONG = "64-bit"


class Registers(msgspec.Struct, frozen=True):
    """The control registers that paging depends on, and the width of physical addresses (MAXPHYADDR)."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    maxphyaddr: int = 36

    @property
    def mode(self) -> PagingMode:
        """The paging mode that they select."""
        if not self.cr0 & CR0_PG:
            return PagingMode.OFF
        if self.efer & EFER_LMA:
            return PagingMode.LONG
        return PagingMode.PAE if self.cr4 & CR4_PAE else PagingMode.TWO_LEVEL

    @property
    def no_execute(self) -> bool:
        """Whether entries can forbid fetches."""
        return self.mode in (PagingMode.LONG, PagingMode.PAE) and self.efer & EFER_NXE != 0


class GuestEntry(msgspec.Struct, frozen=True):
    """A paging-structure entry that a translation uses: where it is, its value, its level (1 maps 4 KiB)."""

    gpa: int
    value: int
    level: int


class GuestPath(msgspec.Struct, frozen=True):
    """A translation: the 4 KiB frame, and the entries from the root down (none with paging off, no PAE PDPTE)."""

    gfn: int
    entries: tuple[GuestEntry, ...]


class GuestFault(msgspec.Struct, frozen=True):
    """A page fault with that error code."""

    error_code: int


def _bits(first: int, last: int) -> int:
    """The mask of bits `first` to `last`; 0 if there are none."""
    return (1 << last + 1) - (1 << first) if last >= first else 0


def _reserved(registers: Registers, entry: int, level: int) -> int:
    """The bits that must be 0 in a present entry."""
    if registers.mode is PagingMode.TWO_LEVEL:
        # PSE-36: bits 13 and up are address bits 32 and up, as far as there are any; the rest to bit 21 is reserved.
        large = level == 2 and entry & PS and registers.cr4 & CR4_PSE
        return _bits(13 + min(registers.maxphyaddr, 40) - 32, 21) if large else 0
    top = 62 if registers.mode is PagingMode.PAE else 51
    reserved = _bits(registers.maxphyaddr, top)
    if not registers.efer & EFER_NXE:
        reserved |= NX
    if entry & PS:
        if level == 4:
            reserved |= PS
        elif level > 1:
            reserved |= _bits(13, 12 + 9 * (level - 1) - 1)
    return reserved


def _is_leaf(registers: Registers, entry: int, level: int) -> bool:
    if level == 1:
        return True
    if registers.mode is PagingMode.TWO_LEVEL and not registers.cr4 & CR4_PSE:
        return False
    return entry & PS != 0


def _first_table(read: Read, registers: Registers, address: int) -> tuple[int, int] | None:
    """(physical address of the first table, its level); None if a PAE PDPTE is not present."""
    if registers.mode is PagingMode.LONG:
        return registers.cr3 & _bits(12, registers.maxphyaddr - 1), 4
    if registers.mode is PagingMode.TWO_LEVEL:
        return registers.cr3 & 0xFFFFF000, 2
    pdpte = read((registers.cr3 & 0xFFFFFFE0) + 8 * (address >> 30 & 3), 8)
    if pdpte is None or not pdpte & P:
        return None
    return pdpte & _bits(12, registers.maxphyaddr - 1), 2


def find_path(read: Read, registers: Registers, address: int) -> GuestPath | GuestFault:
    """What the tables map `address` to, rights apart. Of a fault's error code only the P and RSVD bits."""
    if registers.mode is PagingMode.OFF:
        return GuestPath(address >> 12, ())
    first = _first_table(read, registers, address)
    if first is None:
        return GuestFault(0)
    table, level = first
    size, index_bits = (4, 10) if registers.mode is PagingMode.TWO_LEVEL else (8, 9)
    entries: list[GuestEntry] = []
    while True:
        shift = 12 + index_bits * (level - 1)
        gpa = table + size * (address >> shift & (1 << index_bits) - 1)
        entry = read(gpa, size)
        if entry is None or not entry & P:
            return GuestFault(0)
        if entry & _reserved(registers, entry, level):
            return GuestFault(FAULT_PRESENT | FAULT_RESERVED)
        entries.append(GuestEntry(gpa, entry, level))
        frame = entry & _bits(12, registers.maxphyaddr - 1 if size == 8 else 31)
        if _is_leaf(registers, entry, level):
            offset = address & (1 << shift) - 1
            physical = (frame & ~((1 << shift) - 1)) | offset
            if size == 4 and level == 2:
                physical |= (entry >> 13 & 0xFF) << 32
            return GuestPath(physical >> 12, tuple(entries))
        table, level = frame, level - 1


def allows(registers: Registers, entries: tuple[GuestEntry, ...], kind: InstructionKind, user: bool) -> bool:
    """Whether these entries' rights permit an access (one of READ, WRITE, EXECUTE)."""
    for entry in entries:
        if user and not entry.value & U:
            return False
        if kind is InstructionKind.EXECUTE and registers.no_execute and entry.value & NX:
            return False
        if kind is InstructionKind.WRITE and not entry.value & W and (user or registers.cr0 & CR0_WP):
            return False
    return True


def walk(
    read: Read, registers: Registers, address: int, kind: InstructionKind, user: bool
) -> GuestPath | GuestFault:
    """The translation that an access uses, or the page fault that it raises, by the tables as they are."""
    error_code = FAULT_USER if user else 0
    if kind is InstructionKind.WRITE:
        error_code |= FAULT_WRITE
    if kind is InstructionKind.EXECUTE and registers.no_execute:
        error_code |= FAULT_FETCH
    path = find_path(read, registers, address)
    if isinstance(path, GuestFault):
        return GuestFault(path.error_code | error_code)
    if not allows(registers, path.entries, kind, user):
        return GuestFault(error_code | FAULT_PRESENT)
    return path
