"""`shadowmmu trace`: a run as a timeline, for Perfetto or in the text form of the kernel's own tracing.

Exit status: 0 the file is written, 2 the run cannot be executed again as it was, and then there is no file.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from shadowmmu.cli.options import Check
from shadowmmu.cli.reproduction import read_repro
from shadowmmu.cli.usage import USAGE_STATUS, bad_value

if TYPE_CHECKING:
    from shadowmmu.timeline import Ending, Execution, Records

__all__ = ["trace"]

UNUSABLE_STATUS: Final = 2
STANDARD_OUTPUT: Final = Path("-")


class TraceFormat(enum.Enum):
    """What is written."""

    PERFETTO = "perfetto"
    FTRACE = "ftrace"


def trace(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE.repro",
            help="A run's folder, with its journal or simulation.json, or a failing execution.",
            exists=True,
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where to write; - is standard output.", dir_okay=False
        ),
    ],
    trace_format: Annotated[
        TraceFormat,
        typer.Option("--format", help="For ui.perfetto.dev, or lines as ftrace prints KVM's tracepoints."),
    ] = TraceFormat.PERFETTO,
    first: Annotated[
        int, typer.Option("--from", metavar="RECORD", min=0, help="From this record of the journal on.")
    ] = 0,
    last: Annotated[
        int | None, typer.Option("--to", metavar="RECORD", min=0, help="Up to this record of the journal.")
    ] = None,
    check: Check = True,
) -> None:
    """Execute a run again and write its timeline; exit status 0, or 2 if it cannot be executed as it was.

    Without a clock the time axis counts steps of the scheduler: one is a microsecond there. A run in virtual time has
    the time of its cost model.
    """
    if last is not None and last < first:
        raise bad_value("--to", f"{last} is before record {first}, where --from begins")
    from shadowmmu.timeline import Records

    with _explained():
        execution = _open(source, Records(first, last), check=check)
        with _output(out) as file:
            ending = _write(trace_format, execution, file, Records(first, last))
            _refuse(ending, first)
    _tell(out, ending)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Ends the command with a line where a run cannot be used, or a package is missing."""
    from shadowmmu.experiments.simulation import SimulationError
    from shadowmmu.explorer.repro import ReproError
    from shadowmmu.machine import JournalError
    from shadowmmu.timeline import ExecutionError

    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"shadowmmu: this needs {error.name}: pip install 'shadowmmu[trace]'", err=True)
        raise typer.Exit(USAGE_STATUS) from error
    except (ExecutionError, JournalError, ReproError, SimulationError, OSError) as error:
        typer.echo(f"The run cannot be traced: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error


def _open(source: Path, records: Records, *, check: bool) -> Execution:
    from shadowmmu.experiments.simulation import SIMULATION_NAME
    from shadowmmu.machine import JOURNAL_NAME
    from shadowmmu.timeline import ALL, ExecutionError, JournalExecution, ReproExecution

    if not source.is_dir():
        if source.suffix != ".repro":
            raise bad_value("DIR|FILE.repro", f"{source} is neither a run's folder nor a .repro file")
        if records != ALL:
            raise bad_value("--from", "a .repro file has no journal")
        return ReproExecution(read_repro(source))
    if (source / JOURNAL_NAME).exists():
        return JournalExecution(source, check=check)
    if not (source / SIMULATION_NAME).exists():
        raise ExecutionError(
            f"{source} is no run's folder: it has no {JOURNAL_NAME} and no {SIMULATION_NAME}"
        )
    if records != ALL:
        raise bad_value("--from", "a run in virtual time has no journal")
    return _timed(source, check=check)


def _timed(folder: Path, *, check: bool) -> Execution:
    from shadowmmu.experiments.simulation import read_simulation
    from shadowmmu.timeline import TimedExecution

    was = read_simulation(folder)
    return TimedExecution(was.config, was.costs, was.ghz, digest=was.result.digest, check=check)


def _write(trace_format: TraceFormat, execution: Execution, file: BinaryIO, records: Records) -> Ending:
    if trace_format is TraceFormat.FTRACE:
        from shadowmmu.timeline import write_ftrace

        return write_ftrace(execution, file, records)
    from shadowmmu.timeline.perfetto import write_perfetto

    return write_perfetto(execution, file, records)


@contextlib.contextmanager
def _output(path: Path) -> Iterator[BinaryIO]:
    """A file to be written; what it has goes there when it is complete."""
    if path == STANDARD_OUTPUT:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()
        return
    with _replaced(path) as file:
        yield file


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes this name when it is complete; nothing is left of one that never is."""
    if path.exists() and not path.is_file():
        raise bad_value("--out", f"{path} is not a file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise bad_value("--out", f"{path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _refuse(ending: Ending, first: int) -> None:
    """Ends the command if what was executed is not the run, or not the part of it that was asked for."""
    if ending.divergence:
        typer.echo(f"The run cannot be executed as it was: {ending.divergence}", err=True)
        raise typer.Exit(UNUSABLE_STATUS)
    if first > ending.records:
        raise bad_value("--from", f"the last record of the journal is {ending.records}")


def _tell(out: Path, ending: Ending) -> None:
    if ending.torn:
        typer.echo(f"torn tail  {ending.torn} bytes of an unfinished frame: the writer was killed", err=True)
    if not ending.ended:
        typer.echo("The journal has no end; what was under way is marked as unfinished.", err=True)
    if out != STANDARD_OUTPUT:
        typer.echo(f"{out}: {out.stat().st_size} bytes")
