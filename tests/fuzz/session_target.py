"""Fuzz target `session`: a service's session and a peer's, and a wire on which everything goes wrong.

The input says who sends what, legal or not, and what the wire does: deliver, repeat, lose, overtake, renumber,
or make up a message of the wrong direction. Promised: nothing but RemoteProtocolError and LocalProtocolError; a message that is refused
changes nothing; `check` says what `receive` does; states stay in the conversation's table; counters stay bounded.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, get_args

from shadowmmu.protocol import (
    COORDINATOR,
    EVENT_CREDITS,
    HOST_CREDITS,
    MMU,
    Envelope,
    LocalProtocolError,
    RemoteProtocolError,
    Service,
    Session,
    Side,
    State,
)
from shadowmmu.protocol import messages as m
from tests.fuzz.steering import Hints, Steering, build
from tests.protocol.test_session import snapshot

__all__ = ["run"]

OPENINGS: Final = (
    (MMU, m.Role.VCPU),
    (MMU, m.Role.HOST),
    (MMU, m.Role.PROBE),
    (COORDINATOR, m.Role.MMU),
    (COORDINATOR, m.Role.VCPU),
    (COORDINATOR, m.Role.PROBE),
)
KINDS: Final[dict[tuple[Service, Side], tuple[type, ...]]] = {
    (MMU, Side.PEER): get_args(m.VcpuMessage),
    (MMU, Side.SERVICE): get_args(m.MmuMessage),
    (COORDINATOR, Side.PEER): get_args(m.MemberMessage),
    (COORDINATOR, Side.SERVICE): get_args(m.CoordinatorMessage),
}
EVERYTHING: Final[tuple[type, ...]] = get_args(m.Message)
MOST_MESSAGES: Final = 200


def _hints(session: Session) -> Hints:
    """Numbers that this session would take, and those beside them."""

    def near(number: int) -> list[int]:
        return [number, number + 1, max(number - 1, 0)]

    return {
        "entry": near(session.entry),
        "walk": near(session.walk),
        "request": [session.request + 1, *session.requests],
        "seq": [*session.requests.values(), session.receive_seq],
        "logs": near(session.logs),
        "batches": near(session.batches),
        "first": near(session.next_event or 0),
        "incarnation": near(session.incarnation or 1),
        "member": near(session.incarnation or 1),
        "vcpu": [0, 1],
    }


class _Wire:
    """Two ends of one conversation, and what is on its way, by sender."""

    def __init__(self, service: Service, role: m.Role) -> None:
        self.service = service
        self.role = role
        self.ends = {side: Session(service, side) for side in Side}
        self.ways: dict[Side, deque[Envelope]] = {side: deque() for side in Side}

    def opener(self) -> m.Message:
        return m.Attach(self.role, "x") if self.service is MMU else m.Join(self.role, "x")

    def send(self, side: Side, body: m.Message) -> None:
        session = self.ends[side]
        before = snapshot(session)
        try:
            expected = session.preview(body)
            envelope = session.send(body)
        except LocalProtocolError:
            assert snapshot(session) == before, f"{body!r} was not sent, and changed its sender"
            return
        assert envelope == expected, "preview and send differ"
        self.ways[side].append(envelope)
        _bounded(session)

    def take(self, side: Side, envelope: Envelope) -> None:
        session = self.ends[side]
        before = snapshot(session)
        verdict: object
        try:
            verdict = session.check(envelope)
        except RemoteProtocolError as error:
            verdict = error.code
        assert snapshot(session) == before, "a check has changed the session"
        about: tuple[int, int] | None = None
        try:
            taken: object = session.receive(envelope)
        except RemoteProtocolError as error:
            taken = error.code
            about = error.incarnation, error.seq
        if about is not None:
            assert snapshot(session) == before, f"{envelope!r} was refused, and changed its receiver"
            assert about == (envelope.incarnation, envelope.seq)
        assert taken == verdict, "check and receive differ"
        _bounded(session)


def _bounded(session: Session) -> None:
    assert 0 <= session.logs <= m.LOG_CREDITS
    assert 0 <= session.batches <= EVENT_CREDITS
    assert len(session.requests) <= HOST_CREDITS
    if session.conversation is None:
        assert session.state in (State.DETACHED, State.ENDED)
    else:
        assert session.state in session.conversation.states


def _number(steering: Steering, right: int) -> int:
    return steering.pick((right, right, right + 1, max(right - 1, 0), 0, 1 << 63))


def run(data: bytes) -> None:
    """One input; raises AssertionError, or whatever escaped, on a finding."""
    steering = Steering(data)
    wire = _Wire(*steering.pick(OPENINGS))
    wire.send(Side.PEER, wire.opener())
    for _ in range(MOST_MESSAGES):
        if steering.done:
            return
        _act(wire, steering)


def _act(wire: _Wire, steering: Steering) -> None:
    what = steering.byte()
    side = Side.PEER if what & 1 else Side.SERVICE
    other = wire.ends[side.other]
    way = wire.ways[side]
    match what >> 1 & 15:
        case 0 | 1 | 2 | 3 | 4:
            kind: Any = steering.pick(KINDS[wire.service, side])
            wire.send(side, build(kind, steering, _hints(wire.ends[side])))
        case 5:
            wire.send(side, wire.opener())
        case 6 | 7 | 8 | 9:
            if way:
                wire.take(side.other, way.popleft())
        case 10:
            if way:
                wire.take(side.other, way[0])  # it comes once more
        case 11:
            if way:
                way.popleft()  # lost
        case 12:
            if len(way) > 1:
                way.rotate(-1)  # overtaken
        case 13:
            made: Any = build(steering.pick(EVERYTHING), steering, _hints(other))
            wire.take(side.other, Envelope(other.incarnation, other.receive_seq, made))
        case _:
            made = build(steering.pick(KINDS[wire.service, side]), steering, _hints(other))
            numbers = _number(steering, other.incarnation), _number(steering, other.receive_seq)
            wire.take(side.other, Envelope(*numbers, made))
