"""`shadowmmu sweep`: an experiment's runs, made and kept.

Exit status: 0 all runs that were asked for have been made and none has failed, 2 otherwise.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Self

import msgspec
import typer

from shadowmmu.cli.console import output_console, plain
from shadowmmu.cli.options import usable_cores
from shadowmmu.cli.runs import CatalogueOption, enter_run, needs_experiments
from shadowmmu.cli.usage import bad_value
from shadowmmu.experiments.catalogue import Entry
from shadowmmu.protocol.messages import Verdict

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from shadowmmu.experiments.engine import Progress, SweepResult, Workplace
    from shadowmmu.experiments.folder import SweepWriter

__all__ = ["sweep"]

INCOMPLETE_STATUS: Final = 2
SHOWN_FAILURES: Final = 5
ERROR_WIDTH: Final = 120


def sweep(
    *,
    experiment: Annotated[
        str,
        typer.Argument(
            help="An experiment's file, or the name of one that comes with the program.",
            metavar="FILE.toml|NAME",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for the results. A sweep that is there is gone on with.", metavar="DIR"
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Processes on this machine; as many as there are cores if not given."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="Run on the Dask cluster of the scheduler there.", metavar="ADDRESS"
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Make the runs again that have failed.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Make so many runs, and leave the rest for later.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=(1 << 63) - 1, help="Instead of the seed in the experiment's file."
        ),
    ] = None,
    catalogue: CatalogueOption = None,
) -> None:
    """Run an experiment: every point of its design, every replicate; results go to a Parquet table.

    Runs that have ended are not made again, so a sweep that was stopped goes on with the same command. Ctrl-C ends it
    with what is known.
    """
    if scheduler is not None and jobs is not None:
        raise bad_value("--jobs", "is for this machine; with --scheduler the cluster decides")
    needs_experiments("polars")
    from shadowmmu.experiments.design import check_points
    from shadowmmu.experiments.folder import SweepWriteError, SweepWriter
    from shadowmmu.experiments.point import KINDS
    from shadowmmu.experiments.results import SweepFolderError
    from shadowmmu.experiments.spec import SpecError, find_spec
    from shadowmmu.machine.version import code_version

    try:
        spec = find_spec(experiment, seed)
        check_points(spec, experiment)
    except SpecError as error:
        raise bad_value("FILE.toml|NAME", str(error)) from error
    repeatable = KINDS[spec.kind].repeatable
    if not repeatable and (jobs or 1) > 1:
        raise bad_value("--jobs", f"runs of kind {spec.kind.value} are measured by the clock: one at a time")
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        with SweepWriter(out, spec, code_version()) as writer:
            where = _workplace(scheduler, jobs or (usable_cores() if repeatable else 1))
            result, interrupted = _run(writer, where, retry_failed=retry_failed, limit=limit)
            _show(writer, result, interrupted=interrupted)
    except SweepWriteError as error:
        raise _broken_off(error) from error
    except SweepFolderError as error:
        raise bad_value("--out", str(error)) from error
    done = not interrupted and not result.failed and (limit is not None or not result.left)
    enter_run(catalogue, _entry(writer, result, started))
    raise typer.Exit(0 if done else INCOMPLETE_STATUS)


def _broken_off(error: Exception) -> typer.Exit:
    """What is raised when a sweep cannot go on; a line says why, and what to do."""
    typer.echo(f"shadowmmu sweep: {error}", err=True)
    typer.echo("What was there before is kept; the same command goes on.", err=True)
    return typer.Exit(INCOMPLETE_STATUS)


def _entry(writer: SweepWriter, result: SweepResult, started: str) -> Entry:
    """What the catalogue has of a sweep. It passes if all of it is there, without failures."""
    sweep = writer.sweep
    return Entry(
        kind="sweep",
        folder=sweep.path,
        started=started,
        code=sweep.code,
        verdict=(Verdict.UNKNOWN if result.failed or result.left else Verdict.PASS).value,
        text=f"{sweep.spec.title}: {_ended(writer, result)}",
        configuration=msgspec.to_builtins(sweep.spec),
        metrics={"runs": sweep.runs, "failed": result.failed, "left": result.left, "digest": result.digest},
    )


@contextlib.contextmanager
def _workplace(scheduler: str | None, jobs: int) -> Iterator[Workplace]:
    from shadowmmu.experiments.engine import dask_workplace, local_workplace

    if scheduler is None:
        with local_workplace(jobs) as place:
            yield place
        return
    needs_experiments("distributed")
    with dask_workplace(scheduler) as place:
        yield place


def _run(
    writer: SweepWriter,
    where: contextlib.AbstractContextManager[Workplace],
    *,
    retry_failed: bool,
    limit: int | None,
) -> tuple[SweepResult, bool]:
    """Runs the sweep with a progress bar; the result, and whether somebody stopped it."""
    from shadowmmu.experiments.engine import ClusterError, run_sweep

    try:
        with _stop_on_signals() as stop, _ProgressBar() as bar, where as place:
            result = run_sweep(
                writer, place, retry_failed=retry_failed, limit=limit, progress=bar, stopped=stop.is_set
            )
    except ClusterError as error:
        raise _broken_off(error) from error
    return result, stop.is_set()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM, as batch systems send it) ends the sweep in order; the next ends the program."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ProgressBar:
    """Runs that have ended, and the time left, on stderr where that is a terminal; a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar: Bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=None)
        self._begun = False

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        failed = f"runs, {progress.failed} failed," if progress.failed else "runs,"
        if not self._begun:  # what was there before says nothing about speed
            self._begun = True
            self._bar.reset(self._task, total=progress.total, completed=progress.done, description=failed)
        self._bar.update(self._task, completed=progress.done, description=failed)


def _show(writer: SweepWriter, result: SweepResult, *, interrupted: bool) -> None:
    from rich import box
    from rich.table import Table

    path = writer.sweep.path
    if result.failed:
        table = Table(title="Failed", box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("point", "replicate", "parameters", "error"):
            table.add_column(column, overflow="fold")
        failures = writer.sweep.failures()
        for row in failures.head(SHOWN_FAILURES).iter_rows(named=True):
            values = " ".join(f"{name}={row[name]}" for name in writer.sweep.spec.varied())
            text = row["error"].splitlines()[0][:ERROR_WIDTH]
            table.add_row(*plain(str(row["point"]), str(row["replicate"]), values, text))
        output_console().print(table)
    typer.echo(f"{'Stopped: ' if interrupted else ''}{_ended(writer, result)}; {result.ran} were made now")
    if result.failed:
        typer.echo("With --retry-failed they are made again.")
    typer.echo(f"Table {path / 'results.parquet'}, digest {result.digest}")


def _ended(writer: SweepWriter, result: SweepResult) -> str:
    total = writer.sweep.runs
    return f"{total - result.left} of {total} runs have ended, {result.failed} of them failed"
