"""Runs of a sweep in child processes: one that hangs is killed, and one that dies takes nothing with it.

Threads of this process call `Children.execute`, those of a Dask worker anywhere `execute`. A child makes one run at a
time, then the next. Children end when this process does, however it does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Pipe
from typing import Final

import msgspec

from shadowmmu.experiments.child import READY, TRACEBACK_LENGTH
from shadowmmu.experiments.point import Job, Outcome

__all__ = ["COMMAND", "Children", "execute"]

COMMAND: Final = (sys.executable, "-m", "shadowmmu.experiments.child")
START_SECONDS: Final = 120.0
"""Longest wait for a child to be ready, on a machine that is busy."""


class _Child:
    """A child process, and the connection to it. It leads a process group, for itself and what its runs start."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                command, stdin=theirs.fileno(), stdout=self._errors, stderr=self._errors, process_group=0
            )
        self.ready = False

    def ask(self, job: Job) -> Outcome:
        """Has a run made. After an outcome that the child did not write itself it is dead."""
        try:
            if not self.ready:
                self._start()
            self._connection.send_bytes(msgspec.msgpack.encode(job))
            # An outcome is a few kilobytes, which come in one piece: where its beginning is, there is all of it.
            if self._connection.poll(job.timeout):
                return msgspec.msgpack.decode(self._connection.recv_bytes(), type=Outcome)
            self.kill()
            error = f"no result within {job.timeout:g} seconds"
        except (EOFError, OSError):
            self.kill()
            error = f"the process {_ending(self._process.returncode)}"
        return Outcome(error=error, traceback=self._last_words())

    def _start(self) -> None:
        """Waits until it is ready. Raises EOFError or OSError."""
        if not self._connection.poll(START_SECONDS):
            raise EOFError
        self.ready = self._connection.recv_bytes() == READY

    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it and what its run has started."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Ends it, and lets go of everything."""
        self.kill()
        self._connection.close()
        self._errors.close()

    def _last_words(self) -> str | None:
        """The end of what it wrote to its standard output and error."""
        self._errors.seek(max(0, os.fstat(self._errors.fileno()).st_size - TRACEBACK_LENGTH))
        return self._errors.read().decode(errors="replace") or None


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class Children:
    """Child processes that `command` starts, which calls `shadowmmu.experiments.child.serve`. For many threads."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._closed = False

    def execute(self, job: Job) -> Outcome:
        """Makes a run in a child. Never raises for what a run does: that is an outcome."""
        child = self._take()
        if child is None:
            return Outcome(error="given up")
        try:
            return child.ask(job)
        finally:
            self._give_back(child)

    def _take(self) -> _Child | None:
        with self._lock:
            if self._closed:
                return None
            child = self._idle.pop() if self._idle else _Child(self._command)
            if not child.alive():
                child.close()
                child = _Child(self._command)
            self._busy.add(child)
            return child

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            self._busy.discard(child)
            if child.alive() and not self._closed:
                self._idle.append(child)
            else:
                child.close()

    def close(self) -> None:
        """Ends them all; runs that are under way in other threads come back as failures, and none begin."""
        with self._lock:
            self._closed = True
            for child in self._busy:
                child.kill()
            for child in self._idle:
                child.close()
            self._idle.clear()


_of_this_process: Children | None = None
_lock = threading.Lock()


def execute(job: Job) -> Outcome:
    """Makes a run in a child that this process keeps as long as it lives: for the workers of a cluster."""
    global _of_this_process  # noqa: PLW0603 - a process's own
    with _lock:
        if _of_this_process is None:
            _of_this_process = Children()
    return _of_this_process.execute(job)
