"""Where log lines go: stderr, or a run's log file, or both; for people or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import structlog

from shadowmmu.cli.options import LogFormat

__all__ = ["logs_to", "set_up_logs"]


class _Tee:
    """A text file that is several."""

    def __init__(self, files: tuple[TextIO, ...]) -> None:
        self._files = files

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self._files:
            file.flush()


def set_up_logs(log_format: LogFormat, *files: TextIO) -> None:
    """Sets structlog up for this process. `files`: where lines go (none: stderr)."""
    target: Any = _Tee(files or (sys.stderr,))
    colours = not files and sys.stderr.isatty()
    renderer: structlog.typing.Processor
    if log_format is LogFormat.JSON:
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=colours)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )


@contextmanager
def logs_to(log_format: LogFormat, *files: TextIO) -> Iterator[None]:
    """The same for as long as the files are open: afterwards nothing is written to them any more."""
    set_up_logs(log_format, *files)
    try:
        yield
    finally:
        structlog.reset_defaults()
