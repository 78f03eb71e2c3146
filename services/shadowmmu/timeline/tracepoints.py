"""The kernel's tracepoints that are no events, as text: what `TP_printk` makes of their arguments in mmutrace.h.

`TracepointTexts` is what `Kvm.tracepoints` is set to while a run is executed for its trace. A page is shown as it is at
that moment, so the text is made at once. Names and text are those of a kernel of today, without what 3.1 does not have.
Relies on `shadowmmu.kvm` (role words, the protocol of tracepoints).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from shadowmmu.kvm import AuditPoint, ShadowPage
from shadowmmu.kvm.role import (
    ROLE_ACCESS_MASK,
    ROLE_ACCESS_SHIFT,
    ROLE_CR4_PAE,
    ROLE_DIRECT,
    ROLE_INVALID,
    ROLE_LEVEL_MASK,
    ROLE_NXE,
    ROLE_QUADRANT_MASK,
    ROLE_QUADRANT_SHIFT,
)

__all__ = ["Traced", "TracepointTexts", "page_text"]

_ACCESS: Final = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")
_PFERR: Final = ((1, "P"), (2, "W"), (4, "U"), (8, "RSVD"), (16, "F"))


class Traced(NamedTuple):
    """A tracepoint that was hit: by the thread of a vCPU, or (None) by whoever holds mmu_lock; name and text."""

    vcpu: int | None
    text: str


def page_text(gfn: int, role: int, root_count: int, *, unsync: bool) -> str:
    """A shadow page (KVM_MMU_PAGE_PRINTK); `role` is the kernel's role word."""
    size = 8 if role & (ROLE_CR4_PAE | ROLE_DIRECT) else 4
    return (
        f"sp gfn {gfn:x} l{role & ROLE_LEVEL_MASK} {size}-byte "
        f"q{(role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT}{' direct' if role & ROLE_DIRECT else ''} "
        f"{_ACCESS[(role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT]}{' invalid' if role & ROLE_INVALID else ''} "
        f"{'' if role & ROLE_NXE else '!'}nxe root {root_count} {'unsync' if unsync else 'sync'}"
    )


def _pferr(code: int) -> str:
    flags = "|".join(name for bit, name in _PFERR if code & bit)
    return f"pferr {code:x} {flags}"


class TracepointTexts:
    """Hands each tracepoint to `put` as it is hit (`shadowmmu.kvm.Tracepoints`)."""

    def __init__(self, put: Callable[[Traced], object]) -> None:
        self._put = put

    def kvm_mmu_pagetable_walk(self, vcpu_id: int, addr: int, pferr: int) -> None:
        self._put(Traced(vcpu_id, f"kvm_mmu_pagetable_walk: addr {addr:x} {_pferr(pferr)}"))

    def kvm_mmu_paging_element(self, vcpu_id: int, pte: int, level: int) -> None:
        self._put(Traced(vcpu_id, f"kvm_mmu_paging_element: pte {pte:x} level {level}"))

    def kvm_mmu_set_accessed_bit(self, vcpu_id: int, gpa: int) -> None:
        self._put(Traced(vcpu_id, f"kvm_mmu_set_accessed_bit: gpa {gpa:x}"))

    def kvm_mmu_set_dirty_bit(self, vcpu_id: int, gpa: int) -> None:
        self._put(Traced(vcpu_id, f"kvm_mmu_set_dirty_bit: gpa {gpa:x}"))

    def kvm_mmu_walker_error(self, vcpu_id: int, pferr: int) -> None:
        self._put(Traced(vcpu_id, f"kvm_mmu_walker_error: {_pferr(pferr)}"))

    def handle_mmio_page_fault(self, vcpu_id: int, addr: int, gfn: int, access: int) -> None:
        self._put(Traced(vcpu_id, f"handle_mmio_page_fault: addr:{addr:x} gfn {gfn:x} access {access:x}"))

    def kvm_mmu_get_page(self, sp: ShadowPage, *, created: bool) -> None:
        page = page_text(sp.gfn, sp.role, sp.root_count, unsync=sp.unsync)
        self._put(Traced(None, f"kvm_mmu_get_page: {page} {'new' if created else 'existing'}"))

    def mark_mmio_spte(self, sptep: int, gfn: int, access: int) -> None:
        self._put(Traced(None, f"mark_mmio_spte: sptep:{sptep:016x} gfn {gfn:x} access {access:x}"))

    def kvm_mmu_audit(self, cpu: int, point: AuditPoint) -> None:
        self._put(Traced(None, f"kvm_mmu_audit: vcpu:{cpu} {point.value}"))

    def kvm_age_page(self, hva: int, gfn: int, *, referenced: bool) -> None:
        self._put(Traced(None, f"kvm_age_page: hva {hva:x} gfn {gfn:x} {'YOUNG' if referenced else 'OLD'}"))
