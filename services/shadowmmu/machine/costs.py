"""What things cost in virtual time, in cycles of one machine's processors.

A cost model is data: its figures come from files (`shadowmmu.experiments.cost_model`), each with its source. This is
the schema, and all that `shadowmmu.machine.virtual_time` knows of them. A cost is charged to the virtual clock of the
vCPU (or host thread) that causes it, when it does; `kick_delivery` alone is a delay that nobody spends.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Costs"]

Cycles = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Cycles per occurrence."""

    # The processor in guest mode.
    tlb_hit: Cycles
    """An access whose translation is in the TLB."""
    tlb_miss: Cycles
    """A hardware walk, beside its levels."""
    tlb_miss_level: Cycles
    """Each entry that a hardware walk reads."""
    fault_delivery: Cycles
    """A page fault goes through the guest's IDT, and the IRET of its handler. With or without an exit before it."""
    tlb_flush: Cycles
    """A flush served at guest entry. (That the TLB is then empty costs by itself.)"""

    # Exits, and what KVM does for each of them.
    exit: Cycles
    """From the guest's instruction to KVM's handler."""
    entry: Cycles
    """From the end of the handler to the guest's next instruction: vcpu_enter_guest, and the hardware's part."""
    inject: Cycles
    """More at an entry that injects a fault or an interrupt."""
    page_fault: Cycles
    """kvm_mmu_page_fault and page_fault, beside what is named below."""
    guest_walk_level: Cycles
    """Each guest entry that walk_addr reads."""
    gfn_to_pfn: Cycles
    """The look-up of a host frame."""
    emulate: Cycles
    """An instruction that is decoded and emulated, beside what the MMU does about it."""
    pte_write: Cycles
    """kvm_mmu_pte_write, beside the entries that it changes."""
    register_write: Cycles
    """A write to a control register, beside what the MMU does about it."""
    invlpg: Cycles
    """An INVLPG that exits, beside what the MMU does about it."""
    halt: Cycles
    """A HLT and the wake-up after it."""
    ipi: Cycles
    """An interrupt that a guest sends: the emulated interrupt controller, for each target."""

    # The shadow MMU's work.
    spte_set: Cycles
    """A leaf entry is written."""
    spte_dropped: Cycles
    """A leaf entry is removed."""
    spte_synced: Cycles
    """sync_page looks at an entry, whether or not it changes it."""
    rmap_entry: Cycles
    """An entry of a reverse map, or of a page's parents, is added, removed, or looked at."""
    page_lookup: Cycles
    """kvm_mmu_get_page finds a page, or finds none."""
    page_created: Cycles
    """A shadow page is made: allocated, cleared, hashed."""
    page_zapped: Cycles
    """A shadow page is taken away, beside its entries."""
    page_unsynced: Cycles
    """A shadow page goes out of sync."""
    root_load: Cycles
    """A root is looked up or made, and loaded."""

    # mmu_lock: a ticket lock, first come, first served.
    lock: Cycles
    """Taken and released by the processor that had it last."""
    lock_transfer: Cycles
    """More when another processor had it last: the lock's cache line, and those of what it protects."""
    lock_waiter: Cycles
    """More at a hand-over for each processor that goes on waiting: all of them read the lock's line again."""

    # Kicks: a remote TLB flush, or an interrupt for a vCPU in guest mode.
    kick: Cycles
    """make_all_cpus_request, beside its targets."""
    kick_send: Cycles
    """For each target: an IPI is written to the interrupt controller."""
    kick_delivery: Cycles
    """Until the target's processor takes the interrupt. A delay, spent by nobody."""
    kick_receive: Cycles
    """At the target: the host's interrupt handler, beside exit and entry."""
    kick_acknowledge: Cycles
    """At the sender, for each target: its answer is seen, one after the other."""

    # The rest of the host.
    host_operation: Cycles
    """A call of a notifier or an ioctl, beside the MMU's work."""
    dirty_log_page: Cycles
    """A dirty page found in a log: write access is removed, and its bit copied out."""

    guest: dict[str, Cycles]
    """The guest's own work, by the names of `shadowmmu.cpu.loads` (system calls, copies of pages, ...)."""
