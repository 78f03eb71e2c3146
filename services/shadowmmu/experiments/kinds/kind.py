"""What a kind of run is to a sweep: parameters, a check of a point before anything runs, and the run itself."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Protocol

from shadowmmu.experiments.parameters import Parameters
from shadowmmu.experiments.values import Metric, Value

__all__ = ["Kind", "PointKind"]


class Kind(enum.Enum):
    """What is run at each point."""

    VIRTUAL = "virtual"  # a run in virtual time
    VIRTUAL_COST = "virtual-cost"  # the same, and how long it takes by the wall clock
    EXPLORE = "explore"  # a search of schedules
    HUNT = "hunt"  # a hunt in random guests
    STRESS = "stress"  # runs with processes: the simulator's own throughput


class PointKind(Protocol):
    """A kind of run.

    `title`: for people. `repeatable`: the same parameters and seed give the same metrics, on any machine; if not, a
    point wants the machine for itself.
    """

    title: str
    repeatable: bool

    @property
    def parameters(self) -> Parameters[Any]:
        """What can be varied."""

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises ParameterError if no run can have these values together."""

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """Runs, and measures. Any exception is a failure of the point."""
