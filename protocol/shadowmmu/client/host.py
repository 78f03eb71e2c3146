"""`HostClient`: a host agent's connection to the MMU service."""

from __future__ import annotations

import asyncio
from typing import Self, Unpack

from shadowmmu.client.connection import ClientOptions, Connection
from shadowmmu.client.errors import RequestRefused
from shadowmmu.protocol import MMU, Message
from shadowmmu.protocol.messages import (
    Attach,
    Attached,
    Detach,
    ErrorReply,
    HostOperation,
    HostReply,
    HostRequest,
    Role,
)

__all__ = ["HostClient", "probe"]


class HostClient(Connection):
    """A host agent. Made by `await HostClient.connect(...)`; as an async context manager it detaches at the end."""

    default_name = "host"
    attached: Attached
    """What the service said when we attached."""

    def __init__(self, address: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(MMU, address, **options)
        self._replies: dict[int, asyncio.Future[HostReply]] = {}  # by request number
        self._numbers: dict[int, int] = {}  # sequence number -> request number

    @classmethod
    async def connect(cls, address: str, **options: Unpack[ClientOptions]) -> Self:
        """Connect and attach. Raises RequestRefused or ServiceLost."""
        client = cls(address, **options)
        await client._open(Attach(Role.HOST, client.name, resumable=options.get("resumable", False)))
        return client

    async def request(self, operation: HostOperation, *, paced: bool = False) -> HostReply:
        """Have an operation done; several may be under way at once. Raises RequestRefused if it is not possible.

        `paced`: start it when the guest has come far enough for the run's host_rate, not at once.
        """
        await self._until(lambda: self.session.host_credits)
        number = self.session.request + 1
        future: asyncio.Future[HostReply] = self._future()
        envelope = self.send(HostRequest(number, operation, paced))
        self._replies[number] = future
        self._numbers[envelope.seq] = number
        try:
            return await future
        finally:
            self._replies.pop(number, None)
            self._numbers.pop(envelope.seq, None)

    async def detach(self, timeout: float = 5.0) -> None:
        """Leave. Returns when the service has said that we are out."""
        self.send(Detach())
        async with asyncio.timeout(timeout):
            await asyncio.shield(self._last)

    async def _leave(self) -> None:
        await self.detach()

    def _handle(self, body: Message) -> None:
        match body:
            case Attached():
                self.attached = body
            case HostReply():
                self._answer(self._replies.get(body.request), body)
            case ErrorReply():
                future = self._replies.get(body.request or self._numbers.get(body.seq, 0))
                if future is not None and not future.done():
                    future.set_exception(RequestRefused(body.code, body.text, body.seq))
            case _:
                pass


class _Probe(Connection):
    default_name = "probe"

    async def run(self) -> Attached:
        await self._open(Attach(Role.PROBE, self.name))
        self.send(Detach())
        async with asyncio.timeout(self._timeout):
            await asyncio.shield(self._last)
        return self.attached

    def _handle(self, body: Message) -> None:
        if isinstance(body, Attached):
            self.attached = body


async def probe(address: str, **options: Unpack[ClientOptions]) -> Attached:
    """Attach to an MMU service as a probe and leave again: its health. Raises ServiceError if it has none."""
    async with _Probe(MMU, address, **options) as client:
        return await client.run()
