"""The report on the mutants: docs/MUTATION.md."""

from __future__ import annotations

import enum
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from tools.mutation.ledger import Ledger, Result
from tools.mutation.mutant import MODEL, ROOT, Mutant
from tools.revision import revision

__all__ = ["AIM", "Explanation", "complaints", "explanations", "kill_rate", "render"]

EXPLANATIONS: Final = Path(__file__).parent / "explanations.toml"
AIM: Final = 0.95
"""The share of mutants that are to be killed, of those that are not equivalent to the model."""


class ExplanationKind(enum.Enum):
    """Why a mutant survives."""

    EQUIVALENT = "equivalent"  # it does the same as the model
    GAP = "gap"  # it does not; nothing notices


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a mutant survives (explanations.toml, by the mutant's id)."""

    kind: ExplanationKind
    why: str


def explanations() -> dict[str, Explanation]:
    """What explanations.toml says."""
    return msgspec.toml.decode(EXPLANATIONS.read_bytes(), type=dict[str, Explanation])


def _killed_by(result: Result) -> str:
    return {"audit": "tests", "passed": "survived"}.get(result.outcome, result.outcome)


def kill_rate(results: list[Result], explained: dict[str, Explanation]) -> float:
    """The share that was killed, of those that are not equivalent."""
    counted = [
        result
        for result in results
        if result.outcome != "passed"
        or result.id not in explained
        or explained[result.id].kind is not ExplanationKind.EQUIVALENT
    ]
    return sum(result.outcome != "passed" for result in counted) / len(counted) if counted else 1.0


def complaints(results: list[Result], explained: dict[str, Explanation]) -> list[str]:
    """What is wrong with the outcome: too few killed, survivors that nobody explained, explanations in vain."""
    survivors = {result.id for result in results if result.outcome == "passed"}
    rate = kill_rate(results, explained)
    out = [
        f"{name}: survives, and explanations.toml does not say why"
        for name in sorted(survivors - set(explained))
    ]
    out += [f"{name}: explained, but it does not survive" for name in sorted(set(explained) - survivors)]
    if rate < AIM:
        out.append(f"{rate:.1%} of the mutants that are not equivalent are killed, fewer than {AIM:.0%}")
    return out


def render(ledger: Ledger, sampled: list[Mutant], chosen: list[Mutant], seed: int) -> str:
    """The page."""
    explained = explanations()
    every = [result for mutant in [*chosen, *sampled] if (result := ledger.find(mutant)) is not None]
    revisions = sorted({result.revision for result in every})
    out = [
        "# Mutants of the model",
        "",
        f"Made by `make mutants`, {revision(ROOT / MODEL)}; [FAITHFULNESS.md](FAITHFULNESS.md) says how.",
        "",
        f"Results are of: {'; '.join(revisions)}.",
        "",
        f"Mutants: {len(chosen)} chosen by hand and a sample of {len(sampled)} (seed {seed}).",
        "",
        "| | all | killed by recordings | killed by tests | endless | survived | killed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, mutants in (("chosen by hand", chosen), ("sampled", sampled), ("all", [*chosen, *sampled])):
        results = [result for mutant in mutants if (result := ledger.find(mutant)) is not None]
        counts = Counter(_killed_by(result) for result in results)
        killed = len(results) - counts["survived"]
        out.append(
            f"| {name} | {len(results)} | {counts['recordings']} | {counts['tests']} | {counts['timeout']} "
            f"| {counts['survived']} | {killed / max(len(results), 1):.1%} |"
        )
    missing = len(chosen) + len(sampled) - len(every)
    if missing:
        out += ["", f"**Not tried yet: {missing}.**"]
    out += [
        "",
        f"Of the mutants that are not equivalent to the model, {kill_rate(every, explained):.1%} are killed.",
        "",
        "## Survivors",
        "",
    ]
    survivors = [
        m for m in [*chosen, *sampled] if (r := ledger.find(m)) is not None and r.outcome == "passed"
    ]
    if not survivors:
        out.append("None.")
    for mutant in survivors:
        explanation = explained.get(mutant.id)
        why = (
            "**Not explained.**"
            if explanation is None
            else f"{explanation.kind.value.capitalize()}: {explanation.why}"
        )
        out += [f"**{mutant.id}**, in `{mutant.module}.{mutant.function}`: {why}", "", *_diff(mutant), ""]
    out += ["## Chosen by hand", "", "| mutant | what it means | killed by |", "| --- | --- | --- |"]
    for mutant in chosen:
        result = ledger.find(mutant)
        out.append(f"| {mutant.id} | {mutant.why} | {'not tried' if result is None else _killer(result)} |")
    out += [
        "",
        "## Sampled",
        "",
        "| mutant | in | what was changed | killed by |",
        "| --- | --- | --- | --- |",
    ]
    for mutant in sampled:
        result = ledger.find(mutant)
        out.append(
            f"| {mutant.id} | `{mutant.function or '(module)'}` | {mutant.kind} "
            f"| {'not tried' if result is None else _killer(result)} |"
        )
    return "\n".join(out) + "\n"


def _killer(result: Result) -> str:
    """What killed a mutant, in short."""
    if result.outcome == "passed":
        return "nothing"
    if "::" in result.killer:
        file, test = result.killer.split("::", 1)
        name = f"{Path(file).name}: {test}"
    else:
        name = Path(result.killer).name.removesuffix(".jsonl.gz")
    return {"audit": f"audit in {name}", "timeout": f"endless in {name}"}.get(result.outcome, name).replace(
        "|", "\\|"
    )


def _diff(mutant: Mutant) -> list[str]:
    return ["```diff", f"-{mutant.line.strip()}", f"+{mutant.becomes.strip()}", "```"]
