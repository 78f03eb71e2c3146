"""chaos.json: which faults a run had, and what came of it."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["CHAOS_NAME", "ChaosReport", "FaultReport"]

CHAOS_NAME: Final = "chaos.json"
"""The file in a run's folder."""


class FaultReport(msgspec.Struct, frozen=True):
    """A fault of the plan. `seconds`: when it happened, after the beginning; None: it was not due in time."""

    at: int
    kind: str
    target: str
    stopped_seconds: float
    seconds: float | None
    outcome: str


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a chaos run. `failures`: what did not hold; empty if the run came to no harm.

    `lost`, `duplicated`: instructions of the guests' programs that were, as the journal shows.
    """

    seed: int
    seconds: float
    hung: bool
    restarts: int
    instructions: int
    faults: list[FaultReport]
    lost: int
    duplicated: int
    failures: list[str]
