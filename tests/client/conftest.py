from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import zmq

from tests.client.fakes import FakeCoordinator, FakeMmu

Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context that ends with all its sockets, whatever the test left behind."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)
    gc.collect()


@pytest.fixture
async def until() -> Until:
    """Wait for a condition, which something else in the loop (or a socket) brings about."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 (conditions of all kinds)
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture
async def mmu(context: zmq.Context[zmq.Socket[bytes]]) -> AsyncIterator[FakeMmu]:
    async with FakeMmu(context) as service:
        yield service


@pytest.fixture
async def coordinator(context: zmq.Context[zmq.Socket[bytes]]) -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator(context) as service:
        yield service
