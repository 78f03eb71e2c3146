"""A virtual CPU as the MMU sees it (struct kvm_vcpu, kvm_vcpu_arch, kvm_mmu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

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
from shadowmmu.kvm.store_buffer import StoreBuffer
from shadowmmu.protocol.messages import MemoryModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from shadowmmu.kvm.contexts import MmuContext
    from shadowmmu.kvm.effects import Operation
    from shadowmmu.kvm.page import ShadowPage
    from shadowmmu.kvm.vm import Kvm
    from shadowmmu.kvm.walker import GuestWalker

__all__ = ["Mmu", "PagingUnit", "TranslateGpa", "Vcpu"]


TranslateGpa: TypeAlias = "Callable[[int, int], Operation[GuestWalker]]"
"""(guest physical address in bytes, PFERR_* bits of the access) -> the walk that translated it."""


class Mmu:
    """The paging context of a vCPU (struct kvm_mmu).

    `root_hpa` is the address of the root shadow page, INVALID_PAGE without a root; with PAE shadow tables the roots
    are the four `pae_root` entries, and root_hpa only says that they are loaded. `valid_gpte_test`: a guest entry of
    level 1 may be mapped without a walk exactly if `gpte & valid_gpte_test == valid_gpte`, which is P | A.
    `loading_roots` are the pages that a root load at work has counted and not put in place yet. `translate_gpa`: how
    the addresses that the guest's tables give become the machine's; None if they are these (always, but for the guest
    of a guest).
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
        "translate_gpa",
        "valid_gpte",
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
        self.valid_gpte = self.valid_gpte_test = PT_PRESENT_MASK | PT_ACCESSED_MASK
        self.translate_gpa: TranslateGpa | None = None


class PagingUnit:
    """What a walk of a guest's tables depends on: the registers and the paging context.

    `vcpu_id` is the vCPU that walks. `pdptrs` are the cached PDPTEs of PAE paging.
    """

    __slots__ = ("cr0", "cr3", "cr4", "efer", "kvm", "mmu", "pdptrs", "vcpu_id")

    def __init__(self, kvm: Kvm, vcpu_id: int, context: MmuContext) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.cr0 = CR0_AT_RESET
        self.cr3 = 0
        self.cr4 = 0
        self.efer = 0
        self.pdptrs = [0, 0, 0, 0]
        self.mmu = Mmu(context)

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


class Vcpu(PagingUnit):
    """One virtual CPU.

    `requests` are KVM_REQ_* bits. `exception` is the page fault queued for injection: (error code, cr2), or None.
    `last_pte_updated` is the address of the shadow entry that was last set speculatively, 0 for none.
    `mmio_generation`: of the memory slots, when the MMIO cache was last filled. `store_buffer` has the stores of the
    vCPU's host thread that others do not see yet; None with memory model sc. `cpu`: the physical processor on which it
    was loaded last; `next_cpu`: on which it will be.
    """

    __slots__ = (
        "cpu",
        "cr2",
        "exception",
        "last_pt_write_count",
        "last_pt_write_gfn",
        "last_pte_gfn",
        "last_pte_updated",
        "mmio_access",
        "mmio_generation",
        "mmio_gfn",
        "mmio_gva",
        "mode",
        "next_cpu",
        "requests",
        "store_buffer",
    )

    def __init__(self, kvm: Kvm, vcpu_id: int, context: MmuContext) -> None:
        super().__init__(kvm, vcpu_id, context)
        self.mode = VcpuMode.OUTSIDE_GUEST_MODE
        self.requests = 0
        self.cpu = self.next_cpu = vcpu_id
        self.cr2 = 0
        self.exception: tuple[int, int] | None = None
        self.last_pt_write_gfn = 0
        self.last_pt_write_count = 0
        self.last_pte_updated = 0
        self.last_pte_gfn = 0
        self.mmio_gva = 0
        self.mmio_gfn = 0
        self.mmio_access = 0
        self.mmio_generation = 0
        tso = kvm.config.memory_model is MemoryModel.TSO
        self.store_buffer: StoreBuffer | None = StoreBuffer(self) if tso else None

    def request_names(self) -> list[str]:
        """The pending requests by name."""
        return [name for bit, name in REQUEST_NAMES.items() if self.requests & bit]

    def __repr__(self) -> str:
        return f"<Vcpu {self.vcpu_id} {self.mode.name} requests={self.request_names()}>"
