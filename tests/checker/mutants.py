"""Defects of the model, the processor and the service, one rule each, for the ablation table (test_ablation).

Most are patched in here: a patch shows its effect within a few thousand instructions, where a catalogued bug may need
millions. Each says what is wrong; the rule is the one that has to find it when all others are off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from shadowmmu.checker import Rule
from shadowmmu.kvm import MmuLock, Operation, Vcpu
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.paging import paging_page_fault
from shadowmmu.kvm.walker import GuestWalker, inject_page_fault, walk_addr
from shadowmmu.machine import Machine
from shadowmmu.machine.lane import VcpuLane
from shadowmmu.protocol.messages import Audit, Mutant, Workload

__all__ = ["MUTANTS", "Defect"]

Patch = Callable[[pytest.MonkeyPatch], None]


class Defect(NamedTuple):
    """A mutant: the rule that it breaks, what of a run's configuration it needs, and the patch."""

    name: str
    rule: Rule
    config: dict[str, Any]
    patch: Patch


def nothing(_monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration alone makes the mutant."""


def _does_nothing(*_args: Any, **_kwargs: Any) -> Operation[None]:
    yield from ()


# --- 1: stale translations --------------------------------------------------------------------------------------


def invlpg_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM takes an INVLPG exit and does nothing: unsync tables keep their old entries."""
    monkeypatch.setattr("shadowmmu.kvm.contexts.paging_invlpg", _does_nothing)


def emulated_table_writes_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated store changes a guest table, and its shadow stays as it was."""
    monkeypatch.setattr("shadowmmu.kvm.emulate.kvm_mmu_pte_write", _does_nothing)


# --- 2: faults --------------------------------------------------------------------------------------------------


def absent_frame_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk reports a page that the host has swapped out as not present to the guest."""

    def walk(vcpu: Vcpu, address: int, access: int) -> Operation[GuestWalker]:
        walker = yield from walk_addr(vcpu, address, access)
        slot = vcpu.kvm.visible_memslot(walker.gfn)
        if walker.fault is None and slot is not None and not vcpu.kvm.host.is_present(walker.gfn):
            walker.fault = access & 0x16
        return walker

    monkeypatch.setattr("shadowmmu.kvm.paging.walk_addr", walk)


def fault_code_lacks_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault for want of a right is injected as one for an entry that is not present."""

    def inject(vcpu: Vcpu, error_code: int, address: int) -> None:
        inject_page_fault(vcpu, error_code & ~1, address)

    monkeypatch.setattr("shadowmmu.kvm.paging.inject_page_fault", inject)


# --- 3: host frames ---------------------------------------------------------------------------------------------


def notifier_does_not_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """invalidate_page drops the entries of the page and leaves the TLBs alone."""

    def unlock(*_args: object) -> Operation[None]:
        yield MmuLock.RELEASE

    monkeypatch.setattr("shadowmmu.kvm.notifiers._unlock_and_flush", unlock)


# --- 4: write protection ----------------------------------------------------------------------------------------


def protection_does_not_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's entries are made read-only, and nobody flushes."""
    monkeypatch.setattr("shadowmmu.kvm.pages.write_protect_needs_flush", lambda _kvm, _protected: False)
    monkeypatch.setattr("shadowmmu.kvm.sync.write_protect_needs_flush", lambda _kvm, _protected: False)


def tables_are_not_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame is mapped writable although it is a table whose shadow is in sync."""
    monkeypatch.setattr(
        "shadowmmu.kvm.set_spte.mmu_need_write_protect", lambda _kvm, _gfn, _can_unsync: False
    )


# --- 5: dirty logs ----------------------------------------------------------------------------------------------


def nothing_is_marked_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dirty bitmaps stay empty."""

    class Unmarked(set[int]):
        def add(self, _gfn: int) -> None:
            return

    original = KvmMemorySlot.__setattr__

    def assign(slot: KvmMemorySlot, name: str, value: object) -> None:
        original(slot, name, Unmarked(value) if name == "dirty_bitmap" and isinstance(value, set) else value)

    monkeypatch.setattr(KvmMemorySlot, "__setattr__", assign)


# --- 6: accessed and dirty --------------------------------------------------------------------------------------


def walk_leaves_accessed_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM's walk maps pages without setting A in the guest's entries."""
    monkeypatch.setattr("shadowmmu.kvm.walker.PT_ACCESSED_MASK", 0)


# --- 7: structure -----------------------------------------------------------------------------------------------


def page_counted_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page out of sync is counted as the root of a vCPU that it is not."""
    original = Machine.audit

    def audit(machine: Machine) -> None:
        for sp in machine.kvm.active_mmu_pages.values():
            if sp.level == 1 and sp.unsync:
                sp.root_count += 1
                break
        original(machine)

    monkeypatch.setattr(Machine, "audit", audit)


def unsync_children_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page goes out of sync and its parents are not told."""
    monkeypatch.setattr("shadowmmu.kvm.unsync.kvm_mmu_mark_parents_unsync", lambda _kvm, _sp: None)


# --- 8: progress ------------------------------------------------------------------------------------------------


def faults_are_not_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page fault handler lets the guest try again without having mapped the page, for one page in 16."""

    def handle(vcpu: Vcpu, gva: int, error_code: int, prefault: bool) -> Operation[int]:
        if gva >> 12 & 15 == 5:
            yield from ()
            return 0
        return (yield from paging_page_fault(vcpu, gva, error_code, prefault))

    monkeypatch.setattr("shadowmmu.kvm.contexts.paging_page_fault", handle)


def answers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service does not notice that a kicked vCPU has left the guest."""
    monkeypatch.setattr(Machine, "_left_guest", lambda _machine, _lane: None)


# --- 9: stores --------------------------------------------------------------------------------------------------


def swapping_loses_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page comes back from swap with zeros where it held even numbers."""
    original = HostMemory.fault_in

    def fault_in(host: HostMemory, slot: KvmMemorySlot, gfn: int) -> None:
        swapped = gfn + slot.hva_delta & slot.host_mask in host.swapped
        original(host, slot, gfn)
        if swapped:
            first = gfn - slot.base_gfn << 9
            for index in range(first, first + 512):
                if not slot.words[index] & 1:  # no present entry: tables stay
                    slot.words[index] = 0

    monkeypatch.setattr(HostMemory, "fault_in", fault_in)


def locked_operations_are_not_atomic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked operation of the hardware reads what another vCPU's store changes before it writes."""
    original = VcpuLane._apply_locked

    def apply(lane: VcpuLane, locked: Any) -> int:
        _, gva, pfn, size, _ = locked.access
        located = lane._machine.host.locate(pfn)
        assert located is not None
        memory, page = located
        offset = page - memory.base << 12 | gva & 0xFFF
        now = memory.read(offset, size)
        memory.write(offset, size, now ^ 1)
        return original(lane, locked)

    monkeypatch.setattr(VcpuLane, "_apply_locked", apply)


CHURN = {"workload": Workload.MMAP_CHURN}
PROTECT = {"workload": Workload.MPROTECT}
AUDITED = {"audit": Audit.ALWAYS}
LONG = {"ops": 20_000}
BUSY_HOST = {"host_rate": 40.0}

MUTANTS = [
    Defect("INVLPG is ignored", Rule.STALE_TRANSLATION, CHURN | LONG, invlpg_ignored),
    Defect(
        "emulated table writes are ignored",
        Rule.STALE_TRANSLATION,
        CHURN | LONG,
        emulated_table_writes_ignored,
    ),
    Defect("a swapped-out page faults in the guest", Rule.UNJUSTIFIED_FAULT, BUSY_HOST, absent_frame_faults),
    Defect(
        "a rights fault is injected as not present", Rule.UNJUSTIFIED_FAULT, PROTECT, fault_code_lacks_present
    ),
    Defect(
        "the notifier does not flush", Rule.HOST_FRAME_USE_AFTER_REVOKE, BUSY_HOST, notifier_does_not_flush
    ),
    Defect(
        "entry flush skipped",
        Rule.HOST_FRAME_USE_AFTER_REVOKE,
        BUSY_HOST | {"mutant": Mutant.ENTRY_FLUSH_SKIPPED},
        nothing,
    ),
    Defect(
        "write protection does not flush",
        Rule.WRITE_PROTECTION_BREACH,
        {"host_rate": 0.0},
        protection_does_not_flush,
    ),
    Defect("tables are not protected", Rule.WRITE_PROTECTION_BREACH, {}, tables_are_not_protected),
    Defect("nothing is marked dirty", Rule.LOST_DIRTY_PAGE, BUSY_HOST, nothing_is_marked_dirty),
    Defect(
        "dirty-log-flush",
        Rule.LOST_DIRTY_PAGE,
        BUSY_HOST | LONG | {"profile": "fixed-dirty-log-flush"},
        nothing,
    ),
    Defect("the walk leaves A clear", Rule.LOST_ACCESSED_DIRTY, {}, walk_leaves_accessed_clear),
    Defect("prefetch-accessed", Rule.LOST_ACCESSED_DIRTY, {"profile": "fixed-prefetch-accessed"}, nothing),
    Defect("a page is counted as root", Rule.BROKEN_STRUCTURE, AUDITED, page_counted_as_root),
    Defect("unsync children are not counted", Rule.BROKEN_STRUCTURE, AUDITED, unsync_children_not_counted),
    Defect("faults are not handled", Rule.NO_PROGRESS, {"host_rate": 0.0}, faults_are_not_handled),
    Defect("answers to kicks are lost", Rule.NO_PROGRESS, {}, answers_are_lost),
    Defect("swapping loses contents", Rule.LOST_STORE, BUSY_HOST, swapping_loses_contents),
    Defect("locked operations are not atomic", Rule.LOST_STORE, {}, locked_operations_are_not_atomic),
]
