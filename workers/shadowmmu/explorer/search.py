"""A search: executions of one scenario under one profile, until something is found, all is seen, or time is up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.execution import Ending, Failure
from shadowmmu.explorer.outcome import format_outcome, holds, parse_condition
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.sources import Source, sources
from shadowmmu.explorer.strategy import Strategy

__all__ = ["Budget", "Found", "Search"]


class Budget(msgspec.Struct, frozen=True):
    """When to stop: after so many seconds, or executions; `first`: at the first failure."""

    seconds: float | None = None
    executions: int | None = None
    first: bool = False


class Found(msgspec.Struct, frozen=True):
    """The first failure of its kind: by which strategy, in which of all executions, after how many seconds."""

    failure: Failure
    strategy: Strategy
    execution: int
    seconds: float
    schedule: tuple[Actor, ...]


class Search:
    """The executions of `scenario` under `profile` by `strategy`; `clock` tells the seconds.

    `outcomes` counts the final states, `exists` those of them that the scenario says must be seen, and `found` has the
    first failure of each kind. `digest` is of all endings in order: two searches with the same seed have the same.
    """

    def __init__(
        self,
        scenario: Scenario,
        profile: str,
        strategy: Strategy,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.scenario = scenario
        self.profile = profile
        self.strategy = strategy
        self.seed = seed
        self.coverage = PairCoverage()
        self.sources: list[Source] = sources(scenario, profile, strategy, seed, self.coverage)
        self.outcomes: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.found: dict[str, Found] = {}
        self.exists = 0
        self._exists = parse_condition(scenario.exists) if scenario.exists else None
        self.seconds = 0.0
        self._clock = clock
        self._turn = 0
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def executions(self) -> int:
        """How many were begun."""
        return sum(source.executions for source in self.sources)

    @property
    def pruned(self) -> int:
        """How many of these were given up because the rest was known."""
        return sum(source.pruned for source in self.sources)

    @property
    def complete(self) -> bool:
        """Some strategy has seen everything that there is."""
        return any(source.complete for source in self.sources)

    @property
    def first(self) -> Found | None:
        """What was found first."""
        return min(self.found.values(), key=lambda found: found.execution, default=None)

    def digest(self) -> str:
        """BLAKE2b-128 (hex) of all endings so far."""
        return self._digest.hexdigest()

    def run(self, budget: Budget, progress: Callable[[Search], bool] | None = None) -> None:
        """Goes on until the budget is used up, or all is seen; or until `progress`, called now and then, says False."""
        begin = self._clock() - self.seconds
        while not self.complete:
            if budget.executions is not None and self.executions >= budget.executions:
                break
            self._one(begin)
            self.seconds = self._clock() - begin
            if budget.first and self.found:
                break
            if budget.seconds is not None and self.seconds >= budget.seconds:
                break
            if progress is not None and not progress(self):
                break

    def _one(self, begin: float) -> None:
        source = self.sources[self._turn]
        self._turn = (self._turn + 1) % len(self.sources)
        ending = source.next()
        if ending is not None:
            self._note(source, ending, begin)

    def _note(self, source: Source, ending: Ending, begin: float) -> None:
        outcome = format_outcome(ending.outcome)
        if self._exists is not None and holds(self._exists, dict(ending.outcome)):
            self.exists += 1
        failure = ending.failure
        kind = "" if failure is None else failure.kind
        self.outcomes[f"{outcome} [{kind}]" if kind else outcome] += 1
        self._digest.update(f"{outcome}|{kind}|{bytes(ending.schedule).hex()}\n".encode())
        if failure is None:
            return
        self.failures[kind] += 1
        if kind not in self.found:
            self.found[kind] = Found(
                failure, source.strategy, self.executions, self._clock() - begin, ending.schedule
            )

    def state(self) -> bytes:
        """Everything that `restore` needs to go on, apart from the digest, which begins anew."""
        return msgspec.msgpack.encode(
            {
                "search": [self.scenario.name, self.profile, self.strategy.value, self.seed],
                "sources": [source.state() for source in self.sources],
                "turn": self._turn,
                "seconds": self.seconds,
                "exists": self.exists,
                "outcomes": dict(self.outcomes),
                "failures": dict(self.failures),
                "found": self.found,
            }
        )

    def restore(self, data: bytes) -> None:
        """Go on from what `state` returned. Raises ValueError if that was of another search, or of none."""
        try:
            state: dict[str, Any] = msgspec.msgpack.decode(data, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ValueError(f"this is no state of a search: {error}") from error
        mine = [self.scenario.name, self.profile, self.strategy.value, self.seed]
        if state.get("search") != mine:
            raise ValueError(f"the state is of the search {state.get('search')}, not of {mine}")
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.restore(saved)
        self._turn = state["turn"]
        self.seconds = state["seconds"]
        self.exists = state["exists"]
        self.outcomes.update(state["outcomes"])
        self.failures.update(state["failures"])
        self.found = msgspec.convert(state["found"], dict[str, Found])
