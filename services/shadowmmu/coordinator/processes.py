"""Child processes that always end: started together, watched, and ended in every case.

Each child's output goes to the run's log, and its last lines are kept, so that a child that dies early can be
reported with what it said. Children are in sessions of their own: Ctrl-C reaches the parent alone, who ends them in
order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import BinaryIO, Final, Self

import structlog

__all__ = ["Child", "Children"]

LAST_LINES: Final = 3
LINE_LIMIT: Final = 4000
"""Longest piece of output that is kept as one line, in bytes."""
SHOWN_LIMIT: Final = 200
"""Characters of a line that are shown."""
TERMINATE_SECONDS: Final = 3.0
"""How long a child may take after SIGTERM before it is killed."""

log = structlog.get_logger("shadowmmu.processes")


class Child:
    """A running child process: its name, process and last lines of output."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, *, logged: bool = True) -> None:
        self.name = name
        self.process = process
        self.logged = logged
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    def note(self, lines: Iterable[bytes]) -> None:
        """Keeps the last lines that say something (the marks under a traceback's lines do not)."""
        for line in lines:
            text = line[-LINE_LIMIT:].decode(errors="replace").strip()
            if text.strip("^~ "):
                self.last_lines.append(text)

    def describe_end(self) -> str:
        """How it ended, with its last lines."""
        status = self.process.returncode
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                how = f"was ended by {signal.Signals(-status).name}"
                return self._with_lines(how)
        return self._with_lines(f"ended with status {status}")

    def _with_lines(self, how: str) -> str:
        lines = " | ".join(" ".join(line.split())[:SHOWN_LIMIT] for line in self.last_lines)
        said = f"; its last lines: {lines}" if lines else ""
        return f"the process {self.name} (pid {self.process.pid}) {how}{said}"


class Children:
    """The children of a run; an async context manager that ends them all.

    `log_file` gets everything that they write; `on_end(child)` is called when one has ended, whatever the reason.
    """

    def __init__(self, log_file: BinaryIO, on_end: Callable[[Child], None]) -> None:
        self.all: list[Child] = []
        self._log_file = log_file
        self._on_end = on_end
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()

    async def start(self, name: str, command: Sequence[str], *, logged: bool = True) -> Child:
        """Starts a child. `name` is for people; `logged`: what it writes goes to the log."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        child = Child(name, process, logged=logged)
        self.all.append(child)
        self._watchers.append(asyncio.create_task(self._watch(child)))
        log.info("started", process=name, pid=process.pid)
        return child

    async def _watch(self, child: Child) -> None:
        assert child.process.stdout is not None
        rest = b""
        while piece := await child.process.stdout.read(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > LINE_LIMIT:
                lines.append(rest)
                rest = b""
            self._take_lines(child, lines)
        if rest:
            self._take_lines(child, [rest])
        await child.process.wait()
        log.info("ended", process=child.name, pid=child.process.pid, status=child.process.returncode)
        self._on_end(child)

    def _take_lines(self, child: Child, lines: Sequence[bytes]) -> None:
        """Whole lines only go to the log: others write to it, too."""
        if lines:
            if child.logged:
                self._log_file.write(b"".join(line + b"\n" for line in lines))
                self._log_file.flush()
            child.note(lines)

    async def wait(self, seconds: float) -> bool:
        """Waits until all children have ended by themselves; False if some have not within so many seconds."""
        if not self._watchers:
            return True
        _, pending = await asyncio.wait(self._watchers, timeout=seconds)
        return not pending

    async def end(self) -> None:
        """Ends those that have not ended: SIGTERM, then SIGKILL. Returns when all are gone."""
        for child in self.all:
            self.signal(child, signal.SIGTERM)
            self.signal(child, signal.SIGCONT)  # a stopped process acts on no SIGTERM
        if not await self.wait(TERMINATE_SECONDS):
            for child in self.all:
                if not child.ended:
                    log.warning("killed", process=child.name, pid=child.process.pid)
                self.signal(child, signal.SIGKILL)
        # A killed process is gone at once; but somebody else might hold the other end of its pipe.
        await self.wait(TERMINATE_SECONDS)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    def signal(self, child: Child, number: signal.Signals) -> None:
        """Sends a signal to a child that has not ended."""
        # Not Process.send_signal: it polls first, and takes the exit status away from asyncio's own watcher,
        # which then reports 255 (python/cpython#87744).
        if not child.ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, number)
