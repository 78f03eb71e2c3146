"""`shadowmmu explore --all-bugs`: every bug of the catalogue, looked for by its own litmus test.

Exit status 0 only if all is as expected: found without the fix, nothing with all fixes; what is equivalent, or has no
known observable, not found.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import typer

from shadowmmu.cli.console import output_console, progress_line

if TYPE_CHECKING:
    from rich.table import Table

    from shadowmmu.explorer.catalogue import BugResult
    from shadowmmu.explorer.strategy import Strategy

__all__ = ["all_bugs"]

FIXED_SHARE: Final = 0.25
"""Share of a bug's time that is spent on showing that all fixes together leave nothing to be found, at least."""
LONGEST: Final = 240.0
"""Seconds after which a bug is given up, however much time there is."""


def all_bugs(budget: float, strategy: Strategy, seed: int, jobs: int, out: Path | None) -> int:
    """Looks for all within `budget` seconds; the exit status.

    What is not found in its share of the time is looked for again when all others are done, with what is left.
    """
    from shadowmmu.explorer.catalogue import BugHunt, catalogue_slugs, look_for_all

    slugs = catalogue_slugs()
    begin = time.monotonic()
    results: dict[str, BugResult] = {}

    def look(missing: list[str], seconds: float) -> None:
        each = min(LONGEST, seconds * jobs / len(missing))
        hunts = [
            BugHunt(slug, each * (1 - FIXED_SHARE) / 2, each * FIXED_SHARE / 2, seed, strategy)
            for slug in missing
        ]
        for result in look_for_all(hunts, jobs):
            results[result.slug] = result
            progress.update(task, completed=len(results), description=result.slug)

    with progress_line() as progress:
        task = progress.add_task("bugs", total=len(slugs))
        look(slugs, budget)
        missing = [slug for slug in slugs if results[slug].too_little_time]
        left = budget - (time.monotonic() - begin)
        if missing and left > 0:
            look(missing, left)
    ordered = [results[slug] for slug in slugs]
    output_console().print(_table(ordered, out))
    unexpected = [result.slug for result in ordered if not result.as_expected]
    if unexpected:
        typer.echo(f"Not as expected: {', '.join(unexpected)}")
        return 1
    typer.echo(f"All {len(ordered)} as expected")
    return 0


def _table(results: list[BugResult], out: Path | None) -> Table:
    from rich import box
    from rich.table import Table

    from shadowmmu.kvm import FIXES

    table = Table(title="Every bug by its litmus test", box=box.SIMPLE_HEAD, title_justify="left")
    numbers = {"executions", "seconds", "size", "switches", "fixed"}
    for column in (
        "bug",
        "without the fix",
        "found",
        "by",
        "executions",
        "seconds",
        "size",
        "switches",
        "fixed",
        "",
    ):
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, no_wrap=column in {"bug", "without the fix"})
    for result in results:
        fix = FIXES[result.slug]
        found = result.found
        table.add_row(
            fix.bug,
            result.slug,
            _what(result),
            "" if found is None else found.strategy.value,
            str(result.executions),
            f"{result.seconds:.2f}",
            *_shrunk(result, out),
            f"{result.fixed_executions}",
            "" if result.as_expected else "NOT AS EXPECTED",
        )
    return table


def _what(result: BugResult) -> str:
    if result.missing:
        return "there is no litmus test"
    if result.fixed_found is not None:
        return f"with all fixes: {result.fixed_found.failure.kind}"
    if result.found is not None:
        return result.found.failure.kind
    return f"nothing ({result.expected.value})"


def _shrunk(result: BugResult, out: Path | None) -> tuple[str, str]:
    """Size and switches of the shortest reproduction, which is kept if there is a folder for it."""
    from shadowmmu.explorer.repro import REPRO_SUFFIX, make_repro, save_repro

    shrunk = result.shrunk
    if shrunk is None:
        return "", ""
    if out is not None:
        repro = make_repro(shrunk.scenario, result.profile, shrunk.schedule)
        save_repro(repro, out / f"{result.slug}{REPRO_SUFFIX}")
    return str(shrunk.scenario.size), str(shrunk.switches)
