"""A whole run on one machine: the coordinator in this process, everybody else in processes of their own on loopback.

    coordinator (here)  <-- tcp://127.0.0.1:<free port> -->  serve mmu, worker vcpu (N times), worker host

Whatever happens (a violation, a child that dies, Ctrl-C, an exception here) the run ends in bounded time and no child
is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from shadowmmu.coordinator.processes import Child, Children
from shadowmmu.coordinator.report import RunReport
from shadowmmu.coordinator.run_types import Phase, RunSettings
from shadowmmu.coordinator.service import Coordinator, OnProgress

__all__ = ["LOG_NAME", "run_embedded", "stop_on_signals"]

LOG_NAME: Final = "run.log"
"""The log's file in a run's folder: that of the coordinator and of all children."""
LOOPBACK: Final = "tcp://127.0.0.1:*"
LEAVE_SECONDS: Final = 5.0
"""How long the children may take to end by themselves once they were told that the run is over."""


async def run_embedded(
    settings: RunSettings,
    directory: Path,
    log_file: BinaryIO,
    *,
    log_format: str = "console",
    on_progress: OnProgress | None = None,
) -> RunReport:
    """Runs `settings.vcpus` vCPUs and `settings.hosts` host agents to the end, and ends all processes.

    `directory` gets the journal; `log_file` everything that the children say.
    """
    assert settings.vcpus is not None
    coordinator = Coordinator(settings, on_progress=on_progress)

    def on_end(child: Child) -> None:
        state = coordinator.state
        in_order = child.process.returncode == 0 and state.phase is Phase.DRAINING
        if not coordinator.finished and not in_order:
            coordinator.fail(child.describe_end())

    async with coordinator, Children(log_file, on_end) as children:
        address = coordinator.bind(LOOPBACK)
        with stop_on_signals(coordinator):
            run = asyncio.create_task(coordinator.run())
            try:
                await _start_children(children, settings, address, directory, log_format)
                report = await run
            finally:
                run.cancel()
                await asyncio.gather(run, return_exceptions=True)
            await children.wait(LEAVE_SECONDS)
    return report


async def _start_children(
    children: Children, settings: RunSettings, address: str, directory: Path, log_format: str
) -> None:
    program = [sys.executable, "-m", "shadowmmu.cli"]
    common = [f"--coordinator={address}", f"--log-format={log_format}"]
    await children.start(
        "mmu", [*program, "serve", "mmu", *common, f"--bind={LOOPBACK}", f"--out={directory}"]
    )
    for number in range(settings.hosts):
        await children.start(f"host-{number}", [*program, "worker", "host", *common, f"--name=host-{number}"])
    for number in range(settings.vcpus or 0):
        await children.start(
            f"worker-{number}", [*program, "worker", "vcpu", *common, f"--name=worker-{number}"]
        )


@contextlib.contextmanager
def stop_on_signals(coordinator: Coordinator) -> Iterator[None]:
    """SIGINT and SIGTERM end the run in order; a second one ends it at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    seen: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        seen.append(number)
        if len(seen) > 1:
            task.cancel()
        elif not coordinator.finished:
            coordinator.fail(f"interrupted by {number.name}")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
