"""What `shadowmmu serve coordinator` does."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Final

import structlog
import zmq

from shadowmmu.cli.display import LiveProgress, show_report
from shadowmmu.cli.logs import logs_to
from shadowmmu.cli.loop import run_loop
from shadowmmu.cli.options import LogFormat
from shadowmmu.cli.usage import bad_value
from shadowmmu.coordinator import Coordinator, RunReport, RunSettings, write_report
from shadowmmu.coordinator.embedded import LOG_NAME, stop_on_signals
from shadowmmu.coordinator.progress import Snapshot

__all__ = ["coordinate"]

LOGGED_PROGRESS_SECONDS: Final = 5.0
"""How often progress goes to the log where nobody sees a progress line."""

log = structlog.get_logger("shadowmmu.coordinator")


class _LoggedProgress:
    """Progress for a log, now and then."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOGGED_PROGRESS_SECONDS
            log.info("progress", text=snapshot.line)


def coordinate(
    settings: RunSettings, bind: str, out: Path | None, *, as_json: bool, log_format: LogFormat
) -> int:
    """Conducts a run, writes its report to `out`, shows it; returns the exit status."""
    with contextlib.ExitStack() as stack:
        if out is None:
            stack.enter_context(logs_to(log_format))
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
                text_log = stack.enter_context((out / LOG_NAME).open("w", encoding="utf-8"))
            except OSError as error:
                raise bad_value("--out", f"{out}: {error.strerror}") from error
            stack.enter_context(logs_to(log_format, sys.stderr, text_log))
        report = run_loop(_coordinate(settings, bind))
        if out is not None:
            write_report(report, out)
    show_report(report, as_json=as_json)
    return report.exit_status


async def _coordinate(settings: RunSettings, bind: str) -> RunReport:
    with contextlib.ExitStack() as stack:
        live = LiveProgress(settings.config.ops) if sys.stderr.isatty() else None
        progress = _LoggedProgress() if live is None else stack.enter_context(live)
        async with Coordinator(settings, on_progress=progress) as coordinator:
            try:
                coordinator.bind(bind)
            except zmq.ZMQError as error:
                raise bad_value("--bind", f"cannot listen at {bind}: {error.strerror}") from error
            stack.enter_context(stop_on_signals(coordinator))
            return await coordinator.run()
