"""What a run has reached: named points, what fell there, and outcomes of operations.

A scheduling point is interesting only if something came in between: whenever an operation stops at one, the coverage
notes whether another vCPU's host operation advanced and whether another vCPU's store was applied before it went on.
Waiting for mmu_lock and for kicked vCPUs are counted like named points.
"""

from __future__ import annotations

import enum
from collections import Counter

from shadowmmu.kvm.points import MEMORY_POINTS, Point

__all__ = ["Coverage", "WaitPoint"]


class WaitPoint(enum.Enum):
    """The scheduling points that are effects of their own."""

    MMU_LOCK = "waiting for mmu_lock"
    KICK = "waiting for kicked vCPUs"
    SRCU = "waiting for operations of vCPUs that may know the old memory slots"


class _Activity:
    """How often vCPUs advanced host operations, and stored: in all, and each by itself. The host agent is vCPU -1."""

    __slots__ = ("by_vcpu", "total")

    def __init__(self) -> None:
        self.total = 0
        self.by_vcpu: Counter[int] = Counter()

    def note(self, vcpu: int, count: int = 1) -> None:
        self.total += count
        self.by_vcpu[vcpu] += count

    def of_others(self, vcpu: int) -> int:
        return self.total - self.by_vcpu[vcpu]


class Coverage:
    """Counts per point: reached, parked there, another vCPU's operation fell there, a guest store fell there."""

    def __init__(self) -> None:
        self.reached: Counter[Point | WaitPoint] = Counter()
        self.parked: Counter[Point | WaitPoint] = Counter()
        self.operation_fell: Counter[Point | WaitPoint] = Counter()
        self.store_fell: Counter[Point | WaitPoint] = Counter()
        self.outcomes: Counter[str] = Counter()
        self._operations = _Activity()
        self._stores = _Activity()

    def operation_advanced(self, vcpu: int) -> None:
        """A host operation of `vcpu` took a step (-1: of the host agent)."""
        self._operations.note(vcpu)

    def stored(self, vcpu: int, count: int) -> None:
        """`count` stores of `vcpu` were applied to guest memory."""
        self._stores.note(vcpu, count)

    def mark(self, vcpu: int) -> tuple[int, int]:
        """A moment, to be given to `resumed` when the operation of `vcpu` that stops now goes on."""
        return self._operations.of_others(vcpu), self._stores.of_others(vcpu)

    def resumed(self, point: Point | WaitPoint, vcpu: int, mark: tuple[int, int]) -> None:
        """The operation of `vcpu` that stopped at `point` at `mark` goes on."""
        operation, store = self.fell(vcpu, mark)
        self.operation_fell[point] += operation
        self.store_fell[point] += store

    def fell(self, vcpu: int, mark: tuple[int, int]) -> tuple[bool, bool]:
        """Whether another vCPU's operation advanced since `mark`, and whether another vCPU's store was applied."""
        operations, stores = mark
        return self._operations.of_others(vcpu) > operations, self._stores.of_others(vcpu) > stores

    def covered(self, point: Point | WaitPoint) -> bool:
        """Whether a store fell at the point, and at a scheduling point another vCPU's operation too."""
        if not self.store_fell[point]:
            return False
        return self.operation_fell[point] > 0 or point in MEMORY_POINTS

    def counters(self) -> dict[str, int]:
        """All of it under the names of docs/REPORT.md: `point.NAME.reached` and so on, `outcome.NAME`."""
        counters: dict[str, int] = {}
        points: list[Point | WaitPoint] = [*Point, *WaitPoint]
        for point in points:
            for kind, counts in (
                ("reached", self.reached),
                ("parked", self.parked),
                ("operation", self.operation_fell),
                ("store", self.store_fell),
            ):
                counters[f"point.{point.name}.{kind}"] = counts[point]
        for outcome, count in self.outcomes.items():
            counters[f"outcome.{outcome}"] = count
        return counters
