"""What a conformance check is, and what comes of it. Pure data.

A check has an id that does not change between versions, a title that says what holds if it passes, and the heading of
docs/PROTOCOL.md that it comes from.
"""

from __future__ import annotations

import enum

import msgspec

__all__ = ["Check", "Outcome", "Report", "Result"]


class Check(msgspec.Struct, frozen=True):
    """One thing that the specification demands. `section`: the heading in docs/PROTOCOL.md."""

    id: str
    title: str
    section: str


class Outcome(enum.Enum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # it was not to be seen here; the text says why


class Result(msgspec.Struct, frozen=True):
    """A check's outcome. `text`: what went wrong, or why it was skipped; `seconds`: how long it took, 0 if unknown."""

    check: Check
    outcome: Outcome
    text: str = ""
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True):
    """All results. `subject`: who was checked; `notes`: what else is worth knowing, a line each."""

    subject: str
    results: list[Result]
    notes: list[str] = []

    def count(self, outcome: Outcome) -> int:
        """How many checks came out so."""
        return sum(result.outcome is outcome for result in self.results)

    @property
    def passed(self) -> bool:
        """No check failed, and at least one passed."""
        return not self.count(Outcome.FAILED) and self.count(Outcome.PASSED) > 0
