"""The named points of the model: where, in the kernel, something else may happen.

Points are exactly where the kernel's are: one too many and the tool reports races that do not exist, one too few and
it misses some. Waiting for mmu_lock and waiting for kicked vCPUs are effects of their own (`effects`), and are
scheduling points too; the points named `*_LOCK` say where such a wait comes from.
"""

from __future__ import annotations

import enum

__all__ = ["MEMORY_POINTS", "SCHEDULING_POINTS", "Point", "PointKind"]


class PointKind(enum.Enum):
    """Who may act at a point."""

    SCHEDULING = "scheduling"  # other host operations, and the hardware of vCPUs in guest mode
    MEMORY = "memory"  # only hardware: of vCPUs in guest mode, and store buffers (tso); may be under mmu_lock


class Point(enum.Enum):
    """A named point; the value is the kernel function and the place in it."""

    # Scheduling points
    WALK_LEVEL = "walk_addr: between levels"
    WALK_CMPXCHG = "walk_addr: guest entry read, its A or D bit not set yet"
    WALK_DONE = "page_fault: walked, frame not looked up yet"
    GFN_TO_PFN = "page_fault: mmu_notifier_seq read, frame lookup (sleeps)"
    LATE_SEQ = "page_fault: frame found, mmu_notifier_seq not read yet (only with bug B19)"
    BEFORE_LOCK = "page_fault: frame found, lock not taken yet"
    DIRECT_GFN_TO_PFN = "nonpaging_map: mmu_notifier_seq read, frame lookup (sleeps)"
    DIRECT_BEFORE_LOCK = "nonpaging_map: frame found, lock not taken yet"
    EMULATE_FAULT = "kvm_mmu_page_fault: fault handled, instruction not emulated yet"
    EMULATE_TRANSLATED = "emulator: address translated, memory not accessed yet"
    LOCKED_OP_COMPARED = "emulator: memory read and compared, not written yet (only with bug B23)"
    PTE_WRITE_STORED = "emulator_write_phys: memory written, kvm_mmu_pte_write not called yet"
    PTE_WRITE_NO_SHADOW = "kvm_mmu_pte_write: no shadow page counted, store not visible yet (tso)"
    PTE_WRITE_READ = "kvm_mmu_pte_write: invlpg_counter read, guest entry not read again yet"
    PTE_WRITE_LOCK = "kvm_mmu_pte_write: value known, lock not taken yet"
    INVLPG_LOCK = "invlpg: lock not taken yet"
    INVLPG_UNLOCKED = "invlpg: shadow entry dropped, lock released, kvm_mmu_pte_write not called yet"
    LOAD_ROOT_LOCK = "mmu_alloc_roots: guest root known, lock not taken yet"
    LOAD_SYNC_LOCK = "kvm_mmu_load: roots allocated, not synced yet"
    FREE_ROOTS_LOCK = "mmu_free_roots: lock not taken yet"
    SYNC_ROOTS_LOCK = "kvm_mmu_sync_roots: lock not taken yet"
    COND_RESCHED_LOCK = "mmu_sync_children: lock dropped"
    UNSYNC_LATE = "set_spte: entry maps a table writable, table not unsync yet (only with bug C2)"
    SET_CR3 = "kvm_set_cr3: value accepted, roots not freed yet"
    RESET_CONTEXT = "kvm_mmu_reset_context: register changed, context not rebuilt yet"
    UNPROTECT_LOCK = "kvm_mmu_unprotect_page: gfn known, lock not taken yet"
    ENTER_GUEST_RELOAD = "vcpu_enter_guest: requests served, root not loaded yet"
    ENTER_GUEST_REQUESTS = "vcpu_enter_guest: requests served, guest mode not set yet"
    ENTER_GUEST_MODE_BUFFERED = "vcpu_enter_guest: requests tested, guest mode not visible yet (tso)"
    ENTER_GUEST_LATE_MODE = "vcpu_enter_guest: requests tested, guest mode not set yet (only with bug B22)"
    HOST_UNMAPPED = "host: page taken away, mmu_notifier not called yet"
    HOST_PAGE_LOCK = "host: about to change a page, page-table lock not taken yet"
    HOST_COW = "host: page moved (copy on write, merged), change_pte not called yet"
    NOTIFIER_UNLOCKED = "invalidate_page: lock dropped, flush not asked for yet"
    NOTIFIER_RANGE_UNLOCKED = "invalidate_range_start: lock dropped, flush not asked for yet"
    NOTIFIER_RANGE_STARTED = "host: invalidate_range_start returned, invalidate_range_end not called yet"
    NOTIFIER_YOUNG_UNLOCKED = "clear_flush_young: lock dropped, flush not asked for yet"
    NOTIFIER_SEQ_LATE = "notifiers: lock dropped, mmu_notifier_seq not raised yet (only with bug B19)"
    DIRTY_LOG_SWAPPED = "kvm_vm_ioctl_get_dirty_log: bitmap swapped, write access not removed yet"
    DIRTY_LOG_UNLOCKED = "kvm_vm_ioctl_get_dirty_log: lock dropped, not flushed yet (only with bug C1)"
    DIRTY_LOG_FLUSHED_EARLY = "remove_write_access: flushed, entries still writable (only with bug B17)"
    DIRTY_LOG_COPY = "kvm_vm_ioctl_get_dirty_log: write access removed, log not returned yet"
    SLOTS_LOCK = "__kvm_set_memory_region, kvm_vm_ioctl_get_dirty_log: slots_lock not taken yet"
    MEMSLOT_INVALID = "__kvm_set_memory_region: slot invalid and its readers gone, shadow not flushed yet"
    MEMSLOT_PUBLISHED = "__kvm_set_memory_region: new slots published, write access not removed yet"
    MEMSLOT_COMMITTED = "__kvm_set_memory_region: write access removed, shadow not flushed yet"
    FLUSH_SHADOW_ZAPPED = "kvm_arch_flush_shadow: everything zapped, reload not asked for yet"
    HOST_MUNMAP = "host: slot deleted, its memory not unmapped yet"

    # Memory points
    READ_GUEST_MEMORY = "before a read of guest memory"
    GPTE_READ = "guest entry read, shadow entry not written yet"
    SPTE_UPDATE = "inside a shadow entry update that is not atomic"

    kind: PointKind


for _point in Point:
    _point.kind = (
        PointKind.MEMORY
        if _point in (Point.READ_GUEST_MEMORY, Point.GPTE_READ, Point.SPTE_UPDATE)
        else PointKind.SCHEDULING
    )

MEMORY_POINTS: frozenset[Point] = frozenset(p for p in Point if p.kind is PointKind.MEMORY)
SCHEDULING_POINTS: frozenset[Point] = frozenset(Point) - MEMORY_POINTS
