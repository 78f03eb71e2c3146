from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from shadowmmu.client import Endpoint, HostClient, VcpuClient
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.patience import PATIENCE_SECONDS
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import TO_MMU, ErrorCode
from shadowmmu.protocol import messages as m

Until = Callable[[Callable[[], object]], Awaitable[None]]

CONFIG = m.RunConfig(park_rate=0.0, host_rate=0.0, audit=m.Audit.ALWAYS)
VCPUS = 2


@pytest.fixture
async def until() -> Until:
    """Waits for a condition that something else in the loop, or a socket, brings about."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - conditions of all kinds
                await asyncio.sleep(0.001)

    return wait


class Served:
    """A service with two vCPUs on loopback; `now` is the time that its heartbeats go by."""

    def __init__(
        self,
        path: Path,
        *,
        start: bool = True,
        config: m.RunConfig = CONFIG,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.path = path
        self.lost: list[tuple[int, str]] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.journal = JournalFile(path)
        self.service = MmuService(
            Prepared(Runner(config, self.journal.write), self.journal),
            1.0,
            patience=patience,
            on_vcpu_lost=lambda number, text: self.lost.append((number, text)),
        )
        self.endpoint = Endpoint.router(
            self.service.on_message,
            on_batch=self.service.on_batch,
            on_peer_lost=self._peer_lost,
            on_failure=self.service.fail,
            hard_limit=TO_MMU.hard_limit,
            context=self.context,
        )
        self.service.endpoint = self.endpoint
        self.address = self.endpoint.bind("tcp://127.0.0.1:*")
        if start:
            self.service.start(VCPUS)

    def _peer_lost(self, address: bytes, code: ErrorCode, undelivered: int) -> None:
        self.service.on_peer_lost(address, code, undelivered)

    async def vcpu(self, **options: Any) -> VcpuClient:
        return await VcpuClient.connect(self.address, context=self.context, **options)

    async def host(self) -> HostClient:
        return await HostClient.connect(self.address, context=self.context)

    def silence(self) -> None:
        """Lets a long time pass in which nobody says anything, as the service sees it."""
        now = time.monotonic()
        for second in range(1, 8):
            self.service.tick(now + second)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "journal")
    try:
        async with served.endpoint:
            yield served
        if served.service.failure.done():
            served.service.failure.result()
    finally:
        served.journal.close()
        served.context.destroy(linger=0)
