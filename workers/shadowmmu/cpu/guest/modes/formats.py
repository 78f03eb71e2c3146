"""Paging modes as a program sees them: register values that select them, and how an address indexes tables.

A mode is a `GuestMode` other than MIXED. Relies on the architecture's bits (`x86`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.protocol.messages import ControlRegister, GuestMode

__all__ = ["FORMATS", "MODES", "Format", "Registers", "registers_for"]

MODES: Final = (GuestMode.PAGING64, GuestMode.PAE, GuestMode.PAGING32, GuestMode.NONPAGING)
"""In the order in which neighbouring vCPUs of a mixed run begin."""


class Format(NamedTuple):
    """`levels`: from the root down, how far right an address goes and the mask of the index then.

    `size`: bytes of an entry. `large`: address bits inside a large page of the level above the last.
    """

    levels: tuple[tuple[int, int], ...]
    size: int
    large: int


FORMATS: Final = {
    GuestMode.PAGING64: Format(((39, 511), (30, 511), (21, 511), (12, 511)), 8, 21),
    GuestMode.PAE: Format(((30, 3), (21, 511), (12, 511)), 8, 21),
    GuestMode.PAGING32: Format(((22, 1023), (12, 1023)), 4, 22),
}
"""Of the modes with paging."""


class Registers(msgspec.Struct):
    """A vCPU's control registers and EFER, as last written (LMA, which cannot be written, is left out)."""

    cr0: int
    cr3: int
    cr4: int
    efer: int

    def write(self, register: ControlRegister, value: int) -> None:
        """What the instruction that writes `register` does, if it is not refused."""
        setattr(self, register.value, value)

    @property
    def mode(self) -> GuestMode:
        """The paging mode that they select."""
        if not self.cr0 & x86.X86_CR0_PG:
            return GuestMode.NONPAGING
        if self.efer & x86.EFER_LME:
            return GuestMode.PAGING64
        return GuestMode.PAE if self.cr4 & x86.X86_CR4_PAE else GuestMode.PAGING32


def registers_for(mode: GuestMode, cr3: int, old: Registers | None = None) -> Registers:
    """Registers that select `mode`; WP, PGE and NX as in `old`, or else set. In 32-bit paging PSE is set."""
    wp = x86.X86_CR0_WP if old is None else old.cr0 & x86.X86_CR0_WP
    pge = x86.X86_CR4_PGE if old is None else old.cr4 & x86.X86_CR4_PGE
    nx = x86.EFER_NX if old is None else old.efer & x86.EFER_NX
    cr0 = x86.X86_CR0_PE | wp | (0 if mode is GuestMode.NONPAGING else x86.X86_CR0_PG)
    pae = mode in (GuestMode.PAGING64, GuestMode.PAE)
    cr4 = pge | (x86.X86_CR4_PAE if pae else x86.X86_CR4_PSE)
    return Registers(cr0, cr3, cr4, nx | (x86.EFER_LME if mode is GuestMode.PAGING64 else 0))
