"""A proxy of messages: each peer has a connection of its own to the service, under the peer's routing id.

Messages may be sent on late, and some of them twice. Those of one peer stay in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from shadowmmu.client import Endpoint

HARD_LIMIT = 64 << 20


class Between:
    """Stands in front of a service. Every `twice`th message is sent on twice (0: none), all of them `delay` seconds late.

    `repeated` counts those that were. The first message of each peer is one of them.
    """

    def __init__(self, *, twice: int = 0, delay: float = 0.0) -> None:
        self.repeated = 0
        self._passed = 0
        self._twice = twice
        self._delay = delay
        self._target = ""
        self._peers: dict[bytes, Endpoint] = {}
        self._front = Endpoint.router(self._from_peer, hard_limit=HARD_LIMIT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._front.close()
        for endpoint in self._peers.values():
            await endpoint.close()

    def before(self, target: str) -> str:
        """Begins to serve; returns the address to connect to."""
        self._target = target
        address = self._front.bind("tcp://127.0.0.1:*")
        self._front.start()
        return address

    def _from_peer(self, peer: bytes, frames: list[bytes]) -> None:
        self._later(self._to_service, peer, frames)

    def _to_service(self, peer: bytes, frames: Sequence[bytes]) -> None:
        endpoint = self._peers.get(peer)
        first = endpoint is None
        if endpoint is None:
            endpoint = Endpoint.dealer(
                lambda _service, back: self._later(self._to_peer, peer, back),
                hard_limit=HARD_LIMIT,
                routing_id=peer,
            )
            endpoint.connect(self._target)
            endpoint.start()
            self._peers[peer] = endpoint
        self._send(endpoint, b"", frames, first=first)

    def _to_peer(self, peer: bytes, frames: Sequence[bytes]) -> None:
        self._send(self._front, peer, frames)

    def _send(self, endpoint: Endpoint, peer: bytes, frames: Sequence[bytes], *, first: bool = False) -> None:
        if endpoint.closed:
            return
        endpoint.send(peer, frames)
        self._passed += 1
        if self._twice and (first or self._passed % self._twice == 0):
            self.repeated += 1
            endpoint.send(peer, frames)

    def _later(
        self, send: Callable[[bytes, Sequence[bytes]], None], peer: bytes, frames: list[bytes]
    ) -> None:
        if self._delay:
            asyncio.get_running_loop().call_later(self._delay, send, peer, frames)
        else:
            send(peer, frames)
