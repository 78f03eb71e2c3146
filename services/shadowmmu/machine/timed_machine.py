"""The machine in virtual time: operations stop where time matters, and their work has a price.

An operation runs in *segments*. A segment ends where the operation wants mmu_lock, is about to release it, waits for
kicked vCPUs or for somebody else, or ends; named points do not stop it. What a segment does to the state happens at its
start, and takes as long as its work costs: mmu_lock stays taken that long. The driver (`virtual_time`) decides when
each segment begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shadowmmu.kvm import Kvm, KvmConfig, Point
from shadowmmu.machine.costs import Costs
from shadowmmu.machine.coverage import WaitPoint
from shadowmmu.machine.event_stream import EventSink
from shadowmmu.machine.machine import Machine
from shadowmmu.machine.operations import HostResult, VcpuRun
from shadowmmu.machine.task import Stop, Task
from shadowmmu.protocol.events import LockReleased, LockWaited
from shadowmmu.protocol.messages import RunConfig

__all__ = ["TimedMachine", "WorkMeter"]


class _NoChoices:
    """There is nothing to choose: the clock decides."""

    def below(self, bound: int) -> int:
        return bound - 1

    def chance(self, rate: float) -> bool:  # noqa: ARG002 - the interface's
        return False


_WORK: Final = (
    ("guest_walk_levels", "guest_walk_level"),
    ("frame_lookups", "gfn_to_pfn"),
    ("emulations", "emulate"),
    ("sptes_set", "spte_set"),
    ("sptes_dropped", "spte_dropped"),
    ("sptes_synced", "spte_synced"),
    ("rmap_entries", "rmap_entry"),
    ("page_lookups", "page_lookup"),
    ("pages_unsynced", "page_unsynced"),
    ("root_loads", "root_load"),
)
_STATS: Final = (
    ("mmu_cache_miss", "page_created"),
    ("mmu_shadow_zapped", "page_zapped"),
    ("mmu_pte_write", "pte_write"),
)


class WorkMeter:
    """What the model's work costs, from one moment to the next, in cycles."""

    def __init__(self, kvm: Kvm, costs: Costs) -> None:
        self._work, self._stat = kvm.work, kvm.stat
        self._work_prices = [(name, getattr(costs, cost)) for name, cost in _WORK]
        self._stat_prices = [(name, getattr(costs, cost)) for name, cost in _STATS]
        self._begin = self._total()

    def _total(self) -> int:
        work, stat = self._work, self._stat
        total = 0
        for name, price in self._work_prices:
            total += getattr(work, name) * price
        for name, price in self._stat_prices:
            total += getattr(stat, name) * price
        return total

    def begin(self) -> None:
        """From now on."""
        self._begin = self._total()

    def cycles(self) -> int:
        """Since `begin`."""
        return self._total() - self._begin


class TimedMachine(Machine):
    """One virtual machine for `virtual_time`.

    `woken`: operations that can go on since somebody looked last; `finished`: those that have returned. `next_lock` is
    called when mmu_lock has been released.
    """

    def __init__(self, config: RunConfig, events: EventSink, kvm: KvmConfig) -> None:
        self.woken: list[Task] = []
        self.finished: list[Task] = []
        self.next_lock: Callable[[], None] = lambda: None
        super().__init__(config, _NoChoices(), events, kvm, stepwise=True)
        self.kvm.memory_points = frozenset()
        self.kvm.need_resched = False  # time slices are much longer than what the MMU does under mmu_lock

    @property
    def locked(self) -> bool:
        """Somebody holds mmu_lock."""
        return self._lock_owner is not None

    def waits_for_lock(self, task: Task) -> None:
        """Tells that the operation found mmu_lock taken."""
        self.counters["lock.waited"] += 1
        self.events.emit(LockWaited(task.number))

    def _make_ready(self, task: Task) -> None:
        super()._make_ready(task)
        self.woken.append(task)

    def _acquire(self, task: Task) -> bool:
        self.coverage.reached[WaitPoint.MMU_LOCK] += 1
        self._stop(task, WaitPoint.MMU_LOCK, Stop.LOCK)
        self._lock_waiters.append(task)
        return False

    def _release(self, task: Task) -> bool:
        task.stop = Stop.RELEASE
        self._ready.append(task)
        return False

    def _resume(self, task: Task) -> None:
        if task.stop is not Stop.RELEASE:
            super()._resume(task)
            return
        self._ready.remove(task)
        self._lock_owner = None
        self.events.emit(LockReleased(task.number))
        self.next_lock()

    def _reached(self, task: Task, point: Point) -> bool:  # noqa: ARG002 - the interface's
        self.coverage.reached[point] += 1
        return False

    def _finish(self, task: Task, value: VcpuRun | HostResult) -> None:
        self.finished.append(task)
        super()._finish(task, value)
