"""A client by hand: a DEALER socket, with which everything can be said, legal or not.

What is legal goes through `Session`, which then judges each answer of the service, too: its numbers, its order, its
credits. What is illegal goes past it (`post`), since a message that is refused changes nothing. Waiting is bounded by
the lab's patience, and heartbeats are sent meanwhile. A peer may lose its connection, and resume on another one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgpack
import msgspec
import zmq

from shadowmmu.protocol import (
    FROM_MMU,
    MMU,
    TO_MMU,
    VERSION_FRAME,
    Envelope,
    ErrorCode,
    HeartbeatTimer,
    RemoteProtocolError,
    Session,
    Side,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.registry import CheckFailed, require

if TYPE_CHECKING:
    from shadowmmu.protocol_check.lab import Lab

__all__ = ["Peer"]

SLICE_SECONDS: Final = 0.05
"""How long a socket is looked at before the other peers' heartbeats are."""
REMEMBERED: Final = 128
"""Messages of the service of which the bytes are remembered."""

Body = TypeVar("Body", bound=m.Message)


class Heard(msgspec.Struct, frozen=True):
    """A message of the service, and its frames."""

    envelope: Envelope
    frames: list[bytes]


class Peer:
    """One peer, over one connection after another.

    `silent`: sends no heartbeats; `kicked`: the entry that it was last told to leave; `heard`: the service's last
    messages with a number; `again`: those that came with a number that was taken before.
    """

    def __init__(self, lab: Lab, socket: zmq.Socket[bytes], name: str) -> None:
        self.lab = lab
        self.socket = socket
        self.name = name
        self.session = Session(MMU, Side.PEER)
        self.silent = False
        self.kicked = 0
        self.version = VERSION_FRAME
        self.received: deque[Envelope] = deque()
        self.heard: deque[Heard] = deque(maxlen=REMEMBERED)
        self.again: deque[Heard] = deque()
        self._resumed: list[m.Resumed] = []
        self._timer: HeartbeatTimer | None = None

    # --- sending -------------------------------------------------------------------------------------------------

    def send(self, body: m.VcpuMessage) -> Envelope:
        """Sends what is legal; numbers it."""
        envelope = self.session.send(body)
        if not self.session.resuming or isinstance(body, m.Resume):
            self._transmit(envelope)
        return envelope

    def lose(self, body: m.VcpuMessage) -> None:
        """Sends what is legal, and it is lost with the connection; that is for the caller to lose next."""
        self.session.send(body)

    def _transmit(self, envelope: Envelope) -> None:
        self.send_frames([self.version, *TO_MMU.encode(envelope)[1:]])

    def post(
        self, body: m.Message | dict[str, Any], *, incarnation: int | None = None, number: int | None = None
    ) -> Envelope:
        """Sends anything, by default with the numbers that would be right; the session does not hear of it."""
        incarnation = self.session.incarnation if incarnation is None else incarnation
        number = self._next_number if number is None else number
        if isinstance(body, dict):
            self.send_frames([self.version, msgpack.packb([incarnation, number, body])])
            return Envelope(incarnation, number, m.Heartbeat())
        envelope = Envelope(incarnation, number, body)
        self._transmit(envelope)
        return envelope

    def post_doubtful(self, body: m.VcpuMessage) -> m.ErrorReply | None:
        """Sends what is legal or not by what is on its way. Returns the refusal, or None: then it was taken.

        A Heartbeat with the same number takes its place, or is its repetition; and what a vCPU may never say shows
        that the service is past both.
        """
        sent = self.post(body)
        self.post(m.Heartbeat(), number=sent.seq)
        self.session.send_seq += 1
        marker = self.post(m.HostRequest(1, m.TestAge(1)))
        refusal: m.ErrorReply | None = None
        others: list[Envelope] = []
        while True:
            envelope = self.next("a refusal")
            reply = envelope.body
            if not isinstance(reply, m.ErrorReply) or envelope.seq:
                others.append(envelope)
            elif reply.seq == marker.seq:
                break
            else:
                refusal = reply
        self.received.extendleft(reversed(others))
        return refusal

    @property
    def _next_number(self) -> int:
        return self.session.send_seq if self.session.incarnation else 0

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Sends a message of these frames."""
        try:
            self.socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            raise CheckFailed(f"{self.name}: the service takes no more messages") from None
        if self._timer is not None:
            self._timer.sent(time.monotonic())

    def beat(self) -> None:
        """Sends a heartbeat if one is due."""
        timer = self._timer
        if self.silent or self.session.resuming or not self.session.attached:
            return
        if timer is not None and timer.due(time.monotonic()):
            self.send(m.Heartbeat())

    # --- receiving -----------------------------------------------------------------------------------------------

    def _take(self, seconds: float) -> bool:
        """Takes a message off the socket into `received`; False if none came for so long."""
        if not self.socket.poll(round(seconds * 1000)):
            return False
        frames = self.socket.recv_multipart(zmq.DONTWAIT)
        try:
            envelope = FROM_MMU.decode(frames)
            again = self.session.repeated(envelope) and not self.session.resuming
            acts = self.session.receive(envelope)
        except RemoteProtocolError as error:
            raise CheckFailed(f"{self.name}: the service sent what it may not: {error}") from None
        body = envelope.body
        if isinstance(body, m.Attached):
            self._timer = HeartbeatTimer(body.heartbeat, time.monotonic())
        elif isinstance(body, m.Kick) and acts:
            self.kicked = body.entry
        elif isinstance(body, m.Resumed) and acts:
            self._go_on(body)
        if envelope.seq:
            (self.again if again else self.heard).append(Heard(envelope, frames))
        if isinstance(body, m.ErrorReply) and not envelope.seq:
            acts = True
        if acts and not isinstance(body, m.Applied | m.Resumed):
            self.received.append(envelope)
        return True

    def _go_on(self, resumed: m.Resumed) -> None:
        self._resumed.append(resumed)
        for envelope in self.session.lacking(resumed):
            self._transmit(envelope)

    def take_again(self, original: Envelope) -> None:
        """Waits until this message of the service comes again, with the bytes that it had."""
        first = next(heard for heard in reversed(self.heard) if heard.envelope == original)
        until = time.monotonic() + self.lab.patience
        while not self.again:
            require(time.monotonic() < until, f"{self.name}: {original.body!r} was not said again")
            self.lab.look_after(self)
            self._take(SLICE_SECONDS)
        second = self.again.popleft()
        require(
            second.frames == first.frames,
            f"{self.name}: {second.envelope!r} was said again in the place of {original!r}",
        )

    def drain(self) -> None:
        """Takes what is there."""
        while self._take(0):
            pass

    def next(self, what: str, *, heartbeats: bool = False, seconds: float | None = None) -> Envelope:
        """The next message that means something. `what`: is waited for, for the error message."""
        seconds = self.lab.patience if seconds is None else seconds
        until = time.monotonic() + seconds
        while True:
            while self.received:
                envelope = self.received.popleft()
                if heartbeats or not isinstance(envelope.body, m.Heartbeat):
                    return envelope
            left = until - time.monotonic()
            if left <= 0:
                raise CheckFailed(f"{self.name}: {what} did not come within {seconds:g} s")
            self.lab.look_after(self)
            self._take(min(left, SLICE_SECONDS))

    def expect(self, kind: type[Body], *, seconds: float | None = None) -> Body:
        """The next message, which has to be of that type. A kick may come before, and is noted in `kicked`."""
        while True:
            envelope = self.next(kind.__name__, seconds=seconds)
            body = envelope.body
            if isinstance(body, kind):
                return body
            if not isinstance(body, m.Kick):
                raise CheckFailed(f"{self.name}: {body!r} instead of {kind.__name__}")

    def refused(
        self, *codes: ErrorCode, number: int | None = None, incarnation: int | None = None
    ) -> m.ErrorReply:
        """The next message, which has to be an ErrorReply outside the numbering with one of the codes.

        `number`: of the message refused, by default the next one; `incarnation`: by default the session's.
        """
        number = self._next_number if number is None else number
        incarnation = self.session.incarnation if incarnation is None else incarnation
        names = " or ".join(codes)
        while isinstance((envelope := self.next(f"the refusal ({names})")).body, m.Kick):
            pass
        reply = envelope.body
        if not isinstance(reply, m.ErrorReply):
            raise CheckFailed(f"{self.name}: {reply!r} instead of the refusal ({names})")
        require(reply.code in {code.value for code in codes}, f"{self.name}: {reply!r} instead of {names}")
        require(
            envelope.seq == 0,
            f"{self.name}: {reply!r} has number {envelope.seq}, and is outside the numbering",
        )
        require(
            (envelope.incarnation, reply.seq) == (incarnation, number),
            f"{self.name}: {reply.code} names incarnation {envelope.incarnation}, number {reply.seq};"
            f" the message refused had {incarnation}, {number}",
        )
        return reply

    def ended(self, *codes: ErrorCode, seconds: float | None = None) -> m.Ended:
        """Ended comes, with one of the codes; late answers and kicks may come before."""
        until = time.monotonic() + (self.lab.patience if seconds is None else seconds)
        while True:
            body = self.next("Ended", seconds=max(0.0, until - time.monotonic())).body
            if isinstance(body, m.Ended):
                names = " or ".join(codes)
                require(
                    body.code in {code.value for code in codes}, f"{self.name}: {body!r} instead of {names}"
                )
                return body
            require(
                isinstance(body, m.Kick | m.Loaded | m.Walked | m.WalkFault | m.Entered | m.HostReply),
                f"{self.name}: {body!r} instead of Ended",
            )

    # --- sessions ------------------------------------------------------------------------------------------------

    def attach(
        self,
        role: m.Role,
        vcpu: int | None = None,
        *,
        resumable: bool = False,
        token: bytes = b"",
        heartbeat: float | None = None,
    ) -> m.Attached:
        """Opens a session."""
        self.send(
            m.Attach(role, self.name, vcpu, resumable=resumable, token=token, heartbeat=heartbeat),
        )
        return self.expect(m.Attached)

    def cut(self) -> zmq.Socket[bytes]:
        """Has a new connection; what was on its way over the old one is lost once that is closed. Returns the old."""
        old, self.socket = self.socket, self.lab.socket()
        return old

    def resume(self) -> m.Resumed:
        """Loses the connection, and goes on over another one: sends again what the service lacks."""
        self.cut().close(linger=0)
        self.heard.clear()
        self.again.clear()
        self.send(m.Resume(self.session.token, self.session.continuity.received))
        until = time.monotonic() + self.lab.patience
        while self.session.resuming:
            require(time.monotonic() < until, f"{self.name}: Resumed did not come")
            require(
                not self.received or not isinstance(self.received[-1].body, m.ErrorReply),
                f"{self.name}: {self.received[-1].body if self.received else ''!r} instead of Resumed",
            )
            self.lab.look_after(self)
            self._take(SLICE_SECONDS)
        return self._resumed.pop()

    def detach(self) -> None:
        """Leaves in order, out of guest mode if need be."""
        if self.session.in_guest:
            self.send(m.Exit(self.session.entry, m.ExternalInterruptExit()))
        self.send(m.Detach())
        self.ended(ErrorCode.DETACHED)

    def vanish(self) -> None:
        """The connection goes away without a word."""
        self.silent = True
        self.lab.forget(self)
        self.socket.close(linger=0)
