"""`MemberClient`: the membership of a process in a run, towards the coordinator.

The membership survives its connections, and the coordinator's process: when the connection is lost or silent, or the
coordinator has given us up or knows us no more, the client joins again with its number and token, is told where the
run is, and says again what may have been lost. To its user it is one membership.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, Self, Unpack

from shadowmmu.client.connection import ClientOptions, Connection
from shadowmmu.client.errors import RequestRefused, ServiceError, ServiceLost, SessionEnded
from shadowmmu.protocol import COORDINATOR, Envelope, ErrorCode, Message, State
from shadowmmu.protocol.messages import (
    Drain,
    Ended,
    ErrorReply,
    EventBatch,
    EventCredit,
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

__all__ = ["EventFeed", "MemberClient"]

REJOIN_SECONDS: Final = 60.0
"""So long the client tries to join again."""
ATTEMPT_SECONDS: Final = 2.0
"""After so long without an answer to Join it tries another connection: this one may be half open."""

_ACTIVE: Final = frozenset({State.JOINED, State.READY, State.RUNNING, State.DRAINING})
_WORKING: Final = frozenset({State.RUNNING, State.DRAINING})
_LOST: Final = frozenset({ErrorCode.UNREACHABLE, ErrorCode.SEQUENCE_GAP})
"""What makes the connection useless, and nothing else."""
_FORGOTTEN: Final = frozenset({ErrorCode.NOT_ATTACHED, ErrorCode.STALE_INCARNATION})
"""Refusals of a coordinator that does not know this connection: it has given it up, or is another process."""


class EventFeed(Protocol):
    """Where the MMU service's event batches come from. They are kept until they are credited."""

    @property
    def finished(self) -> bool:
        """Nothing waits to be sent or credited."""
        ...

    def credited(self, batches: int) -> None:
        """The coordinator has taken in so many; as many more may be sent."""
        ...

    def resume(self, next_event: int) -> None:
        """There is a new connection, with all credit: go on at this event."""
        ...


class MemberClient(Connection):
    """A member of a run. Made by `await MemberClient.join(...)`.

    `joined` is the last welcome; it has the run's configuration. `drain` is set when the coordinator asks to finish
    (and when it is lost); `lost` when it could not be reached for long, or has ended our membership without the run's
    end. `events`: to be set by an MMU service that sends events. `rejoined`: how often it has joined again.
    """

    default_name = "member"
    joined: Joined

    def __init__(self, address: str, **options: Unpack[ClientOptions]) -> None:
        self.drain = asyncio.Event()
        self.lost = asyncio.Event()
        self.start: Start | None = None
        self.events: EventFeed | None = None
        self.rejoined = 0
        self._join: Join | None = None  # of the next connection
        self._away: ServiceError | None = None  # why we are not connected
        self._attempt: asyncio.TimerHandle | None = None
        self._limit: asyncio.TimerHandle | None = None
        # What is said again on a new connection.
        self._ready: Ready | None = None
        self._progress: Progress | None = None
        self._report: Report | None = None
        self._vcpus_lost: list[VcpuLost] = []  # not sent yet
        super().__init__(COORDINATOR, address, **options)

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

    async def close(self, linger: float = 0.0) -> None:
        self._cancel_timers()
        await super().close(linger)

    # --- the course of a run --------------------------------------------------------------------------------------

    def ready(self, vcpu: int | None = None, token: bytes = b"") -> None:
        """Say that we can start. If the run is drained already, there is nothing to get ready for.

        `vcpu`, `token`: what the MMU service gave us.
        """
        self._check()
        self._ready = Ready(vcpu, token)
        self._say(self._ready, {State.JOINED})

    async def started(self) -> Start | None:
        """Wait for the start; None if the run is drained before it has begun."""
        await self._until(lambda: self.start is not None or self.drain.is_set())
        if self.start is None:
            self._check()
        return self.start

    def progress(
        self, counters: Mapping[str, int], *, done: bool = False, tokens: Sequence[tuple[int, bytes]] = ()
    ) -> None:
        """Report counters so far; `done`: our share of the instructions is executed.

        `tokens`: from the MMU service, those of all vCPUs that have one.
        """
        self._check()
        self._progress = Progress(dict(counters), done, list(tokens))
        self._say(self._progress, _WORKING)

    def report(
        self,
        counters: Mapping[str, int],
        histograms: Mapping[str, str] | None = None,
        info: Mapping[str, str] | None = None,
    ) -> None:
        """Say our final word: after `drain`, or before if we cannot go on."""
        self._check()
        self._report = Report(dict(counters), dict(histograms or {}), dict(info or {}))
        self._say(self._report, _ACTIVE)

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
        return self.session.event_credits if self.session.state in _ACTIVE else 0

    def event_batch(self, first: int, count: int, data: bytes) -> None:
        """Send a piece of the event stream. Raises LocalProtocolError without credit."""
        self.send(EventBatch(first, count, data))

    async def event_credit(self) -> None:
        """Wait until there is credit for an event batch."""
        await self._until(lambda: self.event_credits)

    async def events_taken_in(self) -> None:
        """Wait until the coordinator has taken in all event batches that were sent."""
        await self._until(
            lambda: (
                self._away is None
                and not self.session.batches
                and (self.events is None or self.events.finished)
            )
        )

    def vcpu_lost(self, vcpu: int, text: str) -> None:
        """Tell that a vCPU was given up."""
        self._check()
        self._vcpus_lost.append(VcpuLost(vcpu, text[:1024]))
        self._tell_vcpus_lost()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _say(self, body: Message, states: set[State] | frozenset[State]) -> None:
        """Sends it if it can be sent now; else it is said when that has become possible."""
        if self.session.state in states:
            self.send(body)

    def _tell_vcpus_lost(self) -> None:
        if self.session.state in _ACTIVE:
            for body in self._vcpus_lost:
                self.send(body)
            self._vcpus_lost.clear()

    def _handle(self, body: Message) -> None:
        match body:
            case Joined():
                self.joined = body
                if self._away is not None:
                    self._back()
                role = self.session.role
                assert role is not None
                endpoint = self._opening.endpoint if isinstance(self._opening, Join) else ""
                self._join = Join(role, self.name, endpoint, body.member, body.token)
            case Start():
                self.start = body
                if self._progress is not None:
                    self.send(self._progress)
            case Drain():
                self.drain.set()
            case EventCredit() if self.events is not None:
                self.events.credited(body.batches)
            case _:
                pass

    def _failed(self, error: ServiceError) -> None:
        self._cancel_timers()
        if not self._closing and error.code != ErrorCode.RUN_FINISHED:
            self.lost.set()
        self.drain.set()

    # --- joining again --------------------------------------------------------------------------------------------

    def _fail(self, error: ServiceError) -> None:
        if self.error is None and not self._closing and self._may_join_again(error):
            self._leave_connection(error)
        else:
            super()._fail(error)

    def _may_join_again(self, error: ServiceError) -> bool:
        if self._join is None or not self._join.token:
            return False  # never welcomed, or by a coordinator that gives no second chance
        match error:
            case RequestRefused():
                return error.code in _FORGOTTEN
            case SessionEnded():
                return error.code == ErrorCode.GIVEN_UP
            case _:
                return error.code in _LOST

    def _leave_connection(self, error: ServiceError) -> None:
        if self._beat_handle is not None:
            self._beat_handle.cancel()
        if self._away is None:
            self._away = error
            self._limit = self._loop.call_later(REJOIN_SECONDS, self._give_up)
        self._forget_session()
        self._loop.call_soon(
            self._line.open_later
        )  # we may be in a callback of the connection that is dropped

    def _forget_session(self) -> None:
        self.session.reset()
        self.session.state = State.DETACHED

    def _give_up(self) -> None:
        super()._fail(ServiceLost(f"could not join again within {REJOIN_SECONDS:g} s; {self._away}"))

    def _on_open(self) -> None:
        if self._join is None or not self._join.token:
            super()._on_open()
        elif self.error is None:
            if self._away is None:
                self._leave_without_line()
            self._forget_session()
            self.send(self._join)
            self._arm_attempt()

    def _leave_without_line(self) -> None:
        """The line noticed first that the connection was lost, and has made another one."""
        self._away = ServiceLost(f"the connection to {self.address} was lost")
        self._limit = self._loop.call_later(REJOIN_SECONDS, self._give_up)
        if self._beat_handle is not None:
            self._beat_handle.cancel()

    def _arm_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
        self._attempt = self._loop.call_later(ATTEMPT_SECONDS, self._line.open_later)

    def _back(self) -> None:
        """We are a member again: what may not have arrived is said again. Progress follows upon Start."""
        self._away = None
        self.rejoined += 1
        self._cancel_timers()
        if self._ready is not None:
            self.send(self._ready)
        self._tell_vcpus_lost()
        if self.events is not None:
            self.events.resume(self.joined.next_event)
        if self._report is not None:
            self.send(self._report)

    def _cancel_timers(self) -> None:
        for handle in (self._attempt, self._limit):
            if handle is not None:
                handle.cancel()

    def _dispatch(self, envelope: Envelope) -> None:
        body = envelope.body
        if isinstance(body, Ended):
            error = SessionEnded(body.code, body.text)
            if self._may_join_again(error):
                self._fail(error)
                return
        super()._dispatch(envelope)

    def _refused(self, error: ErrorReply) -> None:
        if error.code == ErrorCode.ALREADY_ATTACHED and self.session.attached:
            return  # our Join arrived twice
        if error.code == ErrorCode.RUN_FINISHED:
            self._fail(SessionEnded(error.code, error.text))
        else:
            super()._refused(error)
