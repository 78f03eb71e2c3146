"""The MMU service as a process: alone, for protocol clients, or as a member of a run.

In a run: bind, join the coordinator, start when it says so, send it the event stream, drain and report when told to,
end when the run is finished or the coordinator has fallen silent.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import structlog

from shadowmmu.client import Endpoint, KeyRole, MemberClient, ServiceError
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.mmu.event_sender import EventSender
from shadowmmu.mmu.options import MmuOptions
from shadowmmu.mmu.report import mmu_counters, mmu_report
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import ALONE, Startup, prepare
from shadowmmu.protocol import COORDINATOR, MMU, TO_MMU, ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event

__all__ = ["serve"]

PROGRESS_SECONDS: Final = 0.25
TICKS_PER_HEARTBEAT: Final = 4
JOIN_SECONDS: Final = 60.0

log = structlog.get_logger(__name__)


async def serve(options: MmuOptions) -> int:
    """Runs the service until it is told to end. Returns the exit status: 0, or 2 if the run ended badly.

    Raises whatever made the service fail, and OSError if the journal cannot be written.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.coordinator is None:
        return await _serve_alone(options, stop)
    return await _serve_run(options, options.coordinator, stop)


@asynccontextmanager
async def _endpoint(options: MmuOptions) -> AsyncIterator[tuple[str, Callable[[MmuService], None]]]:
    """A bound ROUTER that reads nothing until it is given its service."""
    served: list[MmuService] = []

    def on_message(address: bytes, frames: list[bytes]) -> None:
        served[0].on_message(address, frames)

    def on_peer_lost(address: bytes, reason: ErrorCode, undelivered: int) -> None:
        served[0].on_peer_lost(address, reason, undelivered)

    def on_batch() -> None:
        if served:
            served[0].on_batch()

    def on_failure(error: Exception) -> None:
        served[0].fail(error)

    endpoint = Endpoint.router(
        on_message,
        on_failure=on_failure,
        on_batch=on_batch,
        on_peer_lost=on_peer_lost,
        hard_limit=TO_MMU.hard_limit,
        security=options.security.server(MMU),
    )

    def begin(service: MmuService) -> None:
        served.append(service)
        service.endpoint = endpoint
        endpoint.start()

    try:
        yield endpoint.bind(options.bind), begin
    finally:
        await endpoint.close(linger=0.5)


async def _ticking(service: MmuService, heartbeat: float) -> None:
    while True:
        await asyncio.sleep(heartbeat / TICKS_PER_HEARTBEAT)
        service.tick(time.monotonic())


async def _serve_alone(options: MmuOptions, stop: asyncio.Event) -> int:
    config = options.config or m.RunConfig()
    async with _endpoint(options) as (address, begin):
        run = ALONE if options.recover else b""
        prepared = await prepare(
            Startup(out=options.out, config=config, run=run, heartbeat=options.heartbeat, fsync=options.fsync)
        )
        service = MmuService(prepared, options.heartbeat, snapshot_records=options.snapshot_records)
        begin(service)
        service.start(options.vcpus)
        log.info("serving", address=address, vcpus=options.vcpus, profile=config.profile)
        await _until(stop, service, _ticking(service, options.heartbeat))
        await service.drain()
    return 0


async def _until(stop: asyncio.Event, service: MmuService, *background: Awaitable[None]) -> None:
    """Waits for `stop`; raises what made the service or a background task fail."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work) for work in background]
    waiter: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait([waiter, service.failure, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            finished.result()
    finally:
        for task in (waiter, *tasks):
            task.cancel()
        await asyncio.gather(waiter, *tasks, return_exceptions=True)


class _Run:
    """The service's part in a run."""

    def __init__(self, member: MemberClient) -> None:
        self.member = member
        self.sender = EventSender(member.event_batch, lambda: member.event_credits, member.joined.next_event)
        member.events = self.sender
        self._service: MmuService | None = None
        self._credit_wanted = asyncio.Event()

    @property
    def service(self) -> MmuService:
        assert self._service is not None
        return self._service

    async def prepare(self, options: MmuOptions) -> None:
        """Makes the machine of the run, or goes on with it, and the service around it."""
        joined = self.member.joined
        listeners: list[EventListener] = [self._listen] if joined.config.check else []
        startup = Startup(
            out=options.out,
            config=joined.config,
            run=joined.run,
            heartbeat=joined.heartbeat,
            next_event=joined.next_event,
            fsync=options.fsync,
        )
        prepared = await prepare(startup, *listeners)
        self._service = MmuService(
            prepared,
            joined.heartbeat,
            snapshot_records=options.snapshot_records,
            on_vcpu_attached=self._say_tokens,
            on_vcpu_lost=self.member.vcpu_lost,
        )

    def _listen(self, first: int, events: list[Event], data: bytes) -> None:
        self.sender.listen(first, events, data)
        self._after_batches()

    def _after_batches(self) -> None:
        if self.sender.waiting:
            self._credit_wanted.set()
        if self._service is not None:
            self._service.set_blocked(self.sender.blocked)

    async def send_batches(self) -> None:
        """Sends batches that wait for credit as it comes."""
        while True:
            await self._credit_wanted.wait()
            await self.member.event_credit()
            self._credit_wanted.clear()
            self.sender.pump()
            self._after_batches()

    async def work(self, stop: asyncio.Event) -> None:
        """From the start to the order to drain."""
        ending: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(event.wait()) for event in (stop, self.member.drain)
        ]
        start = asyncio.ensure_future(self.member.started())
        try:
            waiting: list[asyncio.Future[Any]] = [start, *ending, self.service.failure]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            started = start.result() if start.done() else None
            if started is not None:
                self.service.start(started.vcpus)
                self._progress()
                await self._run(ending)
        finally:
            for task in (start, *ending):
                task.cancel()
            await asyncio.gather(start, *ending, return_exceptions=True)
        if self.service.failure.done():
            self.service.failure.result()

    async def _run(self, ending: list[asyncio.Future[Any]]) -> None:
        waiting = [*ending, self.service.failure]
        while not any(future.done() for future in waiting):
            await asyncio.wait(waiting, timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            self._progress()

    def _progress(self) -> None:
        self.sender.close_batch()
        self._after_batches()
        self._say_tokens()

    def _say_tokens(self) -> None:
        """At once when there is a new one: whoever replaces that vCPU's worker will need it. Not before the start: the
        first progress says that the guest is loaded.
        """
        service = self.service
        if service.started and self.member.error is None:
            self.member.progress(mmu_counters(service), tokens=service.peers.tokens)

    async def drain_and_report(self) -> None:
        """Finishes what is under way, sends the rest of the events, reports."""
        digest = await self.service.drain()
        self.sender.close_batch()
        while self.sender.waiting:
            await self.member.event_credit()
            self.sender.pump()
        await self.member.events_taken_in()
        self.member.report(*mmu_report(self.service, digest))


async def _serve_run(options: MmuOptions, coordinator: str, stop: asyncio.Event) -> int:
    async with _endpoint(options) as (address, begin):
        member = await MemberClient.join(
            coordinator,
            m.Role.MMU,
            endpoint=options.advertise or address,
            name=options.name,
            timeout=JOIN_SECONDS,
            security=options.security.client(KeyRole.MMU, COORDINATOR),
        )
        async with member:
            status = await _take_part(options, member, begin, stop)
    with suppress(TimeoutError):
        async with asyncio.timeout(options.linger_seconds):
            await stop.wait()
    return status


async def _take_part(
    options: MmuOptions, member: MemberClient, begin: Callable[[MmuService], None], stop: asyncio.Event
) -> int:
    config = member.joined.config
    heartbeat = member.joined.heartbeat
    run = _Run(member)
    await run.prepare(options)
    begin(run.service)
    member.ready()
    log.info("ready", profile=config.profile, workload=config.workload.value)
    background = [
        asyncio.ensure_future(_ticking(run.service, heartbeat)),
        asyncio.ensure_future(run.send_batches()),
    ]
    try:
        await run.work(stop)
        if member.lost.is_set():
            log.error("the coordinator is lost", error=str(member.error))
            await run.service.drain()
            return 2
        await run.drain_and_report()
        if not stop.is_set():
            await member.finished()
    except ServiceError as error:
        log.error("the run ended badly", error=str(error))  # noqa: TRY400 - no traceback: it is not our failure
        return 2
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    return 0
