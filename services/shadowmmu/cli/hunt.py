"""`shadowmmu hunt`: races found in random small guests, without any litmus test.

Exit status: 0 nothing was found, 1 something was, 2 it was interrupted.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shadowmmu.cli.console import output_console, progress_line
from shadowmmu.cli.options import usable_cores
from shadowmmu.cli.usage import bad_value

if TYPE_CHECKING:
    from shadowmmu.explorer.hunt import Finding, Hunt, HuntLimit, HuntState
    from shadowmmu.explorer.repro import Repro

__all__ = ["hunt"]

DEFAULT_BUDGET: Final = 60.0
KEEP_EVERY: Final = 10.0
"""Seconds between writes of the state."""
STATE_FILE: Final = "hunt.json"
DETAIL_WIDTH: Final = 60


def hunt(
    *,
    profile: Annotated[str, typer.Option("--profile", help="The kernel that is hunted in.")] = "linux-3.1",
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0.0, help="Longest time in seconds; 60 if nothing is given."),
    ] = None,
    scenarios: Annotated[
        int | None,
        typer.Option(
            "--scenarios", min=1, help="Random guests in all; so many give the same findings always."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes; as many as there are cores if not given.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Fixes all choices.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for .repro files of what is found. The hunt is kept there too, and gone on with.",
            metavar="DIR",
        ),
    ] = None,
) -> None:
    """Find races in random small guests: each failure is shrunk, and told apart by the fixes that prevent it.

    Prints a table of distinct findings: what explains each, how often it was met and when first.
    """
    from shadowmmu.explorer.hunt import Hunt, HuntLimit
    from shadowmmu.kvm import KvmError, Profile

    try:
        Profile.parse(profile)
    except KvmError as error:
        raise bad_value("--profile", str(error)) from error
    if budget is None and scenarios is None:
        budget = DEFAULT_BUDGET
    state = _state(profile, seed, out)
    limit = HuntLimit(budget, scenarios)

    def keep(number: int, repro: Repro) -> None:
        if out is not None:
            _save_repro(repro, out / _repro_name(number))

    with _processes(jobs or usable_cores()) as executor:
        going = Hunt(state, executor, time.monotonic, keep)
        interrupted = _go(going, limit, out)
    _show(state, out)
    raise typer.Exit(2 if interrupted else 1 if state.findings else 0)


def _state(profile: str, seed: int, out: Path | None) -> HuntState:
    """A new hunt, or the one that is kept in the folder."""
    from shadowmmu.explorer.hunt import HuntState, HuntStateError

    if out is None:
        return HuntState(profile, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = (out / STATE_FILE).read_bytes()
    except FileNotFoundError:
        return HuntState(profile, seed)
    except OSError as error:
        raise bad_value("--out", str(error)) from error
    try:
        return HuntState.decode(data, profile, seed)
    except HuntStateError as error:
        raise bad_value("--out", f"{out / STATE_FILE}: {error}") from error


def _write_state(state: HuntState, out: Path | None) -> None:
    if out is None:
        return
    new = out / f"{STATE_FILE}.new"
    new.write_bytes(state.encode())
    new.replace(out / STATE_FILE)


def _repro_name(number: int) -> str:
    return f"finding-{number}.repro"


def _save_repro(repro: Repro, path: Path) -> None:
    from shadowmmu.explorer.repro import save_repro

    save_repro(repro, path)


@contextlib.contextmanager
def _processes(jobs: int) -> Iterator[Executor | None]:
    """Processes that leave Ctrl-C to this one; None for none but this."""
    if jobs == 1:
        yield None
        return
    executor = ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _go(going: Hunt, limit: HuntLimit, out: Path | None) -> bool:
    """Hunts, with a progress line, and keeps the state now and then; whether it was interrupted."""
    kept = time.monotonic()

    def look_up(done: Hunt) -> bool:
        nonlocal kept
        show(done)
        if time.monotonic() - kept >= KEEP_EVERY:
            _write_state(done.state, out)
            kept = time.monotonic()
        return True

    with _progress_line(limit) as show:
        try:
            going.run(limit, look_up)
            going.finish()
        except KeyboardInterrupt:
            return True
        except BrokenExecutor as error:
            typer.echo(f"shadowmmu hunt: {error}", err=True)
            return True
        finally:
            _write_state(going.state, out)
    return False


@contextlib.contextmanager
def _progress_line(limit: HuntLimit) -> Iterator[Callable[[Hunt], None]]:
    progress = progress_line()
    task = progress.add_task("beginning", total=limit.scenarios or limit.seconds)
    began: float | None = None

    def show(going: Hunt) -> None:
        nonlocal began
        state = going.state
        began = state.seconds if began is None else began
        progress.update(
            task,
            completed=state.scenarios if limit.scenarios else state.seconds - began,
            description=f"{state.scenarios} guests, {state.executions} executions, "
            f"{len(state.findings)} distinct findings",
        )

    with progress:
        yield show


def _show(state: HuntState, out: Path | None) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=f"Hunt in {state.profile}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("bug", "explained by", "rule"):
        table.add_column(column, overflow="fold")
    for column in ("times", "first: guest", "second", "operations"):
        table.add_column(column, justify="right")
    if out is not None:
        table.add_column("file", overflow="fold")
    for number, finding in enumerate(state.findings):
        bug, explained = _cause(finding)
        rule = "-" if finding.rule is None else f"{finding.rule.value} {finding.rule.title}"
        row = [bug, explained, rule, str(finding.times), str(finding.scenario), f"{finding.seconds:.0f}"]
        row.append("-" if finding.size is None else str(finding.size))
        if out is not None:
            path = out / _repro_name(number)
            row.append(path.name if path.exists() else "-")
        table.add_row(*row)
    if state.findings:
        output_console().print(table)
    typer.echo(
        f"{len(state.findings)} distinct findings in {state.scenarios} random guests, {state.executions} executions, "
        f"{state.seconds:.0f} s"
    )
    typer.echo(f"Digest {state.digest}")


def _cause(finding: Finding) -> tuple[str, str]:
    """The bugs, and what is known of the cause."""
    from shadowmmu.kvm import FIXES

    cause = finding.cause
    if cause.fixes:
        bugs = dict.fromkeys(FIXES[slug].bug for slug in cause.fixes)
        return " + ".join(bugs), " + ".join(cause.fixes)
    detail = cause.detail if len(cause.detail) <= DETAIL_WIDTH else f"{cause.detail[:DETAIL_WIDTH]}..."
    return "?", f"{cause.kind.value}: {detail}" if detail else cause.kind.value
