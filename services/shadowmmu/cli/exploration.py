"""What the commands that explore have in common: the progress line, and what is shown of a failure."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from shadowmmu.cli.console import progress_line
from shadowmmu.explorer.actors import format_schedule

if TYPE_CHECKING:
    from shadowmmu.explorer.campaign import SearchReport
    from shadowmmu.explorer.search import Budget, Found, Search

__all__ = ["SearchProgress", "show_found"]


class SearchProgress:
    """A progress line on stderr, where that is a terminal; a context manager, called now and then by the searches.

    `interrupted`: somebody pressed Ctrl-C, which ends the search but not the command.
    """

    def __init__(self, budget: Budget) -> None:
        self.interrupted = False
        self._budget = budget
        self._begin = time.monotonic()
        self._progress = progress_line()
        self._task = self._progress.add_task("setting up", total=budget.executions or budget.seconds)

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, _number: int, _frame: object) -> None:
        self.interrupted = True

    def __call__(self, search: Search) -> bool:
        if search.executions % 16 == 0:
            bad = sum(search.failures.values())
            self._show(search.executions, search.seconds, f"{search.executions} executions, {bad} bad")
        return not self.interrupted

    def of_all(self, executions: int) -> bool:
        """The same for several searches at a time, which have made so many executions together."""
        self._show(executions, time.monotonic() - self._begin, f"{executions} executions")
        return not self.interrupted

    def _show(self, executions: int, seconds: float, text: str) -> None:
        done = executions if self._budget.executions else seconds
        self._progress.update(self._task, completed=done, description=text)


def show_found(report: SearchReport, found: Found, out: Path | None, effort: int) -> None:
    """A failure: what it is, how it was found, and its shortest reproduction, which goes to the folder `out`.

    `effort`: executions that may be spent on making it shorter.
    """
    from shadowmmu.explorer.diagram import draw
    from shadowmmu.explorer.diagram_text import render_text
    from shadowmmu.explorer.repro import REPRO_SUFFIX, make_repro, save_repro
    from shadowmmu.explorer.shrink import shrink
    from shadowmmu.explorer.workload import explicit

    typer.echo(f"Verdict: {found.failure.kind}")
    typer.echo(f"    {found.failure.text}")
    typer.echo(
        f"    found by {found.strategy.value} in execution {found.execution}, after {found.seconds:.2f} s, "
        f"{len(found.schedule)} steps"
    )
    if not effort:
        typer.echo(f"    {format_schedule(found.schedule)}")
        return
    scenario = explicit(report.scenario, report.profile, found.schedule)
    shrunk = shrink(scenario, report.profile, found.failure, found.schedule, effort=effort)
    typer.echo(
        f"Shrunk to {shrunk.scenario.size} operations, switches between actors: {shrunk.switches} "
        f"({shrunk.executions} executions)"
    )
    typer.echo(f"    {format_schedule(shrunk.schedule)}")
    typer.echo("")
    typer.echo(render_text(draw(shrunk.scenario, report.profile, shrunk.schedule)), nl=False)
    if out is not None:
        path = out / f"{report.scenario.name}{REPRO_SUFFIX}"
        save_repro(make_repro(shrunk.scenario, report.profile, shrunk.schedule), path)
        typer.echo(f"'shadowmmu replay {path}' executes it again, 'shadowmmu explain {path}' attributes it.")
