"""Runs the command line in processes of its own, and ends them all."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `shadowmmu ARGUMENTS` in the background."""
    processes: list[subprocess.Popen[str]] = []

    def go(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "shadowmmu.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield go
    for process in processes:
        if process.poll() is None:
            # The embedded run ends its children on the first signal; who does not listen is killed.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate(timeout=15)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def said(folder: Path, words: str) -> Callable[[], bool]:
    """Whether the run's log says that."""
    log = folder / "run.log"
    return lambda: log.exists() and words in log.read_text(encoding="utf-8", errors="replace")


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
