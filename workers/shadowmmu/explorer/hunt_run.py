"""A long run of a random workload as a scenario of a hunt.

Small guests are drawn whole; what needs a long history (tables that come and go, a TLB that has kept an entry) is met
by the workloads that stress runs use. Such a run is executed in this process until a rule breaks; the stretch before
that is executed again in small (`postmortem`), and that is what the hunt catches.
"""

from __future__ import annotations

import io
import random
from typing import Final

import msgspec

from shadowmmu.checker import Checker, Violation
from shadowmmu.explorer.execution import Failure
from shadowmmu.explorer.postmortem import reproduce
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.machine import read_journal, run_in_process
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event

__all__ = ["Ran", "execute_run"]

WORKLOADS: Final = (m.Workload.MIXED, m.Workload.SLOPPY, m.Workload.MMAP_CHURN, m.Workload.FORK)
VCPUS: Final = 4
OPS: Final = 60_000
EXECUTIONS: Final = 48
"""Executions of each stretch before the violation."""


class Ran(msgspec.Struct, frozen=True):
    """What came of a run: how many executions it took, and the failing scenario with its schedule if there is one."""

    executions: int
    scenario: Scenario | None = None
    failure: Failure | None = None
    schedule: tuple[int, ...] = ()


class _Watcher:
    """The checker as a listener of the machine."""

    def __init__(self) -> None:
        self._checker = Checker()
        self.violation: Violation | None = None

    def listen(self, _first: int, events: list[Event], _data: bytes) -> None:
        if self.violation is None:
            self.violation = self._checker.feed_all(events)

    def goes_on(self, _counters: dict[str, int]) -> bool:
        return self.violation is None


def execute_run(seed: int, profile: str) -> Ran:
    """Runs the workload of a seed under `profile`."""
    draw = random.Random(seed)
    config = m.RunConfig(
        workload=draw.choice(WORKLOADS),
        seed=seed,
        ops=OPS,
        profile=profile,
        host_rate=draw.choice((5.0, 20.0)),
        audit=m.Audit.SAMPLED,
    )
    journal = io.BytesIO()
    watcher = _Watcher()
    run_in_process(config, VCPUS, journal.write, watcher.listen, progress=watcher.goes_on)
    violation = watcher.violation
    if violation is None:
        return Ran(1)
    journal.seek(0)
    records = list(read_journal(journal))
    found = reproduce(records, violation.rule, violation.journal_record, lambda _, done: done < EXECUTIONS)
    if found.ending is None or found.ending.failure is None:
        return Ran(1 + found.executions)
    return Ran(1 + found.executions, found.scenario, found.ending.failure, found.ending.schedule)
