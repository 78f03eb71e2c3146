"""What `shadowmmu serve coordinator` does."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
import typer
import zmq

from shadowmmu.cli.display import LiveProgress, show_report
from shadowmmu.cli.logs import logs_to
from shadowmmu.cli.loop import run_loop
from shadowmmu.cli.options import LogFormat
from shadowmmu.cli.runs import enter_report
from shadowmmu.cli.usage import bad_value
from shadowmmu.client import Security
from shadowmmu.coordinator import Coordinator, RunReport, RunSettings
from shadowmmu.coordinator.embedded import LOG_NAME, stop_on_signals
from shadowmmu.coordinator.progress import Snapshot
from shadowmmu.coordinator.report import REPORT_NAME, decode_report
from shadowmmu.coordinator.run_store import RunStoreError
from shadowmmu.protocol.messages import Verdict

if TYPE_CHECKING:
    from shadowmmu.coordinator.live import LiveServer

__all__ = ["coordinate"]

FAILED_STATUS: Final = 2
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
    settings: RunSettings,
    bind: str,
    out: Path | None,
    security: Security,
    *,
    hold_verdict: float,
    live: LiveServer | None,
    live_hold: float,
    catalogue: Path | None,
    as_json: bool,
    log_format: LogFormat,
) -> int:
    """Conducts a run, or goes on with the unfinished one in `out`; shows its report, returns the exit status.

    `hold_verdict`: for so many seconds a run that has not passed is followed by no other: its status is returned again.
    `live` shows the run, and its last state for `live_hold` seconds more, unless somebody ends that by a signal.
    `catalogue`: where the run is entered, if anywhere.
    """
    with contextlib.ExitStack() as stack:
        if live is not None:
            stack.callback(live.close)
        held = None if out is None else _held_verdict(out, hold_verdict)
        if held is not None:
            typer.echo(f"The run in {out} has ended: {held.text}", err=True)
            return held.exit_status
        if out is None:
            stack.enter_context(logs_to(log_format))
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
                # Appended to: an unfinished run that is there may be gone on with.
                text_log = stack.enter_context((out / LOG_NAME).open("a", encoding="utf-8"))
            except OSError as error:
                raise bad_value("--out", f"{out}: {error.strerror}") from error
            stack.enter_context(logs_to(log_format, sys.stderr, text_log))
        try:
            report = run_loop(_coordinate(settings, bind, security, out, live=live, live_hold=live_hold))
        except RunStoreError as error:
            raise bad_value("--out", str(error)) from error
        except OSError as error:
            typer.echo(f"The run cannot be kept in {out}: {error.strerror or error}", err=True)
            return FAILED_STATUS
    show_report(report, as_json=as_json)
    enter_report(catalogue, "coordinator", report, out)
    return report.exit_status


def _held_verdict(out: Path, seconds: float) -> RunReport | None:
    """The report of a run that has ended not long ago, and has not passed."""
    path = out / REPORT_NAME
    try:
        if time.time() - path.stat().st_mtime >= seconds:
            return None
        report = decode_report(path.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    return None if report.verdict is Verdict.PASS else report


async def _coordinate(
    settings: RunSettings,
    bind: str,
    security: Security,
    folder: Path | None,
    *,
    live: LiveServer | None,
    live_hold: float,
) -> RunReport:
    with contextlib.ExitStack() as stack:
        line = LiveProgress(settings.config.ops) if sys.stderr.isatty() else None
        progress = _LoggedProgress() if line is None else stack.enter_context(line)
        async with Coordinator(
            settings, on_progress=progress, security=security, folder=folder
        ) as coordinator:
            try:
                coordinator.bind(bind)
            except zmq.ZMQError as error:
                raise bad_value("--bind", f"cannot listen at {bind}: {error.strerror}") from error
            told_to_end = stack.enter_context(stop_on_signals(coordinator))
            if live is None:
                return await coordinator.run()
            async with live.serving(coordinator):
                report = await coordinator.run()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(live_hold):
                        await told_to_end.wait()
            return report
