"""Systematic search: all schedules, or all with few delays, depth first.

Generators cannot be copied, so going back means executing again from the start along the chosen steps. Two reductions
leave out executions that show nothing new:

- *sleep sets* (Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems", LNCS 1032): after a step
  was tried in a state, it sleeps in the branches tried later, until a step is taken that does not commute with it;
- *state hashing*: a state that was reached before (`fingerprint`) is not explored again. With sleep sets, only those
  steps are still to be tried that slept when it was explored, and do not sleep now (Godefroid, 5.3).

The bounded search (Emmi, Qadeer, Rakamaric: "Delay-bounded scheduling", POPL 2011) has a scheduler that lets whoever
runs go on, and then the next in turn, store buffers last; every actor that it passes over costs a delay. It needs no
reductions to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from shadowmmu.explorer.actors import Actor, is_drain
from shadowmmu.explorer.execution import Ending, describe
from shadowmmu.explorer.fingerprint import fingerprint
from shadowmmu.explorer.footprint import Footprint, Kind, commute
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.world import World

__all__ = ["DepthFirst"]

Sleep = dict[Actor, Footprint]

NO_BOUND: Final = -1


class _Node:
    """A state on the current path: the steps that are to be tried, in order, and what is known of those that were."""

    __slots__ = ("chosen", "delays", "sleep", "to_try", "tried")

    def __init__(self, to_try: list[tuple[Actor, int]], sleep: Sleep) -> None:
        self.to_try = to_try  # (actor, delays left if it is chosen), the next one last
        self.sleep = sleep
        self.tried: Sleep = {}
        self.chosen: Actor = -1
        self.delays = 0


def _plain(sleep: Sleep) -> list[tuple[Actor, str, int]]:
    return [(actor, kind.value, word) for actor, (kind, word) in sleep.items()]


def _footprints(plain: list[tuple[Actor, str, int]]) -> Sleep:
    return {actor: (Kind(kind), word) for actor, kind, word in plain}


class DepthFirst:
    """The executions of a scenario, one after another.

    `delays`: at most so many, None for no bound. `reduce`: leave out what shows nothing new (only without a bound).

    `executions` counts all that were begun, `pruned` those of them that were given up because the rest was known.
    `complete`: all has been seen. `steps` counts steps taken, those that led back to a place included.
    """

    def __init__(
        self,
        scenario: Scenario,
        profile: str,
        delays: int | None = None,
        *,
        reduce: bool = True,
        coverage: PairCoverage | None = None,
    ) -> None:
        self._scenario = scenario
        self._profile = profile
        self._coverage = coverage
        self._delays = delays
        self._reduce = reduce and delays is None
        self._path: list[_Node] = []
        self._seen: dict[int, frozenset[Actor]] = {}
        self.executions = 0
        self.pruned = 0
        self.steps = 0
        self.complete = False

    @property
    def states(self) -> int:
        """How many different states were seen (with `reduce`)."""
        return len(self._seen)

    def next(self) -> Ending | None:
        """The next execution's ending, None if it was pruned; not to be called when `complete`."""
        ending = self._run()
        self.complete = not self._back()
        return ending

    def state(self) -> object:
        """Where the search stands, as plain data."""
        path = [
            [node.to_try, _plain(node.sleep), _plain(node.tried), node.chosen, node.delays]
            for node in self._path
        ]
        seen = [[state, sorted(slept)] for state, slept in self._seen.items()]
        return [self.executions, self.pruned, self.steps, self.complete, path, seen]

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned, for the same scenario and profile."""
        self.executions, self.pruned, self.steps, self.complete, path, seen = state
        self._seen = {fingerprint: frozenset(slept) for fingerprint, slept in seen}
        self._path = []
        for to_try, sleep, tried, chosen, delays in path:
            node = _Node([(actor, left) for actor, left in to_try], _footprints(sleep))
            node.tried = _footprints(tried)
            node.chosen = chosen
            node.delays = delays
            self._path.append(node)

    def _back(self) -> bool:
        """Drops what is exhausted from the end of the path; whether anything is left."""
        while self._path and not self._path[-1].to_try:
            self._path.pop()
        return bool(self._path)

    def _run(self) -> Ending | None:
        """One execution: along the path, then the first choice everywhere. None if it was pruned."""
        self.executions += 1
        world = World(self._scenario, self._profile, coverage=self._coverage)
        world.track_footprints = self._reduce
        path = self._path
        world.replay([node.chosen for node in path[:-1]])
        if path:
            self._take(world, path[-1])
        while True:
            enabled = world.enabled()
            if not enabled:
                self.steps += len(world.schedule)
                return describe(world)
            new = self._node(world, enabled)
            if new is None:
                self.steps += len(world.schedule)
                self.pruned += 1
                return None
            path.append(new)
            self._take(world, new)

    def _take(self, world: World, node: _Node) -> None:
        actor, node.delays = node.to_try.pop()
        node.chosen = actor
        world.step(actor)
        if self._reduce:
            node.tried[actor] = world.footprint

    def _node(self, world: World, enabled: Sequence[Actor]) -> _Node | None:
        if not self._reduce:
            return _Node(self._choices(world, enabled), {})
        sleep = self._asleep(world)
        awake = [actor for actor in enabled if actor not in sleep]
        state = fingerprint(world)
        slept = self._seen.get(state)
        if slept is not None:
            # What slept then and is awake now has not been tried from here; what both know is left out.
            awake = [actor for actor in awake if actor in slept]
            self._seen[state] = slept & frozenset(sleep)
        else:
            self._seen[state] = frozenset(sleep)
        if not awake:
            return None
        return _Node([(actor, 0) for actor in reversed(awake)], sleep)

    def _asleep(self, world: World) -> Sleep:
        """What sleeps in the state that the last node's step has led to."""
        if not self._path:
            return {}
        last = self._path[-1]
        step = world.footprint
        return {
            actor: footprint
            for actor, footprint in (*last.sleep.items(), *last.tried.items())
            if actor != last.chosen and commute(footprint, step)
        }

    def _choices(self, world: World, enabled: Sequence[Actor]) -> list[tuple[Actor, int]]:
        """Who can go on, and the delays that are then left, the one that costs nothing last."""
        if self._delays is None:
            return [(actor, 0) for actor in reversed(enabled)]
        left = self._path[-1].delays if self._path else self._delays
        last = world.schedule[-1] if world.schedule else enabled[0]
        start = next((i for i, actor in enumerate(enabled) if actor >= last), 0)
        turn = [*enabled[start:], *enabled[:start]]
        turn.sort(key=is_drain)  # a store stays in its buffer as long as it can
        return [(actor, left - cost) for cost, actor in reversed(list(enumerate(turn))) if cost <= left]
