"""A virtual CPU as the MMU sees it (struct kvm_vcpu, kvm_vcpu_arch, kvm_mmu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import (
    CR0_AT_RESET,
    EFER_LMA,
    PT_ACCESSED_MASK,
    PT_PRESENT_MASK,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
)
from shadowmmu.kvm.constants import INVALID_PAGE, REQUEST_NAMES, VcpuMode
from shadowmmu.kvm.gpte import FORMAT_64, GuestFormat, ReservedBits

if TYPE_CHECKING:
    from shadowmmu.kvm.contexts import MmuContext
    from shadowmmu.kvm.page import ShadowPage
    from shadowmmu.kvm.vm import Kvm

__all__ = ["Mmu", "Vcpu"]


class Mmu:
    """The paging context of a vCPU (struct kvm_mmu).

    `root_hpa` is the address of the root shadow page, INVALID_PAGE without a root; with PAE shadow tables the roots
    are the four `pae_root` entries, and root_hpa only says that they are loaded. `valid_gpte_test`: a guest entry of
    level 1 may be mapped without a walk exactly if `gpte & valid_gpte_test == P | A`. `loading_roots` are the pages
    that a root load at work has counted and not put in place yet.
    """

    __slots__ = (
        "base_role",
        "context",
        "direct_map",
        "fmt",
        "large_levels",
        "loading_roots",
        "nx",
        "pae_root",
        "root_hpa",
        "root_level",
        "rsvd_bits_mask",
        "shadow_root_level",
        "valid_gpte_test",
    )

    def __init__(self, context: MmuContext) -> None:
        self.context = context
        self.fmt: GuestFormat = FORMAT_64
        self.root_hpa = INVALID_PAGE
        self.root_level = 0
        self.shadow_root_level = 0
        self.direct_map = True
        self.nx = False
        self.base_role = 0
        self.pae_root = [INVALID_PAGE] * 4
        self.rsvd_bits_mask: ReservedBits = ([0] * 4, [0] * 4)
        self.large_levels = 0
        self.loading_roots: list[ShadowPage] = []
        self.valid_gpte_test = PT_PRESENT_MASK | PT_ACCESSED_MASK


class Vcpu:
    """One virtual CPU.

    `requests` are KVM_REQ_* bits. `exception` is the page fault queued for injection: (error code, cr2), or None.
    `last_pte_updated` is the address of the shadow entry that was last set speculatively, 0 for none.
    """

    __slots__ = (
        "cr0",
        "cr2",
        "cr3",
        "cr4",
        "efer",
        "exception",
        "kvm",
        "last_pt_write_count",
        "last_pt_write_gfn",
        "last_pte_gfn",
        "last_pte_updated",
        "mmio_access",
        "mmio_gfn",
        "mmio_gva",
        "mmu",
        "mode",
        "pdptrs",
        "requests",
        "vcpu_id",
    )

    def __init__(self, kvm: Kvm, vcpu_id: int, context: MmuContext) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.mode = VcpuMode.OUTSIDE_GUEST_MODE
        self.requests = 0
        self.cr0 = CR0_AT_RESET
        self.cr2 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.efer = 0
        self.pdptrs = [0, 0, 0, 0]
        self.mmu = Mmu(context)
        self.exception: tuple[int, int] | None = None
        self.last_pt_write_gfn = 0
        self.last_pt_write_count = 0
        self.last_pte_updated = 0
        self.last_pte_gfn = 0
        self.mmio_gva = 0
        self.mmio_gfn = 0
        self.mmio_access = 0

    @property
    def is_paging(self) -> bool:
        """CR0.PG."""
        return self.cr0 & X86_CR0_PG != 0

    @property
    def is_write_protection(self) -> bool:
        """CR0.WP."""
        return self.cr0 & X86_CR0_WP != 0

    @property
    def is_pae(self) -> bool:
        """CR4.PAE."""
        return self.cr4 & X86_CR4_PAE != 0

    @property
    def is_pse(self) -> bool:
        """CR4.PSE."""
        return self.cr4 & X86_CR4_PSE != 0

    @property
    def is_long_mode(self) -> bool:
        """EFER.LMA."""
        return self.efer & EFER_LMA != 0

    def request_names(self) -> list[str]:
        """The pending requests by name."""
        return [name for bit, name in REQUEST_NAMES.items() if self.requests & bit]

    def __repr__(self) -> str:
        return f"<Vcpu {self.vcpu_id} {self.mode.name} requests={self.request_names()}>"
