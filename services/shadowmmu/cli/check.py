"""`shadowmmu check`: a run's events, taken from its journal again, through a checker that knows nothing of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shadowmmu.checker import Rule

__all__ = ["check"]

VIOLATED_STATUS = 1
UNUSABLE_STATUS = 2


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, with its journal.")],
    rules: Annotated[
        str, typer.Option("--rules", metavar="N,N,...", help="Only these rules of docs/COHERENCE.md.")
    ] = "",
) -> None:
    """Check the events of a recorded run; exit status 0 no violation, 1 a violation, 2 the journal cannot be used."""
    from shadowmmu import machine
    from shadowmmu.checker import Checker, Rule, Violation
    from shadowmmu.kvm import KvmError
    from shadowmmu.protocol.events import Event

    chosen = _rules(rules, list(Rule))
    checker = Checker(chosen)
    found: list[Violation] = []

    def feed(_first: int, events: list[Event], _data: bytes) -> None:
        if not found and (violation := checker.feed_all(events)) is not None:
            found.append(violation)

    try:
        result = machine.replay(folder, None, feed)
    except (machine.JournalError, KvmError, OSError) as error:
        typer.echo(f"The journal cannot be used: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
    for violation in found:
        typer.echo(str(violation))
        typer.echo(f"  blame: {violation.blame}")
        for related in violation.related:
            typer.echo(f"  event {related.index}: {related.note}: {related.event}")
        raise typer.Exit(VIOLATED_STATUS)
    if result.diverged_at is not None:
        typer.echo(f"The replay diverged at record {result.diverged_at}: {result.divergence}", err=True)
        raise typer.Exit(UNUSABLE_STATUS)
    names = (
        "rules 1-9" if len(chosen) == len(Rule) else f"rules {', '.join(str(rule.value) for rule in chosen)}"
    )
    typer.echo(f"no violation: {checker.events} events, {names}")


def _rules(text: str, known: list[Rule]) -> list[Rule]:
    if not text:
        return known
    wanted = {part.strip() for part in text.split(",")}
    unknown = wanted - {str(rule.value) for rule in known}
    if unknown:
        raise typer.BadParameter(f"no such rule: {', '.join(sorted(unknown))}", param_hint="--rules")
    return [rule for rule in known if str(rule.value) in wanted]
