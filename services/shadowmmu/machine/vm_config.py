"""From a run's configuration to the virtual machine's.

Guest memory is two slots: the last quarter (in whole blocks of 512 frames) is backed by host pages of 2 MiB, the rest
by small ones, so that a run meets shadow entries of both sizes.
"""

from __future__ import annotations

from shadowmmu.cpu.guest import huge_base
from shadowmmu.kvm import Backing, KvmConfig, MemorySlot, Profile
from shadowmmu.protocol.messages import Mutant, RunConfig

__all__ = ["kvm_config"]


def kvm_config(config: RunConfig) -> KvmConfig:
    """The machine for a run. Raises ProfileError for an unknown profile."""
    base = huge_base(config.memory_pages)
    slots = [MemorySlot(0, 0, base, Backing.SMALL)]
    if base < config.memory_pages:
        slots.append(MemorySlot(1, base, config.memory_pages - base, Backing.HUGE_2M))
    profile = config.profile
    if config.mutant is Mutant.NOTIFIER_IGNORES_TLBS_DIRTY:
        profile += "-sync-drop-noflush"
    return KvmConfig(memslots=tuple(slots), n_max_mmu_pages=config.mmu_pages, profile=Profile.parse(profile))
