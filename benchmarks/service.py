"""Requests per second that the MMU service serves, beside a bare ROUTER echo.

A request is one page-fault exit: the exit goes out, the handler runs, and `Entered` comes back. The echo decodes the
same exit and answers the same `Entered` over the same endpoint with the same codec, and does nothing else. Each vCPU
is a client process with one request on the way.

The same requests with what protects a run (CURVE, exactly once, the journal) are measured beside those with nothing of
it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import structlog

from benchmarks.figures import Figure
from shadowmmu.client import ClientOptions, Endpoint, KeyRole, Security, VcpuClient
from shadowmmu.client.keys import make_keys
from shadowmmu.cpu.guest.layout import direct
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import FROM_MMU, MMU, TO_MMU, Session, Side, session
from shadowmmu.protocol import messages as m

__all__ = ["protected_requests_per_second", "requests_per_second"]

SECONDS = 2.0
PAGES = 32_768
STRIDE = 8
CONFIG = m.RunConfig(memory_pages=PAGES, mmu_pages=4096, park_rate=0.0, host_rate=0.0, audit=m.Audit.NEVER)


class Protection(msgspec.Struct, frozen=True):
    """What is on: CURVE with the keys of a folder, exactly once, the journal in a folder. By default nothing."""

    keys: Path | None = None
    exactly_once: bool = False
    journal: Path | None = None

    def begin(self) -> None:
        """In the process that measures: without exactly once nothing is counted or kept for repetitions."""
        if not self.exactly_once:
            setattr(session, "Continuity", _Nothing)  # noqa: B010 - a stand-in, which its type would not allow


class _Nothing:
    """Stands for `Continuity`."""

    received = sent = 0

    def took(self, body: m.Message, seq: int) -> None: ...

    def gave(self, envelope: m.Envelope, asked: int | None) -> None: ...


async def _service(report: Connection, vcpus: int, protection: Protection) -> None:
    protection.begin()
    journal = JournalFile(None if protection.journal is None else protection.journal / "journal")
    service = MmuService(Prepared(Runner(CONFIG, journal.write), journal), 1.0)
    keys = Security(protection.keys).server(MMU)
    endpoint = Endpoint.router(service.on_message, on_batch=service.on_batch, security=keys)
    service.endpoint = endpoint
    service.start(vcpus)
    report.send(endpoint.bind("tcp://127.0.0.1:*"))
    async with endpoint:
        await asyncio.get_running_loop().run_in_executor(None, report.recv)


async def _echo(report: Connection, _vcpus: int, _protection: Protection) -> None:
    sessions: dict[bytes, Session] = {}

    def on_message(address: bytes, frames: list[bytes]) -> None:
        peer = sessions.setdefault(address, Session(MMU, Side.SERVICE))
        envelope = TO_MMU.decode(frames)
        peer.receive(envelope)
        match envelope.body:
            case m.Attach():
                answer: m.Message = m.Attached(len(sessions) - 1, len(sessions), vpid=True, heartbeat=1.0)
            case m.Detach():
                answer = m.Ended("detached")
            case m.Enter() | m.Exit():
                answer = m.Entered(peer.entry + 1)
            case _:
                return
        endpoint.send(address, FROM_MMU.encode(peer.send(answer)))

    endpoint = Endpoint.router(on_message, on_batch=lambda: None)
    report.send(endpoint.bind("tcp://127.0.0.1:*"))
    async with endpoint:
        await asyncio.get_running_loop().run_in_executor(None, report.recv)


def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


_Kind = Callable[[Connection, int, Protection], Coroutine[None, None, None]]


def _serve(kind: _Kind, report: Connection, vcpus: int, protection: Protection) -> None:
    _quiet()
    asyncio.run(kind(report, vcpus, protection))


async def _client(address: str, number: int, ready: Connection, protection: Protection) -> None:
    protection.begin()
    addresses = itertools.cycle(direct(page << 12) for page in range(number, PAGES, STRIDE))
    options: ClientOptions = {
        "name": f"bench-{number}",
        "timeout": 20.0,
        "security": Security(protection.keys).client(KeyRole.VCPU, MMU),
        "resumable": protection.exactly_once,
    }
    async with await VcpuClient.connect(address, **options) as vcpu:
        await vcpu.enter()
        ready.send(None)
        await asyncio.get_running_loop().run_in_executor(None, ready.recv)
        served = 0
        started = time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            gva = next(addresses)
            await vcpu.exit(m.PageFaultExit(gva, 0, m.Instruction(flags=0, size=8)))
            served += 1
        ready.send(served / (time.perf_counter() - started))


def _run_client(address: str, number: int, ready: Connection, protection: Protection) -> None:
    asyncio.run(_client(address, number, ready, protection))


def _measure(kind: _Kind, vcpus: int, protection: Protection) -> float:
    context = mp.get_context("spawn")
    control, child = context.Pipe()
    server = context.Process(target=_serve, args=(kind, child, vcpus, protection))
    server.start()
    address = control.recv()
    pipes = []
    clients = []
    for number in range(vcpus):
        ours, theirs = context.Pipe()
        client = context.Process(target=_run_client, args=(address, number, theirs, protection))
        client.start()
        pipes.append(ours)
        clients.append(client)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    rate = sum(pipe.recv() for pipe in pipes)
    for client in clients:
        client.join()
    control.send(None)
    server.join()
    return float(rate)


def requests_per_second(runs: int) -> list[Figure]:
    """Served and echoed requests per second with 1 and 4 vCPUs, and their ratios, pair by pair."""
    figures = []
    for vcpus in (1, 4):
        pairs = [
            (_measure(_service, vcpus, Protection()), _measure(_echo, vcpus, Protection()))
            for _ in range(runs)
        ]
        figures += [
            Figure(f"page-fault exits served, {vcpus} vCPU", "1/s", [served for served, _ in pairs]),
            Figure(f"ROUTER echo, {vcpus} clients", "1/s", [echoed for _, echoed in pairs]),
            Figure(
                f"served / echo, {vcpus} vCPU",
                "ratio",
                [served / echoed for served, echoed in pairs],
                aim=0.3,
            ),
        ]
    return figures


def protected_requests_per_second(runs: int) -> list[Figure]:
    """Served requests per second with everything that protects a run, as a ratio to those with nothing; in turns."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        keys = place / "keys"
        make_keys(keys)
        kinds = {
            "CURVE": Protection(keys=keys),
            "exactly once": Protection(exactly_once=True),
            "journal": Protection(journal=place),
            "CURVE, exactly once and journal": Protection(keys, exactly_once=True, journal=place),
        }
        for vcpus in (1, 4):
            ratios: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(runs):
                bare = _measure(_service, vcpus, Protection())
                for name, protection in kinds.items():
                    ratios[name].append(_measure(_service, vcpus, protection) / bare)
            figures += [
                Figure(f"served with {name} / with nothing, {vcpus} vCPU", "ratio", values, aim=0.8)
                for name, values in ratios.items()
            ]
    return figures
