"""Requests per second that the MMU service serves, beside a bare ROUTER echo.

A request is one page-fault exit: the exit goes out, the handler runs, and `Entered` comes back. The echo decodes the
same exit and answers the same `Entered` over the same endpoint with the same codec, and does nothing else. Each vCPU
is a client process with one request on the way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing as mp
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import structlog

from benchmarks.figures import Figure
from shadowmmu.client import Endpoint, VcpuClient
from shadowmmu.cpu.guest.layout import direct
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.service import MmuService
from shadowmmu.protocol import FROM_MMU, MMU, TO_MMU, Session, Side
from shadowmmu.protocol import messages as m

__all__ = ["requests_per_second"]

SECONDS = 2.0
PAGES = 32_768
STRIDE = 8
CONFIG = m.RunConfig(memory_pages=PAGES, mmu_pages=4096, park_rate=0.0, host_rate=0.0, audit=m.Audit.NEVER)


async def _service(report: Connection, vcpus: int) -> None:
    service = MmuService(CONFIG, JournalFile(None), 1.0)
    endpoint = Endpoint.router(service.on_message, on_batch=service.on_batch)
    service.endpoint = endpoint
    service.start(vcpus)
    report.send(endpoint.bind("tcp://127.0.0.1:*"))
    async with endpoint:
        await asyncio.get_running_loop().run_in_executor(None, report.recv)


async def _echo(report: Connection, _vcpus: int) -> None:
    sessions: dict[bytes, Session] = {}

    def on_message(address: bytes, frames: list[bytes]) -> None:
        session = sessions.setdefault(address, Session(MMU, Side.SERVICE))
        envelope = TO_MMU.decode(frames)
        session.receive(envelope)
        match envelope.body:
            case m.Attach():
                answer: m.Message = m.Attached(len(sessions) - 1, len(sessions), vpid=True, heartbeat=1.0)
            case m.Detach():
                answer = m.Ended("detached")
            case m.Enter() | m.Exit():
                answer = m.Entered(session.entry + 1)
            case _:
                return
        endpoint.send(address, FROM_MMU.encode(session.send(answer)))

    endpoint = Endpoint.router(on_message, on_batch=lambda: None)
    report.send(endpoint.bind("tcp://127.0.0.1:*"))
    async with endpoint:
        await asyncio.get_running_loop().run_in_executor(None, report.recv)


def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def _serve(kind: Callable[[Connection, int], object], report: Connection, vcpus: int) -> None:
    _quiet()
    asyncio.run(kind(report, vcpus))  # type: ignore[arg-type]


async def _client(address: str, number: int, ready: Connection) -> None:
    addresses = itertools.cycle(direct(page << 12) for page in range(number, PAGES, STRIDE))
    async with await VcpuClient.connect(address, name=f"bench-{number}", timeout=20.0) as vcpu:
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


def _run_client(address: str, number: int, ready: Connection) -> None:
    asyncio.run(_client(address, number, ready))


def _measure(kind: Callable[[Connection, int], object], vcpus: int) -> float:
    context = mp.get_context("spawn")
    control, child = context.Pipe()
    server = context.Process(target=_serve, args=(kind, child, vcpus))
    server.start()
    address = control.recv()
    pipes = []
    clients = []
    for number in range(vcpus):
        ours, theirs = context.Pipe()
        client = context.Process(target=_run_client, args=(address, number, theirs))
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
        pairs = [(_measure(_service, vcpus), _measure(_echo, vcpus)) for _ in range(runs)]
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
