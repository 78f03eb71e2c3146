"""Two sessions and two wires between them: whatever one end may send, the other end takes, however late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.protocol import (
    COORDINATOR,
    MMU,
    Envelope,
    ErrorCode,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    Service,
    Session,
    Side,
    State,
)
from shadowmmu.protocol import messages as m
from tests.protocol.strategies import envelopes
from tests.protocol.test_session import snapshot

ACCESS = (1, 0x1000, 1, 8, 0)
Make = Callable[[Session, int], Message]

# Messages with numbers near to the right ones: `near` is -1, 0 or 1, mostly 0.
UP_MMU: list[Make] = [
    lambda s, near: m.Enter(),
    lambda s, near: m.Log(s.entry + near, [ACCESS]),
    lambda s, near: m.Walk(s.entry + near, s.walk + 1, 0, 0),
    lambda s, near: m.Walk(s.entry, s.walk + 1 + near, 0, 0),
    lambda s, near: m.Load(s.entry + near, ACCESS),
    lambda s, near: m.Exit(s.entry + near, m.HaltExit()),
    lambda s, near: m.Exit(s.entry, m.ExternalInterruptExit()),
    lambda s, near: m.HostRequest(s.request + 1 + near, m.ZapAll()),
    lambda s, near: m.Heartbeat(),
]
DOWN_MMU: list[Make] = [
    lambda s, near: m.Attached(3 if s.role is m.Role.VCPU else None, 7 + near, vpid=True, heartbeat=1.0),
    lambda s, near: m.Entered(s.entry + 1 + near),
    lambda s, near: m.Entered(s.entry + 1),
    lambda s, near: m.Walked(s.entry + near, s.walk, 1, 1, 0),
    lambda s, near: m.WalkFault(s.entry, s.walk + near, 0),
    lambda s, near: m.Walked(s.entry, s.walk, 1, 1, 0),
    lambda s, near: m.Loaded(s.entry + near, 0),
    lambda s, near: m.Applied(1 + near),
    lambda s, near: m.Kick(s.entry + near),
    lambda s, near: m.Kick(s.entry),
    lambda s, near: m.HostReply(1 + near + (min(s.requests) - 1 if s.requests else 0), 0),
    lambda s, near: m.ErrorReply("bad-argument", "", max(s.requests.values(), default=0) + near),
    lambda s, near: m.ErrorReply("bad-argument", "", request=max(s.requests, default=0) + near),
    lambda s, near: m.Heartbeat(),
]
UP_COORDINATOR: list[Make] = [
    lambda s, near: m.Ready(),
    lambda s, near: m.Progress({}),
    lambda s, near: m.EventBatch((s.next_event or 1) + near, 2, b""),
    lambda s, near: m.VcpuLost(1, ""),
    lambda s, near: m.Heartbeat(),
]
DOWN_COORDINATOR: list[Make] = [
    lambda s, near: m.Joined(7 + near, m.RunConfig(), "", 1.0),
    lambda s, near: m.Start(1),
    lambda s, near: m.EventCredit(max(s.batches + near, 0)),
    lambda s, near: m.Heartbeat(),
]
# Ends, and what leads there: rarer, or every run would be a short one.
ENDS: list[tuple[Side, Make]] = [
    (Side.PEER, lambda s, near: m.Detach()),
    (Side.PEER, lambda s, near: m.Report({})),
    (Side.SERVICE, lambda s, near: m.Drain()),
    (Side.SERVICE, lambda s, near: m.Finished(m.Verdict.PASS)),
    (Side.SERVICE, lambda s, near: m.Ended("given-up")),
]
OPENINGS: list[tuple[Service, m.Role]] = [
    (MMU, m.Role.VCPU),
    (MMU, m.Role.VCPU),
    (MMU, m.Role.HOST),
    (MMU, m.Role.PROBE),
    (COORDINATOR, m.Role.MMU),
    (COORDINATOR, m.Role.VCPU),
    (COORDINATOR, m.Role.PROBE),
]


class Wires:
    """Two ends, and the messages on their way."""

    def __init__(self, service: Service, role: m.Role) -> None:
        self.role = role
        self.service = service
        self.ends = {side: Session(service, side) for side in Side}
        self.wires: dict[Side, deque[Envelope]] = {side: deque() for side in Side}  # by sender
        self.delivered = 0

    def send(self, side: Side, make: Make, near: int) -> None:
        session = self.ends[side]
        before = snapshot(session)
        try:
            envelope = session.send(make(session, near))
        except LocalProtocolError:
            assert snapshot(session) == before
        else:
            self.wires[side].append(envelope)

    def deliver(self, sender: Side) -> None:
        if not self.wires[sender]:
            return
        envelope = self.wires[sender].popleft()
        session = self.ends[sender.other]
        before = snapshot(session)
        try:
            session.receive(envelope)
        except RemoteProtocolError as error:
            # The only good reason: the service has ended the session, and the peer did not know yet.
            if sender is Side.SERVICE or error.code != ErrorCode.STALE_INCARNATION:
                raise
            assert snapshot(session) == before
        self.delivered += 1

    def settle(self) -> None:
        for side in Side:
            while self.wires[side]:
                self.deliver(side)

    def compare(self) -> None:
        peer, service = (self.ends[side] for side in Side)
        assert peer.state is service.state
        if peer.state in (State.ENDED, State.DETACHED):
            return
        shared = (
            "incarnation",
            "vcpu",
            "entry",
            "walk",
            "logs",
            "request",
            "requests",
            "batches",
            "next_event",
        )
        assert {name: getattr(peer, name) for name in shared} == {
            name: getattr(service, name) for name in shared
        }
        assert (peer.send_seq, peer.receive_seq) == (service.receive_seq, service.send_seq)

    def open(self) -> None:
        body: Message = m.Attach(self.role, "x") if self.service is MMU else m.Join(self.role, "x")
        self.send(Side.PEER, lambda s, near: body, 0)


@settings(max_examples=400)
@given(st.data())
def test_two_ends_never_disagree(data: st.DataObject) -> None:
    wires = Wires(*data.draw(st.sampled_from(OPENINGS)))
    up, down = (UP_MMU, DOWN_MMU) if wires.service is MMU else (UP_COORDINATOR, DOWN_COORDINATOR)
    near = st.sampled_from([0, 0, 0, 0, 1, -1])
    steps = st.tuples(st.integers(0, 99), st.integers(0, 99), near)
    wires.open()
    for action, choice, offset in data.draw(st.lists(steps, min_size=10, max_size=150)):
        if action < 30:
            wires.deliver(Side.PEER)
        elif action < 60:
            wires.deliver(Side.SERVICE)
        elif action < 77:
            wires.send(Side.PEER, up[choice % len(up)], offset)
        elif action < 95:
            wires.send(Side.SERVICE, down[choice % len(down)], offset)
        elif action < 98:
            side, make = ENDS[choice % len(ENDS)]
            wires.send(side, make, 0)
        else:
            wires.open()
    wires.settle()
    wires.compare()


@pytest.mark.parametrize("seed", range(300))
def test_long_conversations(seed: int) -> None:
    """Longer than hypothesis likes to make them, so that they come into every state."""
    random = Random(seed)
    wires = Wires(*random.choice(OPENINGS))
    up, down = (UP_MMU, DOWN_MMU) if wires.service is MMU else (UP_COORDINATOR, DOWN_COORDINATOR)
    wires.open()
    for _ in range(300):
        near = random.choice([0, 0, 0, 0, 1, -1])
        match random.choices(["peer", "service", "up", "down", "end", "open"], [24, 24, 25, 25, 1, 1])[0]:
            case "peer":
                wires.deliver(Side.PEER)
            case "service":
                wires.deliver(Side.SERVICE)
            case "up":
                wires.send(Side.PEER, random.choice(up), near)
            case "down":
                wires.send(Side.SERVICE, random.choice(down), near)
            case "end":
                side, make = random.choice(ENDS)
                wires.send(side, make, 0)
            case _:
                wires.open()
    wires.settle()
    wires.compare()


@settings(max_examples=100)
@given(st.data())
def test_whatever_arrives_is_taken_or_refused_without_effect(data: st.DataObject) -> None:
    wires = Wires(*data.draw(st.sampled_from(OPENINGS)))
    up, down = (UP_MMU, DOWN_MMU) if wires.service is MMU else (UP_COORDINATOR, DOWN_COORDINATOR)
    wires.open()
    wires.settle()
    for choice in data.draw(st.lists(st.integers(0, 999), max_size=30)):
        side = Side.PEER if choice % 2 else Side.SERVICE
        makes = up if choice % 2 else down
        wires.send(side, makes[choice // 2 % len(makes)], 0)
        wires.settle()
    session = wires.ends[data.draw(st.sampled_from(Side))]
    foreign = data.draw(envelopes())
    plausible = Envelope(
        data.draw(st.sampled_from([session.incarnation, 0, 1])),
        max(session.receive_seq + data.draw(st.integers(-1, 1)), 0),
        foreign.body,
    )
    for envelope in (foreign, plausible):
        before = snapshot(session)
        outcome: Any
        try:
            outcome = session.check(envelope)
        except RemoteProtocolError:
            with pytest.raises(RemoteProtocolError):
                session.receive(envelope)
            assert snapshot(session) == before
        else:
            assert snapshot(session) == before
            assert session.receive(envelope) is outcome
