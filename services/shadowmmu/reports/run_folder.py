"""What a run's folder has for a report: report.json, and what else is there. Reads files, changes none.

A folder may be half-written, of another version, or somebody else's. Without a readable report.json there is no report
(`ReportError`); what else cannot be used is said in the report instead.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.coordinator.chaos_report import CHAOS_NAME, ChaosReport
from shadowmmu.coordinator.report import REPORT_NAME, RunReport, decode_report
from shadowmmu.explorer.diagram import draw
from shadowmmu.explorer.diagram_svg import render_svg
from shadowmmu.explorer.diagram_text import render_text
from shadowmmu.explorer.repro import REPRO_SUFFIX, ReproError, decode_repro, replay_repro
from shadowmmu.machine import JOURNAL_NAME
from shadowmmu.reports.errors import ReportError

__all__ = ["Reproduction", "RunFolder", "read_run", "read_small_file"]

LARGEST_FILE: Final = 256 << 20
"""Bytes; a report has some hundred thousand."""


class Reproduction(msgspec.Struct, frozen=True):
    """A `.repro` file of the folder, executed again. `svg`, `text`: its sequence diagram; `problem`: why none."""

    name: str
    failure: str = ""
    sameness: str = ""
    operations: int = 0
    svg: str = ""
    text: str = ""
    problem: str = ""


class RunFolder(msgspec.Struct, frozen=True, kw_only=True):
    """A run's folder. `chaos` is None if there is no chaos.json, a text if it cannot be used."""

    path: Path
    report: RunReport
    has_journal: bool
    chaos: ChaosReport | str | None
    reproductions: list[Reproduction]


_chaos_decoder = msgspec.json.Decoder(ChaosReport)


def read_run(path: Path) -> RunFolder:
    """The run in a folder. Raises ReportError with a line that says what is wrong."""
    try:
        report = decode_report(read_small_file(path / REPORT_NAME))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReportError(
            f"{path / REPORT_NAME} is no report of a run that this version can read: {error}"
        ) from error
    return RunFolder(
        path=path,
        report=report,
        has_journal=(path / JOURNAL_NAME).is_file(),
        chaos=_chaos(path / CHAOS_NAME),
        reproductions=[_reproduction(one) for one in sorted(path.glob(f"*{REPRO_SUFFIX}"))],
    )


def read_small_file(path: Path) -> bytes:
    """The contents of a regular file. Raises ReportError: it is missing, not readable, no file, or huge."""
    try:
        with open(path, "rb", opener=_not_waiting) as source:
            status = os.fstat(source.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ReportError(f"{path} is not a file")
            if status.st_size > LARGEST_FILE:
                raise ReportError(
                    f"{path} has {status.st_size:,} bytes: it is nothing that a report is made of"
                )
            return source.read(LARGEST_FILE)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def _not_waiting(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _chaos(path: Path) -> ChaosReport | str | None:
    if not path.exists():
        return None
    try:
        return _chaos_decoder.decode(read_small_file(path))
    except (ReportError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return f"{path.name} cannot be used: {error}"


def _reproduction(path: Path) -> Reproduction:
    try:
        repro = decode_repro(read_small_file(path), path.name)
        replayed = replay_repro(repro)
        diagram = draw(repro.scenario, repro.profile, replayed.followed.ending.schedule)
    except (ReportError, ReproError, RecursionError) as error:
        return Reproduction(path.name, problem=str(error))
    failure = replayed.failure or repro.failure
    return Reproduction(
        name=path.name,
        failure=f"{failure.kind}: {failure.text}",
        sameness=replayed.sameness.value,
        operations=repro.scenario.size,
        svg=render_svg(diagram),
        text=render_text(diagram),
    )
