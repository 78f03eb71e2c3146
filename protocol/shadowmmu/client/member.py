"""`MemberClient`: the connection of a process of a run to the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Self, Unpack

from shadowmmu.client.connection import ClientOptions, Connection
from shadowmmu.client.errors import ServiceError
from shadowmmu.protocol import COORDINATOR, ErrorCode, Message, State
from shadowmmu.protocol.messages import (
    Drain,
    EventBatch,
    Finished,
    Join,
    Joined,
    Progress,
    Ready,
    Report,
    Role,
    Start,
    VcpuLost,
)

__all__ = ["MemberClient"]


class MemberClient(Connection):
    """A member of a run. Made by `await MemberClient.join(...)`.

    `joined` has the run's configuration. `drain` is set when the coordinator asks to finish (and when it is lost);
    `lost` when it does not answer any more, or has ended our membership without the run's end.
    """

    default_name = "member"
    joined: Joined

    def __init__(self, address: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(COORDINATOR, address, **options)
        self.drain = asyncio.Event()
        self.lost = asyncio.Event()
        self.start: Start | None = None

    @classmethod
    async def join(
        cls, address: str, role: Role, *, endpoint: str = "", **options: Unpack[ClientOptions]
    ) -> Self:
        """Connect and join. `endpoint`: where the MMU service is to be reached (MMU only).

        A worker's welcome may take as long as the MMU service takes to join: see `timeout`.
        """
        client = cls(address, **options)
        await client._open(Join(role, client.name, endpoint))
        return client

    # --- the course of a run --------------------------------------------------------------------------------------

    def ready(self, vcpu: int | None = None) -> None:
        """Say that we can start. If the run is drained already, there is nothing to get ready for."""
        if self.session.state is State.JOINED:
            self.send(Ready(vcpu))

    async def started(self) -> Start | None:
        """Wait for the start; None if the run is drained before it has begun."""
        await self._until(lambda: self.start is not None or self.drain.is_set())
        if self.start is None:
            self._check()
        return self.start

    def progress(self, counters: Mapping[str, int], *, done: bool = False) -> None:
        """Report counters so far; `done`: our share of the instructions is executed."""
        self.send(Progress(dict(counters), done))

    def report(
        self,
        counters: Mapping[str, int],
        histograms: Mapping[str, str] | None = None,
        info: Mapping[str, str] | None = None,
    ) -> None:
        """Say our final word: after `drain`, or before if we cannot go on."""
        self.send(Report(dict(counters), dict(histograms or {}), dict(info or {})))

    async def finished(self) -> Finished:
        """Wait for the end of the run. Raises ServiceError if the coordinator is lost before."""
        last = await asyncio.shield(self._last)
        if isinstance(last, Finished):
            return last
        assert self.error is not None
        raise self.error

    # --- the MMU service's own ------------------------------------------------------------------------------------

    @property
    def event_credits(self) -> int:
        """How many more event batches may be sent now."""
        return self.session.event_credits

    def event_batch(self, first: int, count: int, data: bytes) -> None:
        """Send a piece of the event stream. Raises LocalProtocolError without credit."""
        self.send(EventBatch(first, count, data))

    async def event_credit(self) -> None:
        """Wait until there is credit for an event batch."""
        await self._until(lambda: self.event_credits)

    async def events_taken_in(self) -> None:
        """Wait until the coordinator has taken in all event batches that were sent."""
        await self._until(lambda: not self.session.batches)

    def vcpu_lost(self, vcpu: int, text: str) -> None:
        """Tell that a vCPU was given up."""
        self.send(VcpuLost(vcpu, text[:1024]))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _handle(self, body: Message) -> None:
        match body:
            case Joined():
                self.joined = body
            case Start():
                self.start = body
            case Drain():
                self.drain.set()
            case _:
                pass  # EventCredit: the session counts

    def _failed(self, error: ServiceError) -> None:
        if not self._closing and error.code != ErrorCode.RUN_FINISHED:
            self.lost.set()
        self.drain.set()
