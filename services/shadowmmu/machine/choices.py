"""Where the scheduler's choices come from, and how they are kept.

The machine asks `below(n)` for a number and `chance(rate)` for a yes or no. A seeded source draws them and remembers
what it drew until the journal takes it; a replayed source gives back what a journal holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Choices", "ChoicesExhaustedError", "RecordedChoices", "SeededChoices"]


class ChoicesExhaustedError(Exception):
    """The machine asked for a choice that the journal does not have: it took another path than the recorded run."""


class Choices(Protocol):
    """A source of choices."""

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1 (`bound` at least 2)."""
        ...

    def chance(self, rate: float) -> bool:
        """Yes with probability `rate`; a rate of 0 asks nobody."""
        ...


class SeededChoices:
    """Draws from a generator with a seed and remembers what it drew. Can be pickled.

    `record`: a run that was recovered draws on from there; what is drawn is a function of the seed and that number.
    """

    def __init__(self, seed: int, record: int = 0) -> None:
        self._random = random.Random(f"{seed} {record}" if record else seed).random
        self._drawn: list[int] = []

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        choice = int(self._random() * bound)
        self._drawn.append(choice)
        return choice

    def chance(self, rate: float) -> bool:
        """Yes with probability `rate`."""
        if rate <= 0.0:
            return False
        choice = self._random() < rate
        self._drawn.append(int(choice))
        return choice

    def take(self) -> list[int]:
        """What was drawn since the last call."""
        drawn = self._drawn
        self._drawn = []
        return drawn


class RecordedChoices:
    """Gives back recorded choices in order."""

    def __init__(self) -> None:
        self._recorded: Sequence[int] = ()
        self._next = 0

    def load(self, recorded: Sequence[int]) -> None:
        """The choices of the next record; those of the one before must be used up (ChoicesExhaustedError if not)."""
        if self._next != len(self._recorded):
            raise ChoicesExhaustedError(
                f"{len(self._recorded) - self._next} recorded choices were not asked for"
            )
        self._recorded = recorded
        self._next = 0

    def finish(self) -> None:
        """No more come; those of the last record must be used up too."""
        self.load(())

    def _take(self) -> int:
        if self._next >= len(self._recorded):
            raise ChoicesExhaustedError("the machine asked for a choice that the journal does not have")
        choice = self._recorded[self._next]
        self._next += 1
        return choice

    def below(self, bound: int) -> int:
        """The next recorded number; ChoicesExhaustedError if it is none below `bound`."""
        choice = self._take()
        if not 0 <= choice < bound:
            raise ChoicesExhaustedError(f"recorded choice {choice} is not below {bound}")
        return choice

    def chance(self, rate: float) -> bool:
        """The next recorded yes or no."""
        return rate > 0.0 and bool(self._take())
