"""A whole run on one machine: the coordinator in this process, everybody else in processes of their own on loopback.

    coordinator (here)  <-- tcp://127.0.0.1:<free port> -->  serve mmu, worker vcpu (N times), worker host

Children that die or hang are started again, and the run goes on. Whatever happens (a violation, a child that dies again
and again, Ctrl-C, an exception here) it ends in bounded time and no child is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from shadowmmu.client import Security
from shadowmmu.coordinator.commands import Commands, free_port, loopback
from shadowmmu.coordinator.processes import Child
from shadowmmu.coordinator.report import RunReport
from shadowmmu.coordinator.run_types import Phase, RunSettings
from shadowmmu.coordinator.service import Coordinator, OnProgress
from shadowmmu.coordinator.supervisor import Supervisor

__all__ = ["LEAVE_SECONDS", "LOG_NAME", "Shown", "run_embedded", "start_children", "stop_on_signals"]

LOG_NAME: Final = "run.log"
"""The log's file in a run's folder: that of the coordinator and of all children."""
LOOPBACK: Final = "tcp://127.0.0.1:*"
LEAVE_SECONDS: Final = 5.0
"""How long the children may take to end by themselves once they were told that the run is over."""

Shown = Callable[[Coordinator], contextlib.AbstractAsyncContextManager[None]]
"""Makes the context in which a coordinator's run is shown to somebody."""


class _View:
    """The run as the coordinator in this process knows it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def needs(self, name: str, status: int) -> bool:
        state = self._coordinator.state
        if state.phase is Phase.FINISHED:
            return False
        if state.phase is not Phase.DRAINING:
            return True
        reported = any(member.name == name and member.report is not None for member in state.members)
        return status != 0 and not reported

    def missed(self) -> Mapping[str, float]:
        return {member.name: member.absent_for for member in self._coordinator.state.roster.absent()}


async def run_embedded(
    settings: RunSettings,
    directory: Path,
    log_file: BinaryIO,
    *,
    log_format: str = "console",
    on_progress: OnProgress | None = None,
    security: Security = Security(),  # noqa: B008 (it cannot change)
    restart: bool = True,
    shown: Shown | None = None,
) -> RunReport:
    """Runs `settings.vcpus` vCPUs and `settings.hosts` host agents to the end, and ends all processes.

    `directory` gets the journal; `log_file` everything that the children say. `security`: the keys of all of them.
    `restart`: children that die are started again; else the run ends as unknown. `shown`: a context around the run, in
    which it is shown to somebody.
    """
    assert settings.vcpus is not None
    if not restart:
        settings = msgspec.structs.replace(settings, absent_seconds=0.0)
    coordinator = Coordinator(settings, on_progress=on_progress, security=security)

    def on_end(child: Child) -> None:
        if restart:
            coordinator.process_ended(child.name, child.describe_end())

    supervisor = Supervisor(
        log_file, _View(coordinator), restart=restart, on_end=on_end, on_given_up=coordinator.fail
    )
    async with coordinator, supervisor, contextlib.nullcontext() if shown is None else shown(coordinator):
        commands = Commands(
            coordinator=coordinator.bind(LOOPBACK),
            mmu_bind=loopback(free_port()),
            directory=directory,
            log_format=log_format,
            security=security,
        )
        with stop_on_signals(coordinator):
            run = asyncio.create_task(coordinator.run())
            try:
                await start_children(supervisor, commands, settings)
                report = await run
            finally:
                run.cancel()
                await asyncio.gather(run, return_exceptions=True)
            await supervisor.wait(LEAVE_SECONDS)
    return report


async def start_children(supervisor: Supervisor, commands: Commands, settings: RunSettings) -> None:
    """Starts everybody but the coordinator: `mmu`, `host-0` and so on, `worker-0` and so on."""
    await supervisor.start("mmu", commands.mmu())
    for name in (f"host-{number}" for number in range(settings.hosts)):
        await supervisor.start(name, commands.host(name))
    for name in (f"worker-{number}" for number in range(settings.vcpus or 0)):
        await supervisor.start(name, commands.vcpu(name))


@contextlib.contextmanager
def stop_on_signals(coordinator: Coordinator) -> Iterator[asyncio.Event]:
    """SIGINT and SIGTERM end the run in order; a second one ends it at once. Gives what the first one sets."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    told = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if told.is_set():
            task.cancel()
        elif not coordinator.finished:
            coordinator.fail(f"interrupted by {number.name}")
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield told
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
