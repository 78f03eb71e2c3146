"""What is run at a point of a sweep: the table of kinds, and a point's run as plain data that processes exchange."""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.experiments.kinds.explore import ExploreKind
from shadowmmu.experiments.kinds.hunt import HuntKind
from shadowmmu.experiments.kinds.kind import Kind, PointKind
from shadowmmu.experiments.kinds.stress import StressKind
from shadowmmu.experiments.kinds.virtual import VirtualKind
from shadowmmu.experiments.kinds.virtual_cost import VirtualCostKind
from shadowmmu.experiments.values import Metric, Value

__all__ = ["KINDS", "Job", "Outcome", "run_point"]

KINDS: Final[dict[Kind, PointKind]] = {
    Kind.VIRTUAL: VirtualKind(),
    Kind.VIRTUAL_COST: VirtualCostKind(),
    Kind.EXPLORE: ExploreKind(),
    Kind.HUNT: HuntKind(),
    Kind.STRESS: StressKind(),
}


class Job(msgspec.Struct, frozen=True):
    """A run: of which kind, with which parameters and seed, for at most `timeout` seconds.

    `code`: the version that asks for it; no other may answer.
    """

    kind: Kind
    parameters: dict[str, Value]
    seed: int
    timeout: float
    code: str


class Outcome(msgspec.Struct, frozen=True):
    """What came of a job: metrics, or the text of the error with the end of its traceback."""

    metrics: dict[str, Metric] | None = None
    error: str | None = None
    traceback: str | None = None


def run_point(job: Job) -> dict[str, Metric]:
    """Runs a job here and now; what was measured. Raises whatever the run raises."""
    return KINDS[job.kind].run(job.parameters, job.seed)
