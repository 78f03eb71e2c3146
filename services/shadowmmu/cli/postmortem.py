"""What a stress run does about a violation that it met: a short reproduction, and the bug that explains it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import typer

__all__ = ["show_postmortem"]

REPRO_NAME: Final = "violation.repro"
"""The reproduction's file in a run's folder."""


def show_postmortem(folder: Path, seconds: float) -> None:
    """Looks for a reproduction of the violation in the run's folder, for about `seconds`; shows and keeps it."""
    from rich.console import Console

    from shadowmmu.checker import Rule
    from shadowmmu.coordinator import decode_report
    from shadowmmu.coordinator.report import REPORT_NAME
    from shadowmmu.explorer.diagram import draw
    from shadowmmu.explorer.diagram_text import render_text
    from shadowmmu.explorer.postmortem import examine
    from shadowmmu.explorer.repro import save_repro
    from shadowmmu.kvm import FIXES
    from shadowmmu.machine import JOURNAL_NAME, read_journal

    violation = decode_report((folder / REPORT_NAME).read_bytes()).violation
    if violation is None:
        return
    with (folder / JOURNAL_NAME).open("rb") as source:
        records = list(read_journal(source))
    with Console(stderr=True).status("looking for a short reproduction"):
        found = examine(records, Rule(violation.rule), violation.journal_record, seconds, time.monotonic)
    if found.repro is None or found.attribution is None:
        typer.echo(f"No short reproduction was found in {found.executions} executions.")
        return
    path = folder / REPRO_NAME
    save_repro(found.repro, path)
    typer.echo(
        f"Reproduced by {found.repro.scenario.size} operations ({found.executions} executions), {path}:"
    )
    typer.echo(render_text(draw(found.repro.scenario, found.repro.profile, found.repro.schedule)), nl=False)
    attribution = found.attribution
    typer.echo(
        f"{'Explained' if attribution.attributed else 'Not attributed'}: {attribution.explanation.value}"
    )
    for slug in attribution.fixes:
        fix = FIXES[slug]
        typer.echo(f"    {fix.bug} {slug} ({fix.years}): {fix.title}")
