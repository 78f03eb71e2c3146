"""The kernel's tracepoints beside the event stream (arch/x86/kvm/mmutrace.h, include/trace/events/kvm.h).

Events say what observers have to know of the state; a tracepoint says that the kernel came by, also where nothing has
changed. Whoever wants to see that sets `Kvm.tracepoints`; None, as it is else, costs a test. Methods have the names of
the tracepoints of Linux 3.1, are called where the kernel has them, and must change nothing.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shadowmmu.kvm.page import ShadowPage

__all__ = ["AuditPoint", "Tracepoints"]


class AuditPoint(enum.Enum):
    """Where the kernel may audit its structures (audit_point_name)."""

    PRE_PAGE_FAULT = "pre page fault"
    POST_PAGE_FAULT = "post page fault"
    PRE_PTE_WRITE = "pre pte write"
    POST_PTE_WRITE = "post pte write"
    PRE_SYNC = "pre sync"
    POST_SYNC = "post sync"


class Tracepoints(Protocol):
    """Who is told of tracepoints.

    The first five and handle_mmio_page_fault are hit by the thread of vCPU `vcpu_id`; the others under mmu_lock, by
    whoever holds it. Addresses are in bytes, frames in pages.
    """

    def kvm_mmu_pagetable_walk(self, vcpu_id: int, addr: int, pferr: int) -> None:
        """A walk of the guest's tables begins, for an access of kind `pferr` (PFERR_WRITE, _USER, _FETCH bits)."""

    def kvm_mmu_paging_element(self, vcpu_id: int, pte: int, level: int) -> None:
        """The walk has read a guest entry."""

    def kvm_mmu_set_accessed_bit(self, vcpu_id: int, gpa: int) -> None:
        """The walk is about to set A in the guest entry there, if it is still as it was read."""

    def kvm_mmu_set_dirty_bit(self, vcpu_id: int, gpa: int) -> None:
        """The same of D."""

    def kvm_mmu_walker_error(self, vcpu_id: int, pferr: int) -> None:
        """The guest's tables do not allow the access; `pferr` is the error code of the page fault."""

    def handle_mmio_page_fault(self, vcpu_id: int, addr: int, gfn: int, access: int) -> None:
        """A fault on the shadow entry of a frame without memory; `addr` is 0 in a direct map, `access` ACC_* bits."""

    def kvm_mmu_get_page(self, sp: ShadowPage, *, created: bool) -> None:
        """A shadow page was asked for; it was found, or made."""

    def mark_mmio_spte(self, sptep: int, gfn: int, access: int) -> None:
        """A shadow entry, at address `sptep`, is set for a frame without memory."""

    def kvm_mmu_audit(self, cpu: int, point: AuditPoint) -> None:
        """The vCPU on that processor is at a point at which structures may be audited."""

    def kvm_age_page(self, hva: int, gfn: int, *, referenced: bool) -> None:
        """A notifier has handled a page of the host; what "referenced" means is the notifier's affair."""
