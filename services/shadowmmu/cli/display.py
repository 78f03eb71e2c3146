"""The live progress line, and the report at the end."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from shadowmmu.cli.console import output_console, progress_line
from shadowmmu.coordinator import RunReport, encode_report, render_report
from shadowmmu.coordinator.progress import Snapshot

__all__ = ["LiveProgress", "show_report"]


class LiveProgress:
    """A progress line on stderr, where that is a terminal; a context manager."""

    def __init__(self, ops: int) -> None:
        self._progress = progress_line()
        self._task = self._progress.add_task("starting", total=ops)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, snapshot: Snapshot) -> None:
        self._progress.update(self._task, completed=snapshot.instructions, description=snapshot.line)


def show_report(report: RunReport, *, as_json: bool) -> None:
    """The report on stdout: tables for people, or the JSON."""
    if as_json:
        sys.stdout.write(encode_report(report).decode())
        sys.stdout.flush()
    else:
        output_console().print(render_report(report))
