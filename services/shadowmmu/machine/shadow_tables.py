"""The shadow tables of the model, as the hardware walk sees them."""

from __future__ import annotations

from typing import Final

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK
from shadowmmu.kvm import Kvm, ShadowPage, Vcpu

__all__ = ["ShadowTables"]

_FREED: Final = ShadowPage(0, 0, 0)
"""What a walk finds where a shadow page was freed under it: nothing present. Only a service that does not wait for
the answers to its kicks lets a walk come here."""


class ShadowTables:
    """`shadowmmu.cpu.Tables` over a virtual machine; a table is a shadow page."""

    def __init__(self, kvm: Kvm) -> None:
        self._page_header = kvm.page_header

    def root(self, vcpu: Vcpu) -> ShadowPage:
        """The table that a vCPU in guest mode runs on."""
        return self._page_header.get(vcpu.mmu.root_hpa, _FREED)

    def read(self, table: ShadowPage, index: int) -> int:
        """The shadow entry, 0 if there is none."""
        return table.spt.get(index, 0)

    def child(self, table: ShadowPage, index: int, entry: int) -> ShadowPage:  # noqa: ARG002 - the protocol's
        """The shadow page that a table entry leads to."""
        return self._page_header.get(entry & PT64_BASE_ADDR_MASK, _FREED)

    def set_bits(self, table: ShadowPage, index: int, expected: int, bits: int) -> bool:
        """Sets accessed or dirty bits, if the entry is still `expected`."""
        if table.spt.get(index, 0) != expected:
            return False
        table.spt[index] = expected | bits
        return True
