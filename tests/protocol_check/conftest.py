from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Self

import pytest

from shadowmmu.client import Endpoint
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import TO_MMU, ErrorCode
from shadowmmu.protocol import messages as m

CONFIG = m.RunConfig(audit=m.Audit.NEVER)
HEARTBEAT = 0.2
VCPUS = 2


class Service:
    """An MMU service in a thread of its own, as `shadowmmu serve mmu` runs it."""

    def __init__(self) -> None:
        self.address = ""
        self.failure: BaseException | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        journal = JournalFile(None)
        service = MmuService(Prepared(Runner(CONFIG, journal.write), journal), HEARTBEAT, patience=0.0)

        def lost(address: bytes, reason: ErrorCode, undelivered: int) -> None:
            service.on_peer_lost(address, reason, undelivered)

        endpoint = Endpoint.router(
            service.on_message,
            on_failure=service.fail,
            on_batch=service.on_batch,
            on_peer_lost=lost,
            hard_limit=TO_MMU.hard_limit,
        )
        self.address = endpoint.bind("tcp://127.0.0.1:*")
        service.endpoint = endpoint
        service.start(VCPUS)
        async with endpoint:
            ticking = asyncio.create_task(self._tick(service))
            self._started.set()
            await self._stop.wait()
            ticking.cancel()
        if service.failure.done():
            self.failure = service.failure.exception()

    async def _tick(self, service: MmuService) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT / 4)
            service.tick(self._loop.time())

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that is right, with two vCPUs."""
    with Service() as service:
        yield service
    assert service.failure is None
