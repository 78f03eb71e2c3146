"""Runs to be traced: small ones of many kinds, each executed once."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shadowmmu.experiments.cost_model import load_cost_model
from shadowmmu.machine import JOURNAL_NAME, run_in_process
from shadowmmu.machine.timed_config import HostActor, HostActorKind, TimedConfig
from shadowmmu.protocol import events as ev
from shadowmmu.protocol.messages import GuestMode, MemoryModel, Mutant, RunConfig, Tdp, Workload
from shadowmmu.timeline import Ending, Execution, JournalExecution, Observer, TimedExecution
from shadowmmu.timeline.tracepoints import Traced


class Recorded(NamedTuple):
    """A run: how it is executed again, and the counters that it ended with, if it has any."""

    execution: Execution
    counters: dict[str, int]


RUNS = {
    "mixed": RunConfig(ops=6000, seed=1, host_rate=20.0),
    "fork": RunConfig(ops=1500, seed=2, workload=Workload.FORK),
    "linux-3.1": RunConfig(ops=3000, seed=3, profile="linux-3.1", workload=Workload.SLOPPY),
    "few-pages": RunConfig(ops=3000, seed=4, mmu_pages=64, vpid=False),
    "pre-patch": RunConfig(ops=3000, seed=5, profile="pre-patch", bypass_guest_pf=True),
    "tso": RunConfig(ops=3000, seed=6, memory_model=MemoryModel.TSO),
    "ept": RunConfig(ops=3000, seed=7, tdp=Tdp.EPT, mode=GuestMode.NONPAGING, workload=Workload.MODES),
    "npt": RunConfig(ops=3000, seed=8, tdp=Tdp.NPT, mode=GuestMode.NONPAGING, workload=Workload.MODES),
    "devices": RunConfig(ops=6000, seed=2, mode=GuestMode.PAE, workload=Workload.MODES),
    "lost-workers": RunConfig(ops=4000, seed=9),
    "violated": RunConfig(ops=4000, seed=10, mutant=Mutant.FLUSH_NOT_AWAITED, host_rate=20.0),
    "stopped": RunConfig(ops=200_000, seed=11, host_rate=20.0),
}
TIMED = "virtual-time"
ALL_RUNS = (*RUNS, TIMED)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="timeline-")


@functools.cache
def folder(name: str) -> tuple[Path, dict[str, int]]:
    """The folder of one of RUNS, with its journal, and its counters."""
    path = Path(_folder().name) / name
    path.mkdir()
    with (path / JOURNAL_NAME).open("wb") as journal:
        stop: Callable[[dict[str, int]], bool] | None = (lambda _done: False) if name == "stopped" else None
        loss = 0.005 if name == "lost-workers" else 0.0
        result = run_in_process(RUNS[name], 3, journal.write, progress=stop, loss_rate=loss)
    return path, result.counters


def timed_config() -> TimedConfig:
    """A run in virtual time."""
    return TimedConfig(
        run=RunConfig(ops=4000, seed=12),
        vcpus=4,
        host=(HostActor(kind=HostActorKind.MIXED, interval=20_000),),
    )


def execution(name: str) -> Execution:
    """One of ALL_RUNS, to be executed anew."""
    if name == TIMED:
        model = load_cost_model("nehalem-2011")
        return TimedExecution(timed_config(), model.costs, model.ghz)
    return JournalExecution(folder(name)[0])


class Watched:
    """An observer that keeps everything, tracepoints too, and an execution that shows it again."""

    def __init__(self, execution: Execution) -> None:
        self.title = execution.title
        self.axis = execution.axis
        self.tdp = execution.tdp
        self.ordered = execution.ordered
        self.violations: list[tuple[int, str]] = []
        self._seen: list[tuple[int, ev.Event | Traced]] = []
        self._violated_after = 0
        self._ending = execution.play(self, self._traced)

    @property
    def events(self) -> list[tuple[int, ev.Event]]:
        return [(time, seen) for time, seen in self._seen if not isinstance(seen, Traced)]

    def event(self, time: int, event: ev.Event) -> None:
        self._seen.append((time, event))

    def _traced(self, time: int, hit: Traced) -> None:
        self._seen.append((time, hit))

    def violation(self, time: int, text: str) -> None:
        self.violations.append((time, text))
        self._violated_after = len(self._seen)

    def play(self, observer: Observer, traced: Callable[[int, Traced], None] | None = None) -> Ending:
        for number, (time, seen) in enumerate(self._seen, start=1):
            if not isinstance(seen, Traced):
                observer.event(time, seen)
            elif traced is not None:
                traced(time, seen)
            if number == self._violated_after:
                observer.violation(*self.violations[0])
        return self._ending


@functools.cache
def watched(name: str) -> Watched:
    """One of ALL_RUNS, executed."""
    return Watched(execution(name))


def recorded(name: str) -> Recorded:
    """One of ALL_RUNS, to be executed."""
    return Recorded(watched(name), {} if name == TIMED else folder(name)[1])
