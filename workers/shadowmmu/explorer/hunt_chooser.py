"""PCT with change points that are drawn by actor, or by the kind of place where an actor stands.

Where PCT (`choosers`) lowers a priority at a random step of the execution, a host thread of ten steps beside vCPUs of
hundreds is hardly ever stopped between two of them. With `ActorPctChooser` the actor is drawn first, then one of its
steps. The first change of successive seeds falls all over, evenly: an additive recurrence in two dimensions, whose
numbers leave no gaps as random ones do (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).

Most steps of a vCPU are walks and reads of guest entries; that its emulated store is in memory and the shadow does not
know is one step of a hundred. With `PlacePctChooser` every kind of place is as likely as any other, however often it is
met.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from shadowmmu.explorer.actors import KIND, Actor
from shadowmmu.explorer.choosers import Chooser
from shadowmmu.explorer.world import World
from shadowmmu.machine import Task

__all__ = ["ActorPctChooser", "PlacePctChooser", "Stop", "StopCounter", "place_of"]

_STEPS: Final = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1C)
"""1/g and 1/g² in 64 bits, g the real root of g³ = g + 1."""
FIRST_GOES_FIRST: Final = 0.75
"""How often whoever is to be stopped first begins, while others can still get in between."""

Stop: TypeAlias = tuple[Actor, str]
"""An actor, and the kind of place where it stands (`place_of`)."""


def _spread(seed: int, dimension: int) -> float:
    """A coordinate of point `seed` of the recurrence, from 0 to below 1."""
    return (seed * _STEPS[dimension] % (1 << 64) >> 11) / (1 << 53)


class ActorPctChooser:
    """Random priorities, and `changes` moments at which that of the actor that would go on falls below all others.

    `steps`: how many steps each actor is likely to take; some vCPU or host thread takes one.
    """

    def __init__(self, seed: int, changes: int, steps: Mapping[Actor, int]) -> None:
        self._random = random.Random(seed)
        actors = [actor for actor in sorted(steps) if actor // KIND != 1]  # not kicks, which have one step
        self._changes: dict[tuple[Actor, int], int] = {}
        for number in range(changes):
            which, where = (_spread(seed, n) if number == 0 else self._random.random() for n in (0, 1))
            actor = actors[int(which * len(actors))]
            self._changes[actor, int(where * steps[actor])] = -1 - number
        self._priority: dict[Actor, float] = {}
        self._taken: Counter[Actor] = Counter()

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """The enabled actor of the highest priority."""
        priority = self._priority
        for actor in enabled:
            if actor not in priority:
                priority[actor] = 1.0 + self._random.random()
        chosen = max(enabled, key=priority.__getitem__)
        while (lowered := self._changes.pop((chosen, self._taken[chosen]), None)) is not None:
            priority[chosen] = float(lowered)
            chosen = max(enabled, key=priority.__getitem__)
        self._taken[chosen] += 1
        return chosen


def place_of(world: World, actor: Actor) -> str:
    """Where an enabled actor stands: at which preemption point, at a walk, in the guest, or before an operation."""
    number = actor % KIND
    task: object = None
    if actor < KIND:
        lane = world.machine.lanes[number]
        task = lane.task
        if task is None:
            return "walk" if lane.runnable else "guest"
    elif actor // KIND == 2:
        task = next((t for t in world.machine.tasks() if t.lane is None and t.ticket == number + 1), None)
    return "start" if not isinstance(task, Task) or task.point is None else task.point.name


class StopCounter:
    """Chooses as another does, and counts where the chosen stand (`stood`); `place` tells where an actor does."""

    def __init__(self, chooser: Chooser, place: Callable[[Actor], str]) -> None:
        self.stood: Counter[Stop] = Counter()
        self._chooser = chooser
        self._place = place

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """The other's choice."""
        chosen = self._chooser.choose(enabled)
        self.stood[chosen, self._place(chosen)] += 1
        return chosen


class PlacePctChooser:
    """Random priorities, and `changes` moments at which that of the actor that would go on falls below all others.

    A moment is one of the times that an actor stands at a place of some kind: the actor is drawn, then the kind, then
    the time. Whoever is to be stopped first mostly begins: after the others it would be stopped in vain. `stops`: how
    often each actor is likely to stand where; `place` tells where it does.
    """

    def __init__(
        self, seed: int, changes: int, stops: Mapping[Stop, int], place: Callable[[Actor], str]
    ) -> None:
        self._random = random.Random(seed)
        self._place = place
        self._stood: Counter[Stop] = Counter()
        places: dict[Actor, list[str]] = {}
        for actor, where in sorted(stops):
            if actor // KIND != 1:  # not kicks, which have one step
                places.setdefault(actor, []).append(where)
        self._changes: dict[tuple[Stop, int], int] = {}
        self._priority: dict[Actor, float] = {}
        for number in range(changes):
            which, when = (_spread(seed, n) if number == 0 else self._random.random() for n in (0, 1))
            turn, kind = divmod(which * len(places), 1)
            actor = list(places)[int(turn)]
            stop = actor, places[actor][int(kind * len(places[actor]))]
            self._changes[stop, int(when * stops[stop])] = -1 - number
            if number == 0 and self._random.random() < FIRST_GOES_FIRST:
                self._priority[actor] = 2.0

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """The enabled actor of the highest priority."""
        priority = self._priority
        for actor in enabled:
            if actor not in priority:
                priority[actor] = 1.0 + self._random.random()
        while True:
            chosen = max(enabled, key=priority.__getitem__)
            stop = chosen, self._place(chosen)
            lowered = self._changes.pop((stop, self._stood[stop]), None)
            if lowered is None:
                self._stood[stop] += 1
                return chosen
            priority[chosen] = float(lowered)
