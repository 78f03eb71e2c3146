"""Fake members of a run, on real sockets; every socket is closed by its fixture."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from shadowmmu.client.transport import Endpoint
from shadowmmu.protocol import COORDINATOR, FROM_COORDINATOR, TO_COORDINATOR, Session, Side
from shadowmmu.protocol import messages as m

Body = TypeVar("Body", bound=m.CoordinatorMessage)

WAIT_SECONDS = 20.0


class FakeMember:
    """A process of a run that does what the test says. Keeps everything that it receives."""

    def __init__(self, address: str) -> None:
        self.session = Session(COORDINATOR, Side.PEER)
        self.received: list[m.CoordinatorMessage] = []
        self._news = asyncio.Event()
        self.endpoint = Endpoint.dealer(self._message, hard_limit=FROM_COORDINATOR.hard_limit)
        self.endpoint.connect(address)
        self.endpoint.start()

    def _message(self, _peer: bytes, frames: list[bytes]) -> None:
        envelope = FROM_COORDINATOR.decode(frames)
        if self.session.receive(envelope):
            assert isinstance(envelope.body, m.CoordinatorMessage)
            self.received.append(envelope.body)
            self._news.set()
            if isinstance(envelope.body, m.Heartbeat):
                self.send(m.Heartbeat())

    def send(self, body: m.MemberMessage) -> None:
        self.endpoint.send(b"", TO_COORDINATOR.encode(self.session.send(body)))

    def send_raw(self, frames: list[bytes]) -> None:
        self.endpoint.send(b"", frames)

    async def get(self, kind: type[Body], count: int = 1) -> Body:
        """The `count`th message of that kind; waits for it."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                found = [body for body in self.received if isinstance(body, kind)]
                if len(found) >= count:
                    return found[count - 1]
                self._news.clear()
                await self._news.wait()

    async def join(self, role: m.Role, name: str = "fake", endpoint: str = "") -> m.Joined:
        self.send(m.Join(role, name, endpoint))
        return await self.get(m.Joined)


MakeMember = Callable[[str], FakeMember]


@pytest.fixture
async def member() -> AsyncIterator[MakeMember]:
    members: list[FakeMember] = []

    def make(address: str) -> FakeMember:
        members.append(FakeMember(address))
        return members[-1]

    yield make
    for one in members:
        await one.endpoint.close()


@pytest.fixture
async def in_background() -> AsyncIterator[Callable[[Awaitable[object]], "asyncio.Task[object]"]]:
    tasks: list[asyncio.Task[object]] = []

    async def wait_for(awaitable: Awaitable[object]) -> object:
        return await awaitable

    def start(awaitable: Awaitable[object]) -> "asyncio.Task[object]":
        tasks.append(asyncio.create_task(wait_for(awaitable)))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
