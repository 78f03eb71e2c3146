"""The shadow tables of the model, as the hardware walk sees them.

Relies on the model for where a vCPU's tables begin (one root table of four levels, or the four PAE root entries that
the processor chooses from by address bits 31:30), for their format, and for what an entry is that maps nothing.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from shadowmmu.cpu import PendingWalk, ept_walk, hardware_walk
from shadowmmu.cpu.x86 import (
    PT32E_ROOT_LEVEL,
    PT64_BASE_ADDR_MASK,
    PT_PRESENT_MASK,
    X86_CR0_PG,
    X86_CR4_SMEP,
)
from shadowmmu.kvm import Kvm, ShadowPage, Vcpu
from shadowmmu.kvm.constants import INVALID_PAGE
from shadowmmu.kvm.roots import has_single_root
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.messages import Tdp

__all__ = ["PaeRoots", "ShadowTables"]

_FREED: Final = ShadowPage(0, 0, 0)
"""What a walk finds where a shadow page was freed under it: nothing present. Only a service that does not wait for
the answers to its kicks lets a walk come here."""


class PaeRoots:
    """The four root entries of PAE paging, in the form of a table: `spt` has all four, 0 where a root is absent."""

    __slots__ = ("spt",)

    def __init__(self, roots: list[int]) -> None:
        self.spt = {
            index: 0 if root in (0, INVALID_PAGE) else root & PT64_BASE_ADDR_MASK | PT_PRESENT_MASK
            for index, root in enumerate(roots)
        }


Table: TypeAlias = ShadowPage | PaeRoots


class ShadowTables:
    """`shadowmmu.cpu.Tables` over a virtual machine; a table is a shadow page, or the PAE roots of a vCPU."""

    def __init__(self, kvm: Kvm) -> None:
        self._page_header = kvm.page_header
        self._tdp = kvm.config.tdp
        self._nothing = kvm.shadow_trap_nonpresent_pte

    def walk(self, vcpu: Vcpu, gva: int, flags: int) -> PendingWalk:
        """The hardware walk of a vCPU in guest mode, for an access of type `flags` (AccessFlag bits 0 to 4).

        With two-dimensional paging `gva` is guest physical. In nested page tables (NPT) every access is a user access.
        """
        mmu = vcpu.mmu
        # With paging off the processor pages all the same, and later kernels clear SMEP there (3.1 forgot to).
        smep = vcpu.cr4 & X86_CR4_SMEP != 0 and vcpu.cr0 & X86_CR0_PG != 0
        if not has_single_root(vcpu):
            return hardware_walk(self, PaeRoots(mmu.pae_root), gva, flags, PT32E_ROOT_LEVEL, smep=smep)
        root = self._page_header.get(mmu.root_hpa, _FREED)
        match self._tdp:
            case Tdp.EPT:
                return ept_walk(self, root, gva, flags)
            case Tdp.NPT:
                return hardware_walk(self, root, gva, flags | AccessFlag.USER)
            case None:
                return hardware_walk(self, root, gva, flags, smep=smep)

    def read(self, table: Table, index: int) -> int:
        """The shadow entry, as the processor's load sees it."""
        return table.spt.get(index, self._nothing)

    def child(self, table: Table, index: int, entry: int) -> Table:  # noqa: ARG002 - the protocol's
        """The shadow page that a table entry leads to."""
        return self._page_header.get(entry & PT64_BASE_ADDR_MASK, _FREED)

    def set_bits(self, table: Table, index: int, expected: int, bits: int) -> bool:
        """Sets accessed or dirty bits, if the entry is still `expected`."""
        if table.spt.get(index, self._nothing) != expected:
            return False
        table.spt[index] = expected | bits
        return True
