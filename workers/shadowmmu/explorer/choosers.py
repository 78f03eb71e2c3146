"""Strategies that choose one actor after another, without remembering other executions.

Random scheduling chooses evenly. PCT (Burckhardt, Kothari, Musuvathi, Nagarakatte: "A randomized scheduler with
probabilistic guarantees of finding bugs", ASPLOS 2010) gives the actors random priorities and lowers that of whoever
runs at d - 1 random moments: it finds a bug of depth d with probability at least 1 / (n k^(d-1)) for n actors and k
steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol

from shadowmmu.explorer.actors import Actor

__all__ = ["Chooser", "FollowChooser", "PctChooser", "RandomChooser"]


class Chooser(Protocol):
    """Chooses who takes the next step of an execution."""

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """One of `enabled`, which is not empty."""
        ...


class RandomChooser:
    """Any actor, evenly."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """One of `enabled`."""
        return enabled[int(self._random() * len(enabled))]


class PctChooser:
    """Priorities with `depth` - 1 changes, somewhere in the first `length` steps."""

    def __init__(self, seed: int, depth: int, length: int) -> None:
        self._random = random.Random(seed)
        self._changes = {self._random.randrange(max(length, 1)): -n for n in range(1, depth)}
        self._priority: dict[Actor, float] = {}
        self._step = 0

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """The enabled actor of the highest priority."""
        priority = self._priority
        for actor in enabled:
            if actor not in priority:
                priority[actor] = 1.0 + self._random.random()
        chosen = max(enabled, key=priority.__getitem__)
        lowered = self._changes.get(self._step)
        if lowered is not None:
            priority[chosen] = float(lowered)
            chosen = max(enabled, key=priority.__getitem__)
        self._step += 1
        return chosen


_LIMIT: Final = 1 << 62


class FollowChooser:
    """A schedule, as far as it applies: steps of actors that are not enabled are left out.

    After it, `then` chooses; without it, whoever ran last goes on as long as possible, then the lowest number.
    """

    def __init__(self, schedule: Sequence[Actor], then: Chooser | None = None) -> None:
        self._schedule = schedule
        self._next = 0
        self._then = then
        self._last: Actor = _LIMIT

    def choose(self, enabled: Sequence[Actor]) -> Actor:
        """The next step of the schedule that is possible."""
        schedule = self._schedule
        while self._next < len(schedule):
            actor = schedule[self._next]
            self._next += 1
            if actor in enabled:
                self._last = actor
                return actor
        if self._then is not None:
            return self._then.choose(enabled)
        if self._last not in enabled:
            self._last = enabled[0]
        return self._last
