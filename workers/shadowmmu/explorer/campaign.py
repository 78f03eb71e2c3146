"""Several searches at a time, in processes: what `shadowmmu explore` runs, as plain data that processes exchange."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.search import Budget, Found, Search
from shadowmmu.explorer.strategy import Strategy

__all__ = ["SearchReport", "SearchSpec", "merge", "pool", "run_all", "run_search"]

LOOK_EVERY: Final = 0.2
"""Seconds between two looks at how far the processes are."""


class SearchSpec(msgspec.Struct, frozen=True):
    """One search. `state`: the file in which it stands, if it is to be gone on with."""

    scenario: Scenario
    profile: str
    strategy: Strategy
    seed: int
    budget: Budget
    state: str = ""


class SearchReport(msgspec.Struct, frozen=True):
    """What came of a search, or of several of the same scenario.

    `outcomes`, `failures` and `exists` (with the outcome that must be seen) count executions; `found` has the first
    failure of each kind, `pairs` the number of pairs of points that were exercised, `never` those that were not
    although both points were reached.
    """

    scenario: Scenario
    profile: str
    strategy: Strategy
    seed: int
    executions: int
    pruned: int
    complete: bool
    seconds: float
    exists: int
    outcomes: dict[str, int]
    failures: dict[str, int]
    found: dict[str, Found]
    digest: str
    pairs: int
    never: list[tuple[str, str]]

    @property
    def first(self) -> Found | None:
        """What was found first."""
        return min(self.found.values(), key=lambda found: found.execution, default=None)


def run_search(spec: SearchSpec, progress: Callable[[Search], bool] | None = None) -> SearchReport:
    """Runs one search. Raises ScenarioError, or ValueError for a state file of another search."""
    search = Search(spec.scenario, spec.profile, spec.strategy, spec.seed, time.monotonic)
    state = Path(spec.state) if spec.state else None
    if state is not None and state.exists():
        search.restore(state.read_bytes())
    try:
        search.run(spec.budget, progress)
    finally:
        if state is not None:
            state.write_bytes(search.state())
    return SearchReport(
        scenario=spec.scenario,
        profile=spec.profile,
        strategy=spec.strategy,
        seed=spec.seed,
        executions=search.executions,
        pruned=search.pruned,
        complete=search.complete,
        seconds=search.seconds,
        exists=search.exists,
        outcomes=dict(search.outcomes),
        failures=dict(search.failures),
        found=search.found,
        digest=search.digest(),
        pairs=len(search.coverage.pairs),
        never=search.coverage.never(),
    )


def pool(jobs: int) -> Executor:
    """Processes to run searches in."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


class _Shared(NamedTuple):
    """What the processes of a campaign have in common: how many executions there were, and whether to stop."""

    executions: Synchronized[int]
    stop: Event


_shared: _Shared | None = None
"""Set in processes that `run_all` has started."""


def _join(shared: _Shared) -> None:
    global _shared  # noqa: PLW0603 - a process's own
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one


def _run_shared(spec: SearchSpec) -> SearchReport:
    shared = _shared
    assert shared is not None

    def count(_: Search) -> bool:
        with shared.executions.get_lock():
            shared.executions.value += 1
        return not shared.stop.is_set()

    return run_search(spec, count)


def run_all(specs: Sequence[SearchSpec], jobs: int, progress: Callable[[int], bool]) -> list[SearchReport]:
    """Runs searches in `jobs` processes; their reports, in order.

    `progress` is called now and then with the number of executions so far; all searches end when it says False.
    """
    context = get_context("spawn")
    shared = _Shared(context.Value("Q", 0), context.Event())
    with ProcessPoolExecutor(
        min(jobs, len(specs)), mp_context=context, initializer=_join, initargs=(shared,)
    ) as executor:
        futures = [executor.submit(_run_shared, spec) for spec in specs]
        left = set(futures)
        while left:
            _, left = wait(left, LOOK_EVERY)
            if not progress(shared.executions.value):
                shared.stop.set()
        return [future.result() for future in futures]


def merge(reports: Sequence[SearchReport]) -> SearchReport:
    """Reports of searches of one scenario with different seeds as one; the digests of all, in order of seeds."""
    ordered = sorted(reports, key=lambda report: report.seed)
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    found: dict[str, Found] = {}
    never = set(ordered[0].never)
    for report in ordered:
        outcomes.update(report.outcomes)
        failures.update(report.failures)
        never &= set(report.never)
        for kind, hit in report.found.items():
            found.setdefault(kind, hit)
    return msgspec.structs.replace(
        ordered[0],
        executions=sum(report.executions for report in ordered),
        pruned=sum(report.pruned for report in ordered),
        complete=any(report.complete for report in ordered),
        seconds=max(report.seconds for report in ordered),
        exists=sum(report.exists for report in ordered),
        outcomes=dict(outcomes),
        failures=dict(failures),
        found=found,
        digest="+".join(report.digest for report in ordered),
        pairs=max(report.pairs for report in ordered),
        never=sorted(never),
    )
