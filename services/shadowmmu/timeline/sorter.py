"""Things in the order of their times, when they come a little out of it.

In virtual time the events of one vCPU are in order, but it may be a while ahead of another.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["Sorter"]

_T = TypeVar("_T")

DEPTH: Final = 1 << 14
"""Things that are kept until those before them must have come."""


class Sorter(Generic[_T]):
    """Hands things to `sink` by their times; those of the same time in the order in which they came.

    Only the last `depth` of them are kept, so one that comes later than that many is out of its place.
    """

    def __init__(self, sink: Callable[[_T], None], depth: int = DEPTH) -> None:
        self._sink = sink
        self._depth = depth
        self._count = 0
        self._kept: list[tuple[int, int, _T]] = []

    def put(self, time: int, thing: _T) -> None:
        """The next thing."""
        self._count += 1
        heapq.heappush(self._kept, (time, self._count, thing))
        if len(self._kept) > self._depth:
            self._sink(heapq.heappop(self._kept)[2])

    def end(self) -> None:
        """There is no more."""
        for _, _, thing in sorted(self._kept, key=lambda kept: kept[:2]):
            self._sink(thing)
        self._kept.clear()
