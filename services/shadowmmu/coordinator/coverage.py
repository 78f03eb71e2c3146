"""The coverage table: which named points a run reached, what fell there, and which outcomes operations had.

Read from the counters `point.NAME.reached|parked|operation|store` and `outcome.OPERATION.OUTCOME`. A point that is
reached a thousand times while nothing ever comes in between has shown nothing: so for each it is said whether
another vCPU's operation and a guest store fell there always, sometimes or never.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from shadowmmu.kvm.points import Point, PointKind

__all__ = ["Coverage", "Frequency", "OutcomeCoverage", "PointCoverage", "coverage_of"]

# The scheduling points that are effects, as `shadowmmu.machine.coverage.WaitPoint` names them.
WAIT_POINTS = {
    "MMU_LOCK": "waiting for mmu_lock",
    "KICK": "waiting for kicked vCPUs",
    "SRCU": "waiting for operations of vCPUs that may know the old memory slots",
}


class Frequency(enum.Enum):
    """How often something happened, of the times that it could have."""

    ALWAYS = "always"
    SOMETIMES = "sometimes"
    NEVER = "never"

    @classmethod
    def of(cls, times: int, chances: int) -> Frequency:
        if times <= 0:
            return cls.NEVER
        return cls.ALWAYS if times >= chances else cls.SOMETIMES


class PointCoverage(msgspec.Struct, frozen=True):
    """A named point. `operation`, `store`: how often another vCPU's host operation, or a guest store, fell there.

    `reached`, `parked`, `operations`, `stores` are counts. At memory points no host operation can fall: `operation`
    is None there.
    """

    name: str
    text: str
    kind: str
    reached: int
    parked: int
    operations: int
    stores: int
    operation: Frequency | None
    store: Frequency


class OutcomeCoverage(msgspec.Struct, frozen=True):
    """How often an operation ended in a certain way."""

    operation: str
    outcome: str
    count: int
    frequency: Frequency


class Coverage(msgspec.Struct, frozen=True):
    """The whole table."""

    points: list[PointCoverage]
    outcomes: list[OutcomeCoverage]


def coverage_of(counters: Mapping[str, int]) -> Coverage:
    """The coverage table of a run's counters."""
    return Coverage(_points(counters), _outcomes(counters))


def _points(counters: Mapping[str, int]) -> list[PointCoverage]:
    known: dict[str, tuple[str, PointKind]] = {point.name: (point.value, point.kind) for point in Point}
    known |= {name: (text, PointKind.SCHEDULING) for name, text in WAIT_POINTS.items()}
    for name in counters:  # of a newer service
        if name.startswith("point."):
            known.setdefault(name.split(".")[1], ("", PointKind.SCHEDULING))

    rows = []
    for name, (text, kind) in known.items():
        reached, parked, operations, stores = (
            counters.get(f"point.{name}.{what}", 0) for what in ("reached", "parked", "operation", "store")
        )
        rows.append(
            PointCoverage(
                name=name,
                text=text,
                kind=kind.value,
                reached=reached,
                parked=parked,
                operations=operations,
                stores=stores,
                operation=Frequency.of(operations, reached) if kind is PointKind.SCHEDULING else None,
                store=Frequency.of(stores, reached),
            )
        )
    return rows


def _outcomes(counters: Mapping[str, int]) -> list[OutcomeCoverage]:
    counts: dict[str, dict[str, int]] = {}
    for name, count in counters.items():
        if name.startswith("outcome.") and name.count(".") > 1:
            operation, outcome = name.removeprefix("outcome.").rsplit(".", 1)
            counts.setdefault(operation, {})[outcome] = count
    return [
        OutcomeCoverage(operation, outcome, count, Frequency.of(count, sum(outcomes.values())))
        for operation, outcomes in sorted(counts.items())
        for outcome, count in sorted(outcomes.items())
    ]
