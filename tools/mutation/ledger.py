"""The ledger: what became of each mutant, one JSON line each, so that a run can go on where it was stopped.

A result holds for the model that it was found with. A kill holds as long as the recording or test file that did it is
as it was; survival holds as long as all recordings and tests are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from tools.ledger import Ledger as Lines
from tools.mutation.bench import RECORDINGS
from tools.mutation.mutant import MODEL, ROOT, Mutant
from tools.mutation.trial import Verdict
from tools.revision import digest, revision

__all__ = ["Ledger", "Result"]

FILE: Final = Path(__file__).parent / "results.jsonl"
EVIDENCE: Final = (
    ROOT / "tests" / "kvm",
    ROOT / "tests" / "conform",
    ROOT / RECORDINGS,
    ROOT / "services" / "shadowmmu" / "conform",
    Path(__file__).with_name("trial.py"),
)
"""What kills mutants."""


class Result(msgspec.Struct, frozen=True):
    """What became of a mutant; `outcome` and `killer` as in Verdict; `revision`: date and commit; then digests."""

    id: str
    becomes: str
    outcome: str
    killer: str
    detail: str
    model: str
    evidence: str
    killer_digest: str
    revision: str


class Ledger:
    """The results that hold now, and a place to write new ones."""

    def __init__(self) -> None:
        self.model = digest([ROOT / MODEL])
        self.evidence = digest(EVIDENCE)
        self._revision = revision(ROOT / MODEL)
        self._lines = Lines(FILE, Result)
        self.results = {result.id: result for result in self._lines.results if self._holds(result)}

    def _holds(self, result: Result) -> bool:
        if result.model != self.model:
            return False
        if result.evidence == self.evidence:
            return True
        return result.outcome != "passed" and result.killer_digest == _digest_of(result.killer)

    def find(self, mutant: Mutant) -> Result | None:
        """What is known of a mutant."""
        result = self.results.get(mutant.id)
        return result if result is not None and result.becomes == mutant.becomes.strip() else None

    def add(self, mutant: Mutant, verdict: Verdict) -> Result:
        """Note what became of a mutant, at once."""
        result = Result(
            mutant.id,
            mutant.becomes.strip(),
            verdict.outcome,
            verdict.killer,
            verdict.detail,
            self.model,
            self.evidence,
            _digest_of(verdict.killer),
            self._revision,
        )
        self.results[mutant.id] = result
        self._lines.add(result)
        return result

    def tidy(self, mutants: Iterable[Mutant]) -> None:
        """Write the file anew: the results that hold of these mutants, in their order."""
        kept = [result for mutant in mutants if (result := self.find(mutant)) is not None]
        FILE.write_bytes(b"".join(msgspec.json.encode(result) + b"\n" for result in kept))


def _digest_of(killer: str) -> str:
    """The digest of the recording or test file that a killer names; empty if it names none."""
    path = ROOT / killer.split("::", maxsplit=1)[0]
    return digest([path]) if killer and path.is_file() else ""
