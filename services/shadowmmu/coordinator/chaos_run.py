"""A run on one machine with faults put in: everybody is a child, the coordinator too, and proxies stand in between.

    members  -->  proxy  -->  serve coordinator          vCPUs, host agents  -->  proxy  -->  serve mmu

Nothing here knows the run but by what its coordinator keeps in the run's folder. A run that has not ended in time is
ended: that is a hang, and counts as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import structlog

from shadowmmu.client import Security
from shadowmmu.coordinator.chaos import COORDINATOR, Fault, FaultKind
from shadowmmu.coordinator.commands import Commands, coordinator_command, free_port, loopback
from shadowmmu.coordinator.embedded import LEAVE_SECONDS, start_children
from shadowmmu.coordinator.processes import Child
from shadowmmu.coordinator.proxy import Proxy, local_ports
from shadowmmu.coordinator.report import REPORT_NAME, RunReport, decode_report
from shadowmmu.coordinator.run_store import RunStore, RunStoreError
from shadowmmu.coordinator.run_types import Phase, RunSettings
from shadowmmu.coordinator.saved_run import SavedRun
from shadowmmu.coordinator.supervisor import Restart, Supervisor

__all__ = ["ChaosResult", "Happened", "run_chaos"]

POLL_SECONDS: Final = 0.05

log = structlog.get_logger("shadowmmu.chaos")


class Happened(msgspec.Struct, frozen=True):
    """A fault, and when it happened: seconds after the beginning; None: it was not due before the run was over."""

    fault: Fault
    seconds: float | None


class ChaosResult(msgspec.Struct, frozen=True):
    """What came of it. `report` is None if there is none; `hung`: the run had to be ended; `given_up`: why, if so.

    `began`: by the wall clock, in seconds since 1970; `seconds`: how long it took.
    """

    began: float
    report: RunReport | None
    happened: list[Happened]
    restarts: list[Restart]
    seconds: float
    hung: bool
    given_up: list[str]


class _View:
    """The run as its coordinator has stored it."""

    def __init__(self, folder: Path) -> None:
        self._store = RunStore(folder)

    def saved(self) -> SavedRun | None:
        with contextlib.suppress(RunStoreError, OSError):
            return self._store.load()
        return None

    @property
    def finished(self) -> bool:
        saved = self.saved()
        return saved is not None and saved.phase is Phase.FINISHED

    def needs(self, name: str, status: int) -> bool:
        saved = self.saved()
        if saved is None:
            return True
        if saved.phase is Phase.FINISHED:
            return False
        if name == COORDINATOR or saved.phase is not Phase.DRAINING:
            return True
        reported = any(member.name == name and member.report is not None for member in saved.members)
        return status != 0 and not reported

    def missed(self) -> Mapping[str, float]:
        saved = self.saved()
        if saved is None or saved.phase is Phase.FINISHED:
            return {}
        return {member.name: member.absent_for for member in saved.members if member.missed}


class _Chaos:
    """Carries out the plan."""

    def __init__(self, supervisor: Supervisor, view: _View, proxies: Sequence[Proxy], began: float) -> None:
        self.happened: list[Happened] = []
        self._supervisor = supervisor
        self._view = view
        self._proxies = proxies
        self._began = began
        self._continuing: set[asyncio.Task[None]] = set()

    async def carry_out(self, faults: Sequence[Fault]) -> None:
        """Each fault when it is due; returns when all were, or the run drains."""
        for fault in faults:
            while not self._due(fault):
                saved = self._view.saved()
                if saved is not None and saved.phase in (Phase.DRAINING, Phase.FINISHED):
                    self.happened.append(Happened(fault, None))
                    break
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self._do(fault)

    async def close(self) -> None:
        for task in self._continuing:
            task.cancel()
        await asyncio.gather(*self._continuing, return_exceptions=True)

    def _due(self, fault: Fault) -> bool:
        saved = self._view.saved()
        return saved is not None and saved.phase is Phase.RUNNING and saved.instructions >= fault.at

    async def _do(self, fault: Fault) -> None:
        child = self._supervisor.child(fault.target)
        while child is None:  # it is being started again
            await asyncio.sleep(POLL_SECONDS)
            if self._view.finished:
                self.happened.append(Happened(fault, None))
                return
            child = self._supervisor.child(fault.target)
        seconds = round(time.monotonic() - self._began, 3)
        log.warning("fault", kind=fault.kind.value, process=fault.target, pid=child.process.pid)
        self.happened.append(Happened(fault, seconds))
        match fault.kind:
            case FaultKind.KILL:
                self._supervisor.children.signal(child, signal.SIGKILL)
            case FaultKind.STOP:
                self._supervisor.children.signal(child, signal.SIGSTOP)
                task = asyncio.create_task(self._continue(child, fault.seconds))
                self._continuing.add(task)
                task.add_done_callback(self._continuing.discard)
            case FaultKind.CUT | FaultKind.HALF_OPEN:
                ports = local_ports(child.process.pid)
                for proxy in self._proxies:
                    # A service has only one side of its connections: that is all that go through its proxy.
                    only = None if proxy.target in ports else ports
                    _ = proxy.cut(only) if fault.kind is FaultKind.CUT else proxy.swallow(only)

    async def _continue(self, child: Child, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._supervisor.children.signal(child, signal.SIGCONT)


async def run_chaos(
    settings: RunSettings,
    directory: Path,
    log_file: BinaryIO,
    faults: Sequence[Fault],
    *,
    log_format: str = "console",
    security: Security = Security(),  # noqa: B008 (it cannot change)
    limit_seconds: float,
) -> ChaosResult:
    """Runs to the end with these faults, for at most `limit_seconds`; ends all processes. `directory` must be fresh."""
    view = _View(directory)
    given_up: list[str] = []
    over = asyncio.Event()

    def on_given_up(text: str) -> None:
        given_up.append(text)
        over.set()

    supervisor = Supervisor(log_file, view, restart=True, on_end=lambda _child: None, on_given_up=on_given_up)
    wall_clock, began = time.time(), time.monotonic()
    async with _proxies() as (coordinator, mmu), supervisor:
        await supervisor.start(
            COORDINATOR,
            coordinator_command(settings, loopback(coordinator.target), directory, log_format, security),
            logged=False,
        )
        commands = Commands(
            coordinator=loopback(coordinator.port),
            mmu_bind=loopback(mmu.target),
            mmu_advertise=loopback(mmu.port),
            directory=directory,
            log_format=log_format,
            security=security,
        )
        await start_children(supervisor, commands, settings)
        chaos = _Chaos(supervisor, view, (coordinator, mmu), began)
        faulting = asyncio.create_task(chaos.carry_out(faults))
        try:
            hung = not await _ended(view, over, limit_seconds)
        finally:
            faulting.cancel()
            await asyncio.gather(faulting, return_exceptions=True)
            await chaos.close()
        if not hung and not given_up:
            await supervisor.wait(LEAVE_SECONDS)
    if faulting.done() and not faulting.cancelled() and faulting.exception() is not None:
        faulting.result()
    return ChaosResult(
        began=wall_clock,
        report=_report(directory),
        happened=[*chaos.happened, *(Happened(fault, None) for fault in faults[len(chaos.happened) :])],
        restarts=supervisor.restarts,
        seconds=round(time.monotonic() - began, 3),
        hung=hung,
        given_up=given_up,
    )


@contextlib.asynccontextmanager
async def _proxies() -> AsyncIterator[tuple[Proxy, Proxy]]:
    async with Proxy(free_port()) as coordinator, Proxy(free_port()) as mmu:
        yield coordinator, mmu


async def _ended(view: _View, over: asyncio.Event, seconds: float) -> bool:
    """Waits for the end of the run, or for the supervisor to give up; False if neither came in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not view.finished and not over.is_set():  # noqa: ASYNC110 (a file tells)
                await asyncio.sleep(POLL_SECONDS)
            return True
    return False


def _report(directory: Path) -> RunReport | None:
    path = directory / REPORT_NAME
    return decode_report(path.read_bytes()) if path.exists() else None
