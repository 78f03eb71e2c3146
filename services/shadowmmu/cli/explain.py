"""`shadowmmu explain`: which bug of the catalogue a recorded failure comes from, and how it came about.

Exit status: 0 attributed, 1 not attributed, 2 the recording cannot be used, or does not fail any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shadowmmu.cli.reproduction import UNUSABLE_STATUS, draw_repro, read_repro, write_svg

if TYPE_CHECKING:
    from shadowmmu.explorer.attribution import Attribution
    from shadowmmu.explorer.repro import Replayed, Repro

__all__ = ["explain"]

EXPLAIN_RUNS: Final = 100
FIXES_NAMED: Final = 3
"""Fixes switched in together that the table names."""


def explain(
    recording: Annotated[Path, typer.Argument(metavar="REPRO", help="A .repro file.")],
    *,
    runs: Annotated[
        int, typer.Option("--runs", min=2, help="Executions that a fix must prevent the failure in.")
    ] = EXPLAIN_RUNS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Fixes all choices.")] = 0,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the execution as SVG, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The attribution as JSON; no diagram.")] = False,
) -> None:
    """Say which bug a recorded failure comes from; exit status 0 if one explains it, 1 not, 2 it cannot be told."""
    from shadowmmu.explorer.attribution import Explanation, attribute
    from shadowmmu.explorer.repro import ReproError, replay_repro

    repro = read_repro(recording)
    try:
        replayed = replay_repro(repro)
    except ReproError as error:
        typer.echo(f"The reproduction cannot be followed: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
    schedule = replayed.followed.ending.schedule
    attribution = attribute(repro.scenario, repro.profile, repro.failure, schedule, runs=runs, seed=seed)
    if as_json:
        typer.echo(_json(repro, replayed, attribution))
    else:
        _show(repro, replayed, attribution)
    if svg is not None:
        write_svg(draw_repro(repro, schedule), svg)
    if attribution.explanation is Explanation.NOT_REPRODUCED:
        raise typer.Exit(UNUSABLE_STATUS)
    raise typer.Exit(0 if attribution.attributed else 1)


def _show(repro: Repro, replayed: Replayed, attribution: Attribution) -> None:
    from shadowmmu.explorer.diagram_text import render_text
    from shadowmmu.kvm import FIXES

    failure = replayed.failure or repro.failure
    typer.echo(f"Failure: {failure.kind}, profile {repro.profile}")
    typer.echo(f"    {failure.text}")
    if replayed.divergence is not None:
        typer.echo(f"    {replayed.sameness.value}; {replayed.divergence}")
    if attribution.attributed:
        typer.echo(f"Explained: {attribution.explanation.value}")
    else:
        typer.echo(f"Not attributed: {attribution.explanation.value}")
    for slug in attribution.fixes:
        fix = FIXES[slug]
        typer.echo(f"    {fix.bug} {slug} ({fix.years}): {fix.title}")
        typer.echo(f"        {fix.commit}")
        typer.echo(f"        {fix.description}")
    typer.echo("")
    _show_trials(attribution)
    typer.echo("")
    typer.echo(render_text(draw_repro(repro, replayed.followed.ending.schedule)), nl=False)


def _show_trials(attribution: Attribution) -> None:
    """The table of runs; those with a fix end at the first failure."""
    base = attribution.trials[0].profile
    labels = [
        trial.profile if len(trial.fixes) <= FIXES_NAMED else f"{base} + {len(trial.fixes)} fixes"
        for trial in attribution.trials
    ]
    width = max(map(len, labels))
    typer.echo(f"{'profile':<{width}}  failures of runs")
    for label, trial in zip(labels, attribution.trials, strict=True):
        note = "  (recurs at once)" if trial.at_once and trial.runs == 1 else ""
        typer.echo(f"{label:<{width}}  {trial.failures:>5} of {trial.runs}{note}")


def _json(repro: Repro, replayed: Replayed, attribution: Attribution) -> str:
    import msgspec

    failure = replayed.failure or repro.failure
    report = {
        "profile": repro.profile,
        "failure": {"kind": failure.kind, "text": failure.text},
        "replay": replayed.sameness.name.lower(),
        "explanation": attribution.explanation.name.lower(),
        "fixes": _fixes(attribution),
        "trials": attribution.trials,
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def _fixes(attribution: Attribution) -> list[dict[str, str]]:
    from shadowmmu.kvm import FIXES

    return [
        {
            "slug": slug,
            "bug": fix.bug,
            "commit": fix.commit,
            "years": fix.years,
            "description": fix.description,
        }
        for slug, fix in ((slug, FIXES[slug]) for slug in attribution.fixes)
    ]
