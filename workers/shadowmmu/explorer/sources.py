"""Where a search gets its executions from: one source per strategy, each of which can be stopped and gone on with."""

from __future__ import annotations

from typing import Any, Protocol

from shadowmmu.explorer.choosers import Chooser, PctChooser, RandomChooser
from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.execution import Ending, execute
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.explorer.world import World

__all__ = ["Source", "sources"]

PCT_DEPTHS = 4
FIRST_LENGTH = 64
"""Steps that an execution is taken to have, before one has been seen."""


class Source(Protocol):
    """One strategy's executions of a scenario."""

    @property
    def strategy(self) -> Strategy:
        """Whose executions they are."""
        ...

    @property
    def complete(self) -> bool:
        """All executions have been seen."""
        ...

    @property
    def executions(self) -> int:
        """How many were begun."""
        ...

    @property
    def pruned(self) -> int:
        """How many of these were given up because the rest was known."""
        ...

    def next(self) -> Ending | None:
        """The next execution, None if it was pruned; not to be called when `complete`."""
        ...

    def state(self) -> object:
        """Where it stands, as plain data."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned."""
        ...


class _Independent:
    """Executions that have nothing to do with one another: number n depends on the seed and n alone."""

    complete = False
    pruned = 0

    def __init__(
        self, scenario: Scenario, profile: str, strategy: Strategy, seed: int, coverage: PairCoverage
    ) -> None:
        self._coverage = coverage
        self.strategy = strategy
        self.executions = 0
        self._scenario = scenario
        self._profile = profile
        self._seed = seed
        self._length = FIRST_LENGTH

    def _chooser(self) -> Chooser:
        seed = self._seed << 32 | self.executions
        if self.strategy is Strategy.RANDOM:
            return RandomChooser(seed)
        return PctChooser(seed, 1 + self.executions % PCT_DEPTHS, self._length)

    def next(self) -> Ending:
        ending = execute(self._scenario, self._profile, self._chooser(), coverage=self._coverage)
        self.executions += 1
        self._length = max(self._length, len(ending.schedule))
        return ending

    def state(self) -> object:
        return [self.executions, self._length]

    def restore(self, state: Any) -> None:
        self.executions, self._length = state


class _Exhaustive:
    strategy = Strategy.EXHAUSTIVE

    def __init__(self, scenario: Scenario, profile: str, coverage: PairCoverage) -> None:
        self._search = DepthFirst(scenario, profile, coverage=coverage)

    @property
    def complete(self) -> bool:
        return self._search.complete

    @property
    def executions(self) -> int:
        return self._search.executions

    @property
    def pruned(self) -> int:
        return self._search.pruned

    @property
    def states(self) -> int:
        return self._search.states

    def next(self) -> Ending | None:
        return self._search.next()

    def state(self) -> object:
        return self._search.state()

    def restore(self, state: Any) -> None:
        self._search.restore(state)


class _Bounded:
    """Complete when a larger bound shows no more executions."""

    strategy = Strategy.BOUNDED
    pruned = 0

    def __init__(self, scenario: Scenario, profile: str, coverage: PairCoverage) -> None:
        self._coverage = coverage
        self._scenario = scenario
        self._profile = profile
        self._before = 0  # executions of the smaller bounds
        self._last = 0  # executions of the bound before this
        self._delays = 0
        self._search = DepthFirst(scenario, profile, 0, coverage=coverage)
        self.complete = False

    @property
    def executions(self) -> int:
        return self._before + self._search.executions

    def next(self) -> Ending | None:
        if self._search.complete:
            self._before += self._search.executions
            self._last = self._search.executions
            self._delays += 1
            self._search = DepthFirst(self._scenario, self._profile, self._delays, coverage=self._coverage)
        ending = self._search.next()
        self.complete = self._search.complete and self._search.executions == self._last
        return ending

    def state(self) -> object:
        return [self._before, self._last, self._delays, self.complete, self._search.state()]

    def restore(self, state: Any) -> None:
        self._before, self._last, self._delays, self.complete, search = state
        self._search = DepthFirst(self._scenario, self._profile, self._delays, coverage=self._coverage)
        self._search.restore(search)


def sources(
    scenario: Scenario, profile: str, strategy: Strategy, seed: int, coverage: PairCoverage
) -> list[Source]:
    """The sources of a strategy, which count into `coverage`. Raises ScenarioError if the scenario cannot be set up."""
    World(scenario, profile)
    match strategy:
        case Strategy.EXHAUSTIVE:
            return [_Exhaustive(scenario, profile, coverage)]
        case Strategy.BOUNDED:
            return [_Bounded(scenario, profile, coverage)]
        case Strategy.PORTFOLIO:
            return [
                _Bounded(scenario, profile, coverage),
                _Independent(scenario, profile, Strategy.PCT, seed, coverage),
                _Independent(scenario, profile, Strategy.RANDOM, seed, coverage),
            ]
        case _:
            return [_Independent(scenario, profile, strategy, seed, coverage)]
