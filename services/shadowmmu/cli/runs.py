"""`shadowmmu runs`: the catalogue of runs; and how commands enter theirs.

A run is entered if --catalogue or SHADOWMMU_CATALOGUE says where, and else nowhere: nothing is written to anybody's
home folder that was not asked for. `default` says "in the usual place", where `shadowmmu runs` looks by itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from shadowmmu.cli.console import output_console, plain
from shadowmmu.cli.usage import USAGE_STATUS, bad_value
from shadowmmu.experiments.catalogue import (
    CATALOGUE_VARIABLE,
    DEFAULT_WORD,
    Catalogue,
    CatalogueError,
    Entry,
    Run,
    default_catalogue,
    enter,
)
from shadowmmu.experiments.values import Metric

if TYPE_CHECKING:
    from shadowmmu.coordinator import RunReport

__all__ = ["CatalogueOption", "enter_report", "enter_run", "needs_experiments", "runs_app"]

CatalogueOption = Annotated[
    Path | None,
    typer.Option(
        "--catalogue",
        envvar=CATALOGUE_VARIABLE,
        help="Enter the run in the catalogue in this file ('default': the usual one).",
        metavar="FILE",
        dir_okay=False,
    ),
]
CatalogueFile = Annotated[
    Path | None,
    typer.Option(
        "--catalogue",
        envvar=CATALOGUE_VARIABLE,
        help="The catalogue; the usual one (in XDG's folder for state) if not given.",
        metavar="FILE",
        dir_okay=False,
    ),
]
RunName = Annotated[str, typer.Argument(help="A run: its number, or its folder.", metavar="RUN")]

INSTRUCTIONS: Final = "vcpu.instructions"
"""The counter to which others are set in proportion."""
RUN_FILES: Final = ("report.json", "sweep.json", "simulation.json")
"""One of these makes a folder a run's; no other is deleted."""
TEXT_WIDTH: Final = 60

runs_app = typer.Typer(no_args_is_help=True, help="The catalogue of runs.")


# --- entering --------------------------------------------------------------------------------------------------------


def needs_experiments(package: str) -> None:
    """Ends the command with a line that names the extra `experiments` if a package of it is missing."""
    if importlib.util.find_spec(package) is None:
        typer.echo(f"shadowmmu: this needs {package}: pip install 'shadowmmu[experiments]'", err=True)
        raise typer.Exit(USAGE_STATUS)


def _place(catalogue: Path | None) -> Path:
    return default_catalogue() if catalogue is None or str(catalogue) == DEFAULT_WORD else catalogue


def enter_run(catalogue: Path | None, entry: Entry) -> None:
    """Enters a run that has ended, if a catalogue is asked for. If that fails the run is no worse: a line says so."""
    if catalogue is None:
        return
    try:
        enter(_place(catalogue), entry)
    except CatalogueError as error:
        typer.echo(f"The run is not in the catalogue: {error}", err=True)


def enter_report(catalogue: Path | None, kind: str, report: RunReport, folder: Path | None) -> None:
    """Enters a run that ended with a report; `folder` is None if it was not kept."""
    metrics: dict[str, Metric] = {"seconds": report.seconds.running, "events": report.stream.events}
    entry = Entry(
        kind=kind,
        folder=folder,
        started=report.started,
        code=report.version,
        verdict=report.verdict.value,
        text=report.text,
        configuration={"vcpus": report.vcpus, **msgspec.to_builtins(report.config)},
        metrics=metrics | dict(report.throughput) | dict(report.counters),
    )
    enter_run(catalogue, entry)


# --- looking ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(catalogue: Path | None) -> Iterator[Catalogue]:
    """The catalogue; its errors are the option's."""
    try:
        with Catalogue(_place(catalogue)) as opened:
            yield opened
    except CatalogueError as error:
        raise bad_value("--catalogue", str(error)) from error


def _find(catalogue: Catalogue, name: str) -> Run:
    try:
        return catalogue.find(name)
    except CatalogueError as error:
        raise bad_value("RUN", str(error)) from error


def _builtins(run: Run) -> dict[str, Any]:
    entry = run.entry
    folder = None if entry.folder is None else str(entry.folder)
    return {
        "run": run.number,
        "entered": run.entered.isoformat(),
        **msgspec.structs.asdict(entry),
        "folder": folder,
    }


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


@runs_app.command("list")
def list_runs(
    *,
    catalogue: CatalogueFile = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only runs of this command.")] = None,
    verdict: Annotated[str | None, typer.Option("--verdict", help="Only runs that ended so.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with everything that is known.")] = False,
) -> None:
    """The runs that there were, the newest first."""
    with _open(catalogue) as opened:
        runs = [
            run
            for run in reversed(opened.runs())
            if kind in (None, run.entry.kind) and verdict in (None, run.entry.verdict)
        ]
    if json:
        _print_json([_builtins(run) for run in runs])
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", justify="right")
    for column in ("kind", "started", "verdict", "text", "folder"):
        table.add_column(column, overflow="fold")
    for run in runs:
        entry = run.entry
        text = entry.text if len(entry.text) <= TEXT_WIDTH else f"{entry.text[:TEXT_WIDTH]}..."
        table.add_row(
            *plain(str(run.number), entry.kind, entry.started[:19], entry.verdict, text, _place_of(entry))
        )
    output_console().print(table)


def _gone(entry: Entry) -> bool:
    """Whether its folder was kept, and is there no more. One that this user may not look for is there."""
    try:
        return entry.folder is not None and not entry.folder.exists()
    except OSError:
        return False


def _place_of(entry: Entry) -> str:
    return "not kept" if entry.folder is None else f"{entry.folder}{' (gone)' if _gone(entry) else ''}"


@runs_app.command("show")
def show_run(
    *,
    run: RunName,
    catalogue: CatalogueFile = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What is known of a run."""
    with _open(catalogue) as opened:
        found = _find(opened, run)
    if json:
        _print_json(_builtins(found))
        return
    entry = found.entry
    typer.echo(f"Run {found.number}: {entry.kind}, started {entry.started}, version {entry.code}")
    typer.echo(f"Folder: {_place_of(entry)}")
    typer.echo(f"Verdict: {entry.verdict}: {entry.text}")
    for title, values in (("Configuration", entry.configuration), ("Metrics", entry.metrics)):
        typer.echo(f"{title}:")
        for name, value in values.items():
            shown = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            typer.echo(f"    {name:<40} {shown}")


# --- comparing -------------------------------------------------------------------------------------------------------


@runs_app.command("compare")
def compare_runs(
    *,
    first: RunName,
    second: RunName,
    catalogue: CatalogueFile = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Two runs side by side: what they were, and what was counted, with the second's share of the first.

    Where both have executed guest instructions the last column compares rates per instruction.
    """
    with _open(catalogue) as opened:
        runs = _find(opened, first), _find(opened, second)
    one, other = (run.entry for run in runs)
    differences = {
        name: [one.configuration.get(name), other.configuration.get(name)]
        for name in dict.fromkeys([*one.configuration, *other.configuration])
        if one.configuration.get(name) != other.configuration.get(name)
    }
    rows = compared(one.metrics, other.metrics)
    if json:
        metrics = {name: values for name, *values in rows}
        _print_json({"runs": [run.number for run in runs], "configuration": differences, "metrics": metrics})
        return
    for run in runs:
        typer.echo(f"Run {run.number}: {run.entry.kind}, {run.entry.verdict}, version {run.entry.code}")
    from rich import box
    from rich.table import Table

    numbers = [str(run.number) for run in runs]
    configuration = Table(title="Configurations differ in", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("", *numbers):
        configuration.add_column(column)
    for name, values in differences.items():
        configuration.add_row(*plain(name, *(_shown(value) for value in values)))
    table = Table(title="Metrics", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for column in (*numbers, "ratio", "ratio per instruction"):
        table.add_column(column, justify="right")
    for name, *values in rows:
        table.add_row(*plain(name, *(_shown(value) for value in values)))
    console = output_console()
    if differences:
        console.print(configuration)
    console.print(table)


def compared(
    one: Mapping[str, Metric], other: Mapping[str, Metric]
) -> list[tuple[str, Metric, Metric, float | None, float | None]]:
    """Metrics of two runs: name, both values, the second's share of the first, and the same per guest instruction.

    A share is None where the first has nothing, or where one of them is no number.
    """
    instructions = _ratio(one.get(INSTRUCTIONS), other.get(INSTRUCTIONS))
    rows: list[tuple[str, Metric, Metric, float | None, float | None]] = []
    for name in dict.fromkeys([*one, *other]):
        before, now = one.get(name), other.get(name)
        ratio = _ratio(before, now)
        # Only what is counted grows with the instructions: rates, shares and times do not.
        counted = isinstance(before, int) and isinstance(now, int)
        rate = ratio / instructions if counted and ratio is not None and instructions else None
        rows.append((name, before, now, ratio, rate))
    return rows


def _ratio(before: Metric, now: Metric) -> float | None:
    if isinstance(before, bool | str | None) or isinstance(now, bool | str | None) or not before:
        return None
    return now / before


def _shown(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4g}"
        case str():
            return value
        case _:
            return msgspec.json.encode(value).decode()


# --- pruning ---------------------------------------------------------------------------------------------------------


@runs_app.command("prune")
def prune_runs(
    *,
    catalogue: CatalogueFile = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0.0, help="Also runs entered more than so many days ago."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=0, help="Also all but the newest so many.")
    ] = None,
    folders: Annotated[
        bool, typer.Option("--folders", help="Delete their folders, too; without it none is touched.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Take entries out of the catalogue: those whose folders are gone, and those that are too old or too many."""
    with _open(catalogue) as opened:
        runs = opened.runs()
        going = _to_prune(runs, older_than, keep)
        if folders:
            numbers = {run.number for run in going}
            kept = [run.entry.folder for run in runs if run.number not in numbers and run.entry.folder]
            doomed = dict.fromkeys(run.entry.folder for run in going if run.entry.folder)
            stuck = [folder for folder in doomed if not _delete(folder, kept, dry_run=dry_run)]
            going = [run for run in going if run.entry.folder not in stuck]
        done = "would be " if dry_run else ""
        for run in going:
            typer.echo(f"Run {run.number} ({run.entry.kind}, {run.entry.folder or 'not kept'}) {done}removed")
        if not dry_run:
            opened.remove([run.number for run in going])
    typer.echo(f"{len(going)} of {len(runs)} entries {done}removed")


def _to_prune(runs: list[Run], older_than: float | None, keep: int | None) -> list[Run]:
    now = datetime.now(UTC)
    newest = runs if keep is None else runs[max(0, len(runs) - keep) :]
    stay = {run.number for run in newest}
    return [
        run
        for run in runs
        if _gone(run.entry)
        or (older_than is not None and (now - run.entered) / timedelta(days=1) > older_than)
        or run.number not in stay
    ]


def _delete(folder: Path, kept: list[Path], *, dry_run: bool) -> bool:
    """Deletes a run's folder, if it is one and no entry that stays has it, or a folder in it.

    False if that was tried and has failed.
    """
    if not os.path.lexists(folder):
        return True
    if any(other.resolve().is_relative_to(folder.resolve()) for other in kept):
        typer.echo(f"{folder} stays: another entry has it, or a folder in it")
    elif folder.is_symlink() or not any((folder / name).is_file() for name in RUN_FILES):
        typer.echo(f"{folder} stays: it has none of {', '.join(RUN_FILES)}")
    elif dry_run:
        typer.echo(f"{folder} would be deleted")
    else:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            typer.echo(
                f"{folder} is not deleted, and stays in the catalogue: {error.strerror or error}", err=True
            )
            return False
        typer.echo(f"{folder} deleted")
    return True
