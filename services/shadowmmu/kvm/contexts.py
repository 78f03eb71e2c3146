"""Paging modes: one context object per mode, with the same few operations.

The shared algorithms call `vcpu.mmu.context` and read the format tables in `vcpu.mmu`; none of them asks for the mode.
To add a mode: a context class here, a format in `gpte` or `spte` if its entries look different, and its place in
`context_for`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from shadowmmu.cpu.x86 import (
    EFER_NX,
    PT32E_ROOT_LEVEL,
    PT64_ROOT_LEVEL,
    PT_ACCESSED_MASK,
    PT_PRESENT_MASK,
    X86_CR4_SMEP,
)
from shadowmmu.kvm.constants import INVALID_PAGE
from shadowmmu.kvm.direct import nonpaging_page_fault, tdp_page_fault
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.gpte import FORMAT_32, FORMAT_64, FORMAT_PAE, GuestFormat, rsvd_bits_mask
from shadowmmu.kvm.invlpg import paging_invlpg
from shadowmmu.kvm.notrap import paging_prefetch_page
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.paging import paging_page_fault, paging_sync_page, paging_update_pte
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.role import ROLE_CR0_WP, ROLE_CR4_PAE, ROLE_NXE, ROLE_SMEP_ANDNOT_WP
from shadowmmu.kvm.roots import mmu_alloc_direct_roots, mmu_alloc_shadow_roots, mmu_free_roots
from shadowmmu.kvm.walker import GuestWalker, walk_addr

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import PagingUnit, Vcpu

T = TypeVar("T")

__all__ = [
    "MmuContext",
    "build_context",
    "guest_context",
    "initial_context",
    "kvm_mmu_reset_context",
    "set_guest_format",
]


def _done(result: T) -> Operation[T]:
    """An operation that waits for nothing."""
    yield from ()
    return result


class MmuContext:
    """One paging mode (the function pointers and constants of struct kvm_mmu).

    This base is a guest with paging; modes without override what differs. Contexts have no state: that is in
    `vcpu.mmu`.
    """

    name: str
    root_level: int
    shadow_root_level: int
    direct_map: bool = False
    fmt: GuestFormat | None = None  # None: the guest has no tables in this mode
    supports_nx: bool = True

    def __reduce__(self) -> tuple[Callable[[str], MmuContext], tuple[str]]:
        """A copy of a machine has the same contexts."""
        return _context, (self.name,)

    def base_role(self, vcpu: Vcpu) -> int:
        """What the roles of all shadow pages have in common that the vCPU makes; EFER.NXE is in it already."""
        role = vcpu.mmu.base_role & ROLE_NXE
        if vcpu.is_pae:
            role |= ROLE_CR4_PAE
        if vcpu.is_write_protection:
            if vcpu.kvm.profile.role_bits_wp:  # bug B15 without it
                role |= ROLE_CR0_WP
        elif vcpu.cr4 & X86_CR4_SMEP:
            role |= ROLE_SMEP_ANDNOT_WP
        return role

    def page_fault(self, vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
        """Handle a page fault; 1: emulate the instruction, 0: go on."""
        return paging_page_fault(vcpu, gva, error_code, prefault)

    def gva_to_gpa(self, vcpu: PagingUnit, gva: int, access: int) -> Operation[GuestWalker]:
        """Translate an address for an access of that kind (PFERR_* bits), setting A and D."""
        return walk_addr(vcpu, gva, access)

    def sync_page(self, vcpu: Vcpu, sp: ShadowPage) -> Operation[bool]:
        """Bring a shadow page in line with its guest table; True: zap it."""
        return paging_sync_page(vcpu, sp)

    def invlpg(self, vcpu: Vcpu, gva: int) -> Operation[None]:
        """Forget what an unsync table says about an address."""
        return paging_invlpg(vcpu, gva)

    def update_pte(self, vcpu: Vcpu, sp: ShadowPage, index: int, gpte: int) -> Operation[None]:
        """Map the new value of a guest entry that was just written."""
        return paging_update_pte(vcpu, sp, index, gpte)

    def prefetch_page(self, vcpu: Vcpu, sp: ShadowPage) -> Operation[None]:
        """Fill a new shadow page's non-present entries (only with bypass_guest_pf)."""
        return paging_prefetch_page(vcpu, sp)

    def new_cr3(self, vcpu: Vcpu) -> Operation[None]:
        """CR3 has changed: the next entry loads another root."""
        return mmu_free_roots(vcpu)

    def alloc_roots(self, vcpu: Vcpu) -> Operation[bool]:
        """Get the roots; False if the guest's root is outside of memory."""
        return mmu_alloc_shadow_roots(vcpu)


class DirectContext(MmuContext):
    """A direct map: the shadow follows no guest table."""

    direct_map = True

    def sync_page(self, vcpu: Vcpu, sp: ShadowPage) -> Operation[bool]:  # noqa: ARG002
        """A guest table cannot be read in this mode: zap the page."""
        return _done(True)

    def invlpg(self, vcpu: Vcpu, gva: int) -> Operation[None]:  # noqa: ARG002
        """Nothing to forget."""
        return _done(None)

    def update_pte(self, vcpu: Vcpu, sp: ShadowPage, index: int, gpte: int) -> Operation[None]:  # noqa: ARG002
        """Not in this mode (the kernel warns): the entry stays empty."""
        return _done(None)

    def new_cr3(self, vcpu: Vcpu) -> Operation[None]:  # noqa: ARG002
        """CR3 has no effect now."""
        return _done(None)

    def prefetch_page(self, vcpu: Vcpu, sp: ShadowPage) -> Operation[None]:  # noqa: ARG002
        """Every entry traps."""
        return _done(None)

    def alloc_roots(self, vcpu: Vcpu) -> Operation[bool]:
        """The roots of a direct map."""
        return mmu_alloc_direct_roots(vcpu)


class NonPagingContext(DirectContext):
    """The guest's paging is off: addresses are guest physical, the shadow is a direct map of PAE form."""

    name = "nonpaging"
    root_level = 0
    shadow_root_level = PT32E_ROOT_LEVEL
    supports_nx = False

    def page_fault(self, vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
        """Map the frame of the address (nonpaging_page_fault)."""
        return nonpaging_page_fault(vcpu, gva, error_code, prefault)

    def gva_to_gpa(self, vcpu: PagingUnit, gva: int, access: int) -> Operation[GuestWalker]:  # noqa: ARG002
        """The address itself."""
        walker = GuestWalker(gva)
        walker.gfn = gva >> 12
        walker.level = 1
        return _done(walker)


class Paging64Context(MmuContext):
    """Four levels, entries of 8 bytes (long mode)."""

    name = "paging64"
    root_level = PT64_ROOT_LEVEL
    shadow_root_level = PT64_ROOT_LEVEL
    fmt = FORMAT_64


class Paging32EContext(MmuContext):
    """PAE: four PDPTEs, then two levels with entries of 8 bytes."""

    name = "pae"
    root_level = PT32E_ROOT_LEVEL
    shadow_root_level = PT32E_ROOT_LEVEL
    fmt = FORMAT_PAE


class Paging32Context(MmuContext):
    """Two levels with entries of 4 bytes; a guest table takes two or four shadow pages."""

    name = "paging32"
    root_level = FORMAT_32.root_level
    shadow_root_level = PT32E_ROOT_LEVEL
    fmt = FORMAT_32
    supports_nx = False


class TdpContext(DirectContext):
    """Two-dimensional paging: the processor walks the guest's tables itself, and then a direct map of guest memory.

    KVM walks the guest's tables only to emulate; how, is the affair of the guest's own paging mode.
    """

    shadow_root_level = PT64_ROOT_LEVEL

    def __init__(self, guest: MmuContext) -> None:
        self.name = f"tdp-{guest.name}"
        self.root_level = guest.root_level
        self.fmt = guest.fmt
        self.supports_nx = guest.supports_nx
        self._guest = guest

    def base_role(self, vcpu: Vcpu) -> int:  # noqa: ARG002
        """Nothing of the guest's matters."""
        return 0

    def page_fault(self, vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
        """Map the frame of the guest physical address (tdp_page_fault)."""
        return tdp_page_fault(vcpu, gva, error_code, prefault)

    def gva_to_gpa(self, vcpu: PagingUnit, gva: int, access: int) -> Operation[GuestWalker]:
        """As without two-dimensional paging."""
        return self._guest.gva_to_gpa(vcpu, gva, access)


NONPAGING: Final = NonPagingContext()
PAGING64: Final = Paging64Context()
PAGING32E: Final = Paging32EContext()
PAGING32: Final = Paging32Context()


TDP: Final[dict[MmuContext, TdpContext]] = {
    guest: TdpContext(guest) for guest in (NONPAGING, PAGING64, PAGING32E, PAGING32)
}
"""The context of each paging mode with two-dimensional paging."""


def _context(name: str) -> MmuContext:
    return next(context for context in (*TDP, *TDP.values()) if context.name == name)


def initial_context() -> MmuContext:
    """The context of a vCPU that is being made; `build_context` comes next."""
    return NONPAGING


def guest_context(vcpu: PagingUnit) -> MmuContext:
    """The paging mode that the registers select."""
    if not vcpu.is_paging:
        return NONPAGING
    if vcpu.is_long_mode:
        return PAGING64
    return PAGING32E if vcpu.is_pae else PAGING32


def build_context(vcpu: Vcpu) -> None:
    """Build the context of the mode that the registers select (init_kvm_mmu). There must be no root."""
    mmu = vcpu.mmu
    if mmu.root_hpa != INVALID_PAGE:
        raise ConfigError("the paging context cannot change while a root is loaded")
    context = guest_context(vcpu)
    if vcpu.kvm.config.tdp is not None:
        context = TDP[context]
    mmu.context = context
    mmu.root_level = context.root_level
    mmu.shadow_root_level = context.shadow_root_level
    mmu.direct_map = context.direct_map
    set_guest_format(vcpu, context)
    mmu.base_role = context.base_role(vcpu)


def set_guest_format(vcpu: PagingUnit, context: MmuContext) -> None:
    """How the guest's tables are read in this mode, and which bits its registers reserve."""
    mmu = vcpu.mmu
    mmu.nx = context.supports_nx and vcpu.efer & EFER_NX != 0
    if context.fmt is not None:
        mmu.fmt = fmt = context.fmt
        pse = vcpu.is_pse
        maxphyaddr = vcpu.kvm.config.guest_maxphyaddr
        mmu.rsvd_bits_mask = rsvd_bits_mask(fmt, mmu.rsvd_bits_mask, maxphyaddr, mmu.nx, pse)
        mmu.large_levels = fmt.large_levels if pse or not fmt.large_needs_pse else 0
        profile = vcpu.kvm.profile
        # Bug B27: without one of these tests prefetch, update and sync map what the processor may not cache.
        mmu.valid_gpte = PT_PRESENT_MASK if profile.prefetch_present else 0
        mmu.valid_gpte |= PT_ACCESSED_MASK if profile.prefetch_accessed else 0
        mmu.valid_gpte_test = mmu.valid_gpte
        mmu.valid_gpte_test |= mmu.rsvd_bits_mask[0][0] if profile.prefetch_reserved_bits else 0


def kvm_mmu_reset_context(vcpu: Vcpu) -> Operation[None]:
    """Give the roots up and build the context anew, after a register that selects the mode has changed."""
    yield Point.RESET_CONTEXT
    yield from mmu_free_roots(vcpu)
    build_context(vcpu)
