"""The guest of a guest: translating its addresses with both of the guest's sets of tables.

When a guest is a hypervisor itself and runs a guest with nested paging, two sets of tables in guest memory lie between
an address of the inner guest (L2) and memory: L2's own, and those that the outer guest (L1) made for L2's physical
addresses. KVM walks both to emulate an instruction of L2: every table that it reads, and the page in the end, is given
as an address that L1's tables translate first (walk_addr_nested, translate_nested_gpa).

The vCPU's own context, with its CR3, stands for L1's nested tables here: that is what it shadows meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PFERR_USER_MASK
from shadowmmu.kvm.contexts import guest_context, set_guest_format
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.pdptrs import load_pdptrs
from shadowmmu.kvm.vcpu import PagingUnit
from shadowmmu.kvm.walker import GuestWalker

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["NestedGuest", "gva_to_gpa_nested"]


class NestedGuest(PagingUnit):
    """Registers and paging context of L2 on a vCPU (vcpu->arch.nested_mmu)."""

    __slots__ = ("_vcpu",)

    def __init__(self, vcpu: Vcpu, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        super().__init__(vcpu.kvm, vcpu.vcpu_id, vcpu.mmu.context)
        self._vcpu = vcpu
        self.cr0, self.cr3, self.cr4, self.efer = cr0, cr3, cr4, efer
        self.mmu.context = guest_context(self)
        set_guest_format(self, self.mmu.context)
        self.mmu.translate_gpa = self.translate_nested_gpa

    def load(self) -> Operation[bool]:
        """What entering L2 does: in PAE mode the PDPTEs are read. False if they cannot be, or are malformed."""
        if self.is_paging and self.is_pae and not self.is_long_mode:
            return (yield from load_pdptrs(self, self.cr3))
        return True

    def translate_nested_gpa(self, gpa: int, access: int) -> Operation[GuestWalker]:
        """An L2 physical address by L1's tables; for the processor all such accesses are user accesses."""
        return self._vcpu.mmu.context.gva_to_gpa(self._vcpu, gpa, access | PFERR_USER_MASK)


def gva_to_gpa_nested(guest: NestedGuest, gva: int, access: int) -> Operation[GuestWalker]:
    """Translate an address of L2 for an access of that kind (PFERR_* bits), setting A and D in both sets of tables.

    In the result `fault` is the error code of a page fault of L2's own; `nested_fault` says that L1's tables do not
    allow an access to L2's memory at that address: of a table, which Linux 3.1 then reports as not present (`fault` is
    set too), or of the page itself. (Linux 3.1 judges L2's entries by the reserved bits of L1's mode; here they are
    judged by those of L2's own, which differs only if the two modes do.)
    """
    if not guest.is_paging:
        walker = yield from guest.translate_nested_gpa(gva, access)
        if walker.fault is not None:
            walker.nested_fault, walker.fault = (gva, walker.fault), None
        return walker
    return (yield from guest.mmu.context.gva_to_gpa(guest, gva, access))
