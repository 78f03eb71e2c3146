"""Children end in every case."""

import asyncio
import io
import os
import sys
from typing import Any

import pytest

from shadowmmu.coordinator.processes import Child, Children

pytestmark = pytest.mark.processes

SLEEP = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


def gone(child: Child) -> bool:
    try:
        os.kill(child.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


class Log(io.BytesIO):
    """Collects what children write; `said` waits for words in it."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    def write(self, data: Any, /) -> int:
        self._news.set()
        return super().write(data)

    async def said(self, words: bytes) -> None:
        async with asyncio.timeout(20):
            while words not in self.getvalue():
                self._news.clear()
                await self._news.wait()


async def test_an_early_end_is_told_with_the_last_lines() -> None:
    log = Log()
    ended: asyncio.Queue[Child] = asyncio.Queue()
    async with Children(log, ended.put_nowait) as children:
        await children.start("sick", [sys.executable, "-c", "print('one\\ntwo'); raise SystemExit(3)"])
        async with asyncio.timeout(20):
            child = await ended.get()
    text = child.describe_end()
    assert "the process sick (pid " in text
    assert text.endswith("ended with status 3; its last lines: one | two")
    assert log.getvalue() == b"one\ntwo\n"


async def test_children_are_ended_when_the_context_is_left() -> None:
    log = Log()
    async with Children(log, lambda _child: None) as children:
        child = await children.start("sleeper", [sys.executable, "-c", SLEEP])
        await log.said(b"ready")
    assert gone(child)
    assert "SIGTERM" in child.describe_end()


async def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowmmu.coordinator.processes.TERMINATE_SECONDS", 0.2)
    log = Log()
    async with Children(log, lambda _child: None) as children:
        child = await children.start("stubborn", [sys.executable, "-c", STUBBORN])
        await log.said(b"ready")
    assert gone(child)
    assert "SIGKILL" in child.describe_end()


async def test_a_program_that_is_not_there_leaves_nobody_behind() -> None:
    with pytest.raises(FileNotFoundError):
        async with Children(io.BytesIO(), lambda _child: None) as children:
            await children.start("nothing", ["/nonexistent/program"])


def test_the_marks_in_a_traceback_say_nothing() -> None:
    child = Child("x", None)  # type: ignore[arg-type]
    child.note([b"Traceback", b"  File x", b"    ^^^^~~", b"ValueError: no", b""])
    assert list(child.last_lines) == ["Traceback", "File x", "ValueError: no"]
