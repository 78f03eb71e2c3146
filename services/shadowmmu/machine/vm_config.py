"""From a run's configuration to the virtual machine's, and to what the processor is told about it.

Guest memory is two slots: the last quarter (in whole blocks of 512 frames) is backed by host pages of 2 MiB, the rest
by small ones, so that a run meets shadow entries of both sizes.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.guest import huge_base
from shadowmmu.cpu.x86 import PFERR_PRESENT_MASK
from shadowmmu.kvm import Backing, KvmConfig, MemorySlot, Profile
from shadowmmu.protocol.messages import Attached, Mutant, RunConfig

__all__ = ["PageFaultFilter", "kvm_config", "page_fault_filter", "welcome"]


def kvm_config(config: RunConfig) -> KvmConfig:
    """The machine for a run. Raises ProfileError for an unknown profile."""
    base = huge_base(config.memory_pages)
    slots = [MemorySlot(0, 0, base, Backing.SMALL)]
    if base < config.memory_pages:
        slots.append(MemorySlot(1, base, config.memory_pages - base, Backing.HUGE_2M))
    profile = config.profile
    if config.mutant is Mutant.NOTIFIER_IGNORES_TLBS_DIRTY:
        profile += "-sync-drop-noflush"
    return KvmConfig(
        memslots=tuple(slots),
        n_max_mmu_pages=config.mmu_pages,
        profile=Profile.parse(profile),
        tdp=config.tdp,
        bypass_guest_pf=config.bypass_guest_pf,
        memory_model=config.memory_model,
    )


class PageFaultFilter(msgspec.Struct, frozen=True):
    """Which page faults of the guest exit: VMX's page-fault error-code mask and match (PFEC_MASK, PFEC_MATCH)."""

    mask: int
    match: int

    def exits(self, error_code: int) -> bool:
        """Whether a fault with these PFERR bits exits; if not, the guest takes it."""
        return error_code & self.mask == self.match


_ALL_EXIT: Final = PageFaultFilter(0, 0)
_PRESENT_EXIT: Final = PageFaultFilter(PFERR_PRESENT_MASK, PFERR_PRESENT_MASK)


def page_fault_filter(config: RunConfig) -> PageFaultFilter:
    """With bypass_guest_pf, faults on entries that are not present go to the guest (vmx_vcpu_setup)."""
    return _PRESENT_EXIT if config.bypass_guest_pf else _ALL_EXIT


def welcome(
    config: RunConfig, vcpu: int | None, incarnation: int, heartbeat: float, token: bytes = b""
) -> Attached:
    """What a peer is told when it attaches as `vcpu`; `heartbeat` in seconds, `token` to be resumed with."""
    faults = page_fault_filter(config)
    return Attached(vcpu, incarnation, config.vpid, heartbeat, faults.mask, faults.match, token)
