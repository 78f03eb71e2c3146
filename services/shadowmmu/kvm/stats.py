"""The kernel's counters of the MMU (struct kvm_stat, and the vCPUs' own ones summed)."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["COUNTERS", "KvmStat", "NotrapStat"]


@dataclass(slots=True)
class KvmStat:
    """Counters under KVM's names; all start at 0.

    `lpages` is the kernel's sloppy bookkeeping and may go below 0. `mmu_unsync` is the number of shadow pages out of
    sync at present, `mmu_unsync_highest` the most there have been (ours, not the kernel's). `remote_tlb_flush` counts
    the flushes that kicked somebody. `hw_flush` counts TLB_FLUSH requests served at guest entry.
    """

    # of the virtual machine
    mmu_shadow_zapped: int = 0
    mmu_pte_write: int = 0
    mmu_pte_updated: int = 0
    mmu_pde_zapped: int = 0
    mmu_flooded: int = 0
    mmu_recycled: int = 0
    mmu_cache_miss: int = 0
    mmu_unsync: int = 0
    remote_tlb_flush: int = 0
    lpages: int = 0
    # summed over vCPUs
    pf_fixed: int = 0
    pf_guest: int = 0
    tlb_flush: int = 0
    invlpg: int = 0
    mmio_exits: int = 0
    hw_flush: int = 0
    # not the kernel's
    mmu_unsync_highest: int = 0

    def counters(self) -> dict[str, int]:
        """The counters of FORMAT.md section 6 by name, in that order."""
        return {name: getattr(self, name) for name in COUNTERS}


COUNTERS = tuple(f.name for f in fields(KvmStat) if f.name != "mmu_unsync_highest")
"""Names of the counters that recordings of the real code have."""


@dataclass(slots=True)
class NotrapStat:
    """Shadow entries that became "notrap", by where, and those that became "trap" again because a page went unsync."""

    prefetched: int = 0  # prefetch_page: a new shadow page
    on_sync: int = 0
    on_prefetch: int = 0  # neighbours of a fault
    on_pte_write: int = 0
    converted: int = 0  # mmu_convert_notrap

    def counters(self) -> dict[str, int]:
        """The counters by name: `notrap.prefetched` and so on."""
        return {f"notrap.{f.name}": getattr(self, f.name) for f in fields(self)}
