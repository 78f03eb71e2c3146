"""A run's counters over time: samples at equal intervals, few enough to be kept whole. Pure.

A run may last a second or a week, and a plot has room for some hundred points. So when there are too many samples every
second one goes, and from then on they are taken half as often: the first and the last one stay, and what is there
is evenly spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

__all__ = [
    "POINTS_INTERRUPTED",
    "POINTS_REACHED",
    "SAMPLE_LIMIT",
    "Sample",
    "Series",
    "is_sum",
    "sampled_counters",
]

SAMPLE_LIMIT: Final = 240
"""At most so many samples are kept; an even number, so that thinning keeps the newest."""

POINTS_REACHED: Final = "points.reached"
"""How many named points were reached at all."""
POINTS_INTERRUPTED: Final = "points.interrupted"
"""At how many of them another vCPU's operation, or a guest store, fell."""

_LEFT_OUT: Final = ("point.", "outcome.", "guest.", "vcpu.", "errors.")
"""Families of counters that are too many for a sample."""
_KEPT: Final = frozenset({"vcpu.instructions", "vcpu.tlb_hits", "vcpu.tlb_misses", "vcpu.bypassed"})


class Sample(msgspec.Struct, frozen=True):
    """Counters at a moment. `seconds`: after the start of the run, wall clock; a counter that is 0 is left out."""

    seconds: float
    counters: dict[str, int]


class Series:
    """The samples of one run. `interval`: seconds from one to the next at first; it begins with 0 at the start."""

    def __init__(self, interval: float, limit: int = SAMPLE_LIMIT) -> None:
        assert limit >= 2
        assert limit % 2 == 0
        self.interval = interval
        self._limit = limit
        self._samples = [Sample(0.0, {})]

    @property
    def samples(self) -> list[Sample]:
        """The oldest first; times strictly increase."""
        return list(self._samples)

    def due(self, seconds: float) -> bool:
        """Whether the next sample is to be taken."""
        return seconds >= self._samples[-1].seconds + self.interval

    def add(self, seconds: float, counters: Mapping[str, int]) -> None:
        """A sample, due or not: the last one of a run never is. If it is no later than the last, it takes its place.

        Sums never go down: what a service that was started again has not told again yet is as it was.
        """
        seconds = round(seconds, 3)
        last = self._samples[-1]
        now = {name: value for name, value in counters.items() if value}
        for name, value in last.counters.items():
            if is_sum(name):
                now[name] = max(now.get(name, 0), value)
        if seconds <= last.seconds:
            self._samples[-1] = Sample(last.seconds, now)
            return
        self._samples.append(Sample(seconds, now))
        if len(self._samples) > self._limit:
            self._samples = self._samples[::2]
            self.interval *= 2


def is_sum(name: str) -> bool:
    """Whether a counter only grows; else it says how many there are at present."""
    return not name.endswith(".current")


def sampled_counters(counters: Mapping[str, int]) -> dict[str, int]:
    """What of a run's counters goes into a sample, and two more: `points.reached`, `points.interrupted`."""
    sampled = {
        name: value for name, value in counters.items() if name in _KEPT or not name.startswith(_LEFT_OUT)
    }
    reached, interrupted = set(), set()
    for name, value in counters.items():
        if value and name.startswith("point."):
            point, _, kind = name.removeprefix("point.").rpartition(".")
            if kind == "reached":
                reached.add(point)
            elif kind in ("operation", "store"):
                interrupted.add(point)
    return sampled | {POINTS_REACHED: len(reached), POINTS_INTERRUPTED: len(interrupted)}
