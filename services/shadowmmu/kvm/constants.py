"""Numbers of the kernel that every module of the model uses: limits, access bits, requests.

Names and values are those of Linux 3.1's arch/x86/kvm and include/linux/kvm_host.h.
"""

from __future__ import annotations

import enum
from typing import Final

# Rights that a shadow page or an entry grants (ACC_*).
ACC_EXEC_MASK: Final = 1
ACC_WRITE_MASK: Final = 2  # the same bit as PT_WRITABLE_MASK
ACC_USER_MASK: Final = 4  # the same bit as PT_USER_MASK
ACC_ALL: Final = ACC_EXEC_MASK | ACC_WRITE_MASK | ACC_USER_MASK

PTE_PREFETCH_NUM: Final = 8  # entries looked at around a faulting one, itself included
KVM_MIN_FREE_MMU_PAGES: Final = 5  # fewer free shadow pages than this: recycle
KVM_REFILL_PAGES: Final = 25  # recycle until this many are free
KVM_MIN_ALLOC_MMU_PAGES: Final = 64  # least limit that may be asked for
RMAP_RECYCLE_THRESHOLD: Final = 1000
KVM_PAGE_ARRAY_NR: Final = 16  # pages that one collection of unsync pages holds
PTE_LIST_EXT: Final = 4  # shadow entries per group of a reverse map
MAX_PAGE_TABLE_LEVELS: Final = 3  # sizes of host pages: 4 KiB, 2 MiB, 1 GiB
LAST_PT_WRITE_FLOOD: Final = 3  # writes to one table that make it a flood

INVALID_PAGE: Final = -1  # no root (hpa_t)
UNMAPPED_GVA: Final = -1  # no translation (gpa_t)

# Requests to a vCPU (KVM_REQ_*), as bits of `Vcpu.requests`.
KVM_REQ_TLB_FLUSH: Final = 1
KVM_REQ_MMU_RELOAD: Final = 2
KVM_REQ_TRIPLE_FAULT: Final = 4
KVM_REQ_MMU_SYNC: Final = 8
REQUEST_NAMES: Final = {
    KVM_REQ_TLB_FLUSH: "tlb_flush",
    KVM_REQ_MMU_RELOAD: "mmu_reload",
    KVM_REQ_TRIPLE_FAULT: "triple_fault",
    KVM_REQ_MMU_SYNC: "mmu_sync",
}
"""The requests, in the order in which they are listed to people."""


class VcpuMode(enum.Enum):
    """Where a vCPU is, as remote flushes see it (vcpu->mode)."""

    OUTSIDE_GUEST_MODE = 0
    IN_GUEST_MODE = 1
    EXITING_GUEST_MODE = 2


def kvm_pages_per_hpage(level: int) -> int:
    """Frames of 4 KiB in a page of `level` (1, 2 or 3): 1, 512 or 262144."""
    return 1 << (9 * (level - 1))
