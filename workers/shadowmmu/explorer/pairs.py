"""Which pairs of points a search has exercised: one operation stood at P while another went on from Q.

Two operations race where one is stopped between two of its steps while the other takes one. A pair of points that was
reached but never exercised is an interleaving that the search has not tried.
"""

from __future__ import annotations

from collections import Counter

from shadowmmu.machine import Machine, Task

__all__ = ["PairCoverage"]


class PairCoverage:
    """Counts of (point of the operation that stands, point of the one that goes on), over any number of executions."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()

    def advances(self, machine: Machine, task: Task) -> None:
        """`task` is about to go on; everybody else stands where they stand."""
        here = _place(task)
        self.reached[here] += 1
        for other in machine.tasks():
            if other is not task and other.point is not None:
                self.pairs[_place(other), here] += 1

    def never(self) -> list[tuple[str, str]]:
        """The pairs of points that were reached, and never together."""
        points = sorted(point for point in self.reached if point != START)
        return [(p, q) for p in points for q in points if (p, q) not in self.pairs]


START = "START"
"""Where an operation begins."""


def _place(task: Task) -> str:
    return START if task.point is None else task.point.name
