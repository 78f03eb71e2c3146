"""PCT with change points that are drawn by actor.

Where PCT (`choosers`) lowers a priority at a random step of the execution, a host thread of ten steps beside vCPUs of
hundreds is hardly ever stopped between two of them. Here the actor is drawn first, then one of its steps. The first
change of successive seeds falls all over, evenly: an additive recurrence in two dimensions, whose numbers leave no gaps
as random ones do (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from shadowmmu.explorer.actors import KIND, Actor

__all__ = ["ActorPctChooser"]

_STEPS: Final = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1C)
"""1/g and 1/g² in 64 bits, g the real root of g³ = g + 1."""


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
