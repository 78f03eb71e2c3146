"""Who is started again, and who is not; with real, short-lived children."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Mapping

import pytest

from shadowmmu.coordinator.processes import Child
from shadowmmu.coordinator.supervisor import RESTARTS, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FAIL = [sys.executable, "-c", "raise SystemExit(3)"]


class Run:
    """A run that needs its processes, or not, and misses some."""

    def __init__(self) -> None:
        self.needed = True
        self.missing: dict[str, float] = {}
        self.ended: list[str] = []
        self.given_up: asyncio.Queue[str] = asyncio.Queue()
        self.log = io.BytesIO()

    def needs(self, name: str, status: int) -> bool:
        return self.needed

    def missed(self) -> Mapping[str, float]:
        return self.missing

    def supervisor(self, *, restart: bool = True) -> Supervisor:
        return Supervisor(
            self.log, self, restart=restart, on_end=self._on_end, on_given_up=self.given_up.put_nowait
        )

    def _on_end(self, child: Child) -> None:
        self.ended.append(child.name)


async def other_child(supervisor: Supervisor, name: str, than: Child) -> Child:
    async with asyncio.timeout(20):
        while (child := supervisor.child(name)) is None or child is than:  # noqa: ASYNC110 (a process starts)
            await asyncio.sleep(0.01)
    return child


async def test_a_killed_child_is_started_again_with_the_same_command() -> None:
    run = Run()
    async with run.supervisor() as supervisor:
        await supervisor.start("worker", SLEEP)
        first = supervisor.child("worker")
        assert first is not None
        os.kill(first.process.pid, signal.SIGKILL)
        second = await other_child(supervisor, "worker", first)
        assert second.process.pid != first.process.pid
        assert run.ended == ["worker"]
        assert "SIGKILL" in supervisor.restarts[0].how


async def test_one_that_ends_again_and_again_is_given_up() -> None:
    run = Run()
    async with run.supervisor() as supervisor:
        await supervisor.start("worker", FAIL)
        text = await asyncio.wait_for(run.given_up.get(), 60)
        assert f"status 3; it was started again {RESTARTS} times already" in text
        assert supervisor.restarts_of("worker") == RESTARTS


async def test_without_restarts_the_first_end_counts() -> None:
    run = Run()
    async with run.supervisor(restart=False) as supervisor:
        await supervisor.start("worker", FAIL)
        assert (await asyncio.wait_for(run.given_up.get(), 20)).endswith("ended with status 3")
        assert supervisor.restarts == []


async def test_one_that_is_not_needed_any_more_may_end() -> None:
    run = Run()
    run.needed = False
    async with run.supervisor() as supervisor:
        await supervisor.start("worker", FAIL)
        await supervisor.wait(20.0)
        assert supervisor.restarts == []
        assert run.given_up.empty()


async def test_one_that_hangs_is_killed_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowmmu.coordinator.supervisor.HUNG_SECONDS", 0.0)
    monkeypatch.setattr("shadowmmu.coordinator.supervisor.LOOK_SECONDS", 0.01)
    run = Run()
    async with run.supervisor() as supervisor:
        await supervisor.start("worker", SLEEP)
        first = supervisor.child("worker")
        assert first is not None
        os.kill(first.process.pid, signal.SIGSTOP)
        run.missing = {"worker": 1.0}
        await other_child(supervisor, "worker", first)
        run.missing = {}
        assert "SIGKILL" in supervisor.restarts[0].how
