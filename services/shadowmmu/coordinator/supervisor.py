"""Who restarts whom: children of a run that end too early are started again, those that hang are killed first.

A child that ends while the run still needs it is started again at once with the same command, at most `RESTARTS` times.
One that the coordinator misses although it is there (stopped, or in an endless loop) is killed, and so restarted. How
the run stands is asked of a `RunView`, because the coordinator may be in this process or be a child itself.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

import msgspec
import structlog

from shadowmmu.coordinator.processes import Child, Children

__all__ = ["HUNG_SECONDS", "RESTARTS", "Restart", "RunView", "Supervisor"]

RESTARTS: Final = 5
"""So often one child is started again."""
HUNG_SECONDS: Final = 10.0
"""A child that is missed for so long, and is there, hangs."""
LOOK_SECONDS: Final = 0.5

log = structlog.get_logger("shadowmmu.supervisor")


class RunView(Protocol):
    """How the run stands, for its supervisor."""

    def needs(self, name: str, status: int) -> bool:
        """Whether the run still needs a process of that name; `status`: how the one that was there ended."""
        ...

    def missed(self) -> Mapping[str, float]:
        """The names of processes that nothing is heard of, with the seconds since when."""
        ...


class Restart(msgspec.Struct, frozen=True):
    """A child was started again. `at`: seconds (the clock `time.monotonic`); `how` the one before ended."""

    name: str
    at: float
    how: str


class Supervisor:
    """The children of a run, restarted if need be; an async context manager that ends them all.

    `on_end(child)`: one has ended that the run still needs. `on_given_up(text)`: it is not started again. `restart`: no
    child is, if it is False.
    """

    def __init__(
        self,
        log_file: BinaryIO,
        run: RunView,
        *,
        restart: bool,
        on_end: Callable[[Child], None],
        on_given_up: Callable[[str], None],
    ) -> None:
        self.children = Children(log_file, self._ended)
        self.restarts: list[Restart] = []
        self._run = run
        self._restart = restart
        self._on_end = on_end
        self._on_given_up = on_given_up
        self._commands: dict[str, tuple[Sequence[str], bool]] = {}
        self._current: dict[str, Child] = {}
        self._since: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False

    async def __aenter__(self) -> Self:
        self._watch(self._look_for_hung())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.children.end()

    async def start(self, name: str, command: Sequence[str], *, logged: bool = True) -> None:
        """Starts a child; the command is used again if it has to be restarted."""
        self._commands[name] = (command, logged)
        self._since[name] = time.monotonic()
        self._current[name] = await self.children.start(name, command, logged=logged)

    def child(self, name: str) -> Child | None:
        """The running child of that name, if there is one."""
        child = self._current.get(name)
        return None if child is None or child.ended else child

    def restarts_of(self, name: str) -> int:
        """How often it was started again."""
        return sum(restart.name == name for restart in self.restarts)

    async def wait(self, seconds: float) -> None:
        """Waits until the children have ended by themselves, for at most so long; none is restarted any more."""
        self._leaving = True
        await self.children.wait(seconds)

    # --- inside -------------------------------------------------------------------------------------------------

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self, child: Child) -> None:
        status = child.process.returncode
        if self._leaving or status is None or not self._run.needs(child.name, status):
            return
        self._on_end(child)
        if not self._restart:
            self._on_given_up(child.describe_end())
        elif self.restarts_of(child.name) >= RESTARTS:
            self._on_given_up(f"{child.describe_end()}; it was started again {RESTARTS} times already")
        else:
            self.restarts.append(Restart(child.name, time.monotonic(), child.describe_end()))
            log.warning("started again", process=child.name, why=child.describe_end())
            command, logged = self._commands[child.name]
            self._watch(self.start(child.name, command, logged=logged))

    async def _look_for_hung(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for name, seconds in self._run.missed().items():
                child = self.child(name)
                age = now - self._since.get(name, now)
                if child is not None and self._restart and min(seconds, age) >= HUNG_SECONDS:
                    log.warning("killed: it hangs", process=name, pid=child.process.pid)
                    self._since[name] = now
                    self.children.signal(child, signal.SIGKILL)
