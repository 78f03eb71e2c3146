"""The live page's server: uvicorn as a task of the coordinator's event loop, which begins and ends with the run.

Nothing that its clients do reaches the run: they can read, one bounded state after the other, and if the server fails,
the run goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Final

import structlog
import uvicorn

from shadowmmu.coordinator.live.address import LiveAddress
from shadowmmu.coordinator.live.app import live_app
from shadowmmu.coordinator.live.feed import Feed
from shadowmmu.coordinator.live.observation import Observation, observe
from shadowmmu.coordinator.service import Coordinator

__all__ = ["LiveServer"]

CONNECTION_LIMIT: Final = 512
"""Whoever asks when there are so many connections is answered 503."""
BACKLOG: Final = 64
GRACE_SECONDS: Final = 1
"""How long clients may take to read the last state."""
HEADER_LIMIT: Final = 16 << 10
"""Longest request line and headers, in bytes."""

log = structlog.get_logger("shadowmmu.coordinator")


class _Server(uvicorn.Server):
    """A server that leaves the process's signals alone: they are the run's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LiveServer:
    """Listens from the beginning; answers while `serving`. Raises OSError if it cannot listen there."""

    def __init__(self, address: LiveAddress) -> None:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self._socket = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
        self.address = LiveAddress(address.host, self._socket.getsockname()[1])
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """What one opens in a browser."""
        return self.address.url

    @property
    def connections(self) -> int:
        """How many clients there are."""
        return 0 if self._server is None else len(self._server.server_state.connections)

    def close(self) -> None:
        """Listens no more."""
        self._socket.close()

    @contextlib.asynccontextmanager
    async def serving(self, coordinator: Coordinator) -> AsyncIterator[None]:
        """Shows that coordinator's run for as long as the block runs, and then its last state."""
        state = coordinator.state

        def look() -> Observation:
            name = hashlib.blake2b(state.run_id, digest_size=4).hexdigest()
            return observe(state, name, coordinator.started, coordinator.now())

        feed = Feed(look, lambda: coordinator.series.samples)
        server = self._server = _Server(_config(feed, self.address))
        task = asyncio.create_task(server.serve([self._socket]))
        task.add_done_callback(_log_failure)
        try:
            yield
        finally:
            feed.close()
            server.should_exit = True
            await asyncio.wait([task])
            for connection in server.server_state.connections:
                if connection.transport is not None:
                    connection.transport.abort()  # of clients that do not read
            await asyncio.sleep(0)  # the loop closes them in its next turn
            self.close()


def _config(feed: Feed, address: LiveAddress) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").disabled = True  # strangers' nonsense; what fails of ours is raised
    return uvicorn.Config(
        live_app(feed, address.allowed_hosts),
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTION_LIMIT,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=HEADER_LIMIT,
    )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the live page has failed; the run goes on", error=str(task.exception()))
