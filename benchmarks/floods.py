"""What is left to an honest vCPU of its throughput while another client floods the service.

The service, the honest client and the flooder are processes. The honest client makes round trips as a worker does: a
page-fault exit, a walk, a log and a load. The baseline, in the same run, has in the flooder's place a process that
only uses a processor; so what is measured is the service's fairness and not the machine's number of cores. Two
ratios: of round trips per second, and of round trips per second of the service's thread, which other load on the
machine does not disturb.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import structlog
import zmq

from benchmarks.figures import Figure
from shadowmmu.client import Endpoint, Kicked, VcpuClient
from shadowmmu.cpu.guest.layout import direct
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import (
    FROM_MMU,
    MMU,
    TO_MMU,
    VERSION_FRAME,
    Envelope,
    LocalProtocolError,
    Session,
    Side,
)
from shadowmmu.protocol import messages as m

__all__ = ["Flood", "throughput_left"]

SECONDS: Final = 1.5
PAGES: Final = 8192
CONFIG: Final = m.RunConfig(
    memory_pages=PAGES, mmu_pages=1024, park_rate=0.0, host_rate=0.0, audit=m.Audit.NEVER
)
BATCH: Final = 32
"""Messages between two looks of the flooder at what came back."""
CONNECTIONS: Final = 20


class Flood(enum.Enum):
    """What a flooder does."""

    NOTHING = "uses a processor"
    HEARTBEATS = "heartbeats"
    GARBAGE = "garbage"
    BOMBS = "messages of 100 frames"
    STRANGER = "messages without a session"
    DUPLICATES = "one message again and again"
    WALKS = "walks, one after the other"
    UNASKED_WALKS = "walks without waiting"
    HOST = "cheap host requests, as many as it may"
    WRITES = "large host requests, as many as it may"
    CHURN = "attach and detach"
    CONNECTIONS = "connections"


class _Flooder:
    """A DEALER socket that sends without mercy."""

    def __init__(self, address: str, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.SocketType.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)
        self.session = Session(MMU, Side.PEER)

    def send(self, body: m.VcpuMessage) -> bool:
        """Sends it if it is legal."""
        try:
            frames = TO_MMU.encode(self.session.send(body))
        except LocalProtocolError:
            return False
        self.socket.send_multipart(frames)
        return True

    def hear(self, *, wait: bool = False) -> None:
        while self.socket.poll(1000 if wait else 0):
            wait = False
            self.session.receive(FROM_MMU.decode(self.socket.recv_multipart()))

    def drop(self) -> None:
        while self.socket.poll(0):
            self.socket.recv_multipart()

    def open(self, role: m.Role) -> None:
        self.send(m.Attach(role, "flood"))
        self.hear(wait=True)

    def raw(self, frames: Sequence[bytes]) -> Iterator[None]:
        """The same frames for ever."""
        while True:
            for _ in range(BATCH):
                self.socket.send_multipart(frames)
            self.drop()
            yield

    def flood(self, kind: Flood) -> Iterator[None]:
        """Each step sends some."""
        match kind:
            case Flood.GARBAGE:
                return self.raw([os.urandom(8), os.urandom(64)])
            case Flood.BOMBS:
                return self.raw([b"x"] * 100)
            case Flood.STRANGER:
                return self.raw([VERSION_FRAME, b"\x93\x05\x01\x81\xa1t\xa5enter"])
            case Flood.HEARTBEATS:
                return self._heartbeats()
            case Flood.DUPLICATES:
                return self._duplicates()
            case Flood.WALKS:
                return self._walks()
            case Flood.UNASKED_WALKS:
                return self._unasked_walks()
            case Flood.HOST:
                return self._host(m.TestAge(100))
            case Flood.WRITES:
                return self._host(m.WritePhys([(0x600000 + 8 * word, word) for word in range(4096)]))
            case Flood.CHURN:
                return self._churn()
            case _:
                return itertools.repeat(None)

    def _heartbeats(self) -> Iterator[None]:
        self.open(m.Role.PROBE)
        while True:
            for _ in range(BATCH):
                self.send(m.Heartbeat())
            self.drop()
            yield

    def _duplicates(self) -> Iterator[None]:
        self.open(m.Role.HOST)
        envelope = self.session.send(m.HostRequest(1, m.TestAge(100)))
        return self.raw(TO_MMU.encode(envelope))

    def _enter(self) -> None:
        self.open(m.Role.VCPU)
        self.send(m.Enter())
        self.hear(wait=True)

    def _walks(self) -> Iterator[None]:
        self._enter()
        while True:
            if not self.send(m.Walk(self.session.entry, self.session.walk + 1, direct(100 << 12), 0)):
                self.send(m.Exit(self.session.entry, m.ExternalInterruptExit()))
            self.hear(wait=True)
            yield

    def _unasked_walks(self) -> Iterator[None]:
        self._enter()
        body = m.Walk(self.session.entry, 7, direct(100 << 12), 0)
        return self.raw(TO_MMU.encode(Envelope(self.session.incarnation, self.session.send_seq, body)))

    def _host(self, operation: m.HostOperation) -> Iterator[None]:
        self.open(m.Role.HOST)
        while True:
            while self.session.host_credits:
                self.send(m.HostRequest(self.session.request + 1, operation))
            self.hear(wait=True)
            yield

    def _churn(self) -> Iterator[None]:
        while True:
            self.open(m.Role.VCPU)
            self.send(m.Detach())
            self.hear(wait=True)
            yield


async def _service(report: Connection) -> None:
    journal = JournalFile(None)
    service = MmuService(Prepared(Runner(CONFIG, journal.write), journal), 1.0)
    endpoint = Endpoint.router(
        service.on_message, on_batch=service.on_batch, on_peer_lost=service.on_peer_lost
    )
    service.endpoint = endpoint
    service.start(2)
    report.send(endpoint.bind("tcp://127.0.0.1:*"))
    loop = asyncio.get_running_loop()
    async with endpoint:
        while await loop.run_in_executor(None, report.recv):
            report.send(time.thread_time())


def _run_service(report: Connection) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(_service(report))


async def _honest(address: str, control: Connection) -> None:
    addresses = itertools.cycle(direct(page << 12) for page in range(1024, PAGES, 8))
    async with await VcpuClient.connect(address, name="honest", timeout=20.0) as vcpu:
        await vcpu.enter()
        control.send(None)
        await asyncio.get_running_loop().run_in_executor(None, control.recv)
        served = 0
        started = time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            served += await _round(vcpu, next(addresses))
        control.send((served, time.perf_counter() - started))


async def _round(vcpu: VcpuClient, gva: int) -> int:
    try:
        answer = await vcpu.walk(gva)
        if isinstance(answer, m.WalkFault):
            await vcpu.exit(m.PageFaultExit(gva, answer.error_code, m.Instruction(0)))
            return 2
        await vcpu.log([(0, gva, answer.pfn, 8, 0)])
        await vcpu.load((0, gva, answer.pfn, 8, 0))
    except Kicked:
        await vcpu.exit(m.ExternalInterruptExit())
        return 1
    return 2


def _run_honest(address: str, control: Connection) -> None:
    asyncio.run(_honest(address, control))


def _run_flooder(address: str, kind: Flood, report: Connection) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sending = (
        _connecting(address, context) if kind is Flood.CONNECTIONS else _Flooder(address, context).flood(kind)
    )
    next(sending)
    report.send(None)
    for _ in sending:  # for ever: it is killed
        pass


def _connecting(address: str, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[None]:
    """Opens connections that say something wrong and go; some are open at any time."""
    open_ones: list[_Flooder] = []
    while True:
        flooder = _Flooder(address, context)
        flooder.socket.send_multipart([b"x"])
        open_ones.append(flooder)
        if len(open_ones) > CONNECTIONS:
            open_ones.pop(0).socket.close(linger=0)
            time.sleep(0.001)  # libzmq closes them in a thread of its own
        yield


class _Rates(NamedTuple):
    """Round trips of the honest vCPU per second, and per second that the service's thread ran."""

    per_second: float
    per_thread_second: float

    def over(self, baseline: _Rates) -> _Rates:
        return _Rates(
            self.per_second / baseline.per_second, self.per_thread_second / baseline.per_thread_second
        )


def _measure(kind: Flood) -> _Rates:
    context: Any = mp.get_context("spawn")
    pipes = [context.Pipe() for _ in range(3)]
    service = context.Process(target=_run_service, args=(pipes[0][1],))
    service.start()
    pipes[0][1].close()  # so that its end is noticed
    address = pipes[0][0].recv()
    honest = context.Process(target=_run_honest, args=(address, pipes[1][1]))
    honest.start()
    pipes[1][1].close()  # so that its end is noticed
    pipes[1][0].recv()
    flooder = context.Process(target=_run_flooder, args=(address, kind, pipes[2][1]))
    flooder.start()
    pipes[2][1].close()  # so that its end is noticed
    pipes[2][0].recv()
    begin = _thread_time(pipes[0][0])
    pipes[1][0].send(None)
    served, seconds = pipes[1][0].recv() if pipes[1][0].poll(SECONDS * 10) else (0, SECONDS)
    used = _thread_time(pipes[0][0]) - begin
    flooder.kill()
    honest.join(10)  # it takes its leave
    pipes[0][0].send(False)
    for process in (honest, flooder, service):
        process.join(10)
        process.kill()
    return _Rates(served / seconds, served / used)


def _thread_time(service: Connection) -> float:
    service.send(True)
    seconds: float = service.recv()
    return seconds


def throughput_left(runs: int) -> list[Figure]:
    """Per kind of flood: the honest vCPU's round trips per second over those of the baseline of the same run."""
    floods = [flood for flood in Flood if flood is not Flood.NOTHING]
    baselines = []
    ratios: dict[Flood, list[_Rates]] = {flood: [] for flood in floods}
    for _ in range(runs):
        for flood in floods:
            baseline = _measure(Flood.NOTHING)
            baselines.append(baseline.per_second)
            ratios[flood].append(_measure(flood).over(baseline))
    figures = [Figure("round trips of a vCPU, beside a process that uses a processor", "1/s", baselines)]
    for flood in floods:
        name = f"beside a flood: {flood.value}"
        figures += [
            Figure(name, "ratio", [ratio.per_second for ratio in ratios[flood]], aim=0.5),
            Figure(f"{name}; of the service's time", "ratio", [r.per_thread_second for r in ratios[flood]]),
        ]
    return figures
