"""Exactly once: two sessions whose connection repeats messages and is cut at any moment, with messages on their way."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.protocol import (
    FROM_MMU,
    MMU,
    Envelope,
    ErrorCode,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    Session,
    Side,
    State,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.continuity import KEPT, kind_counts
from tests.protocol.test_session import ACCESS, TOKEN, snapshot
from tests.protocol.test_session_pair import DOWN_MMU, UP_MMU, Make

WHERE_IT_WAS: Final = (
    "state",
    "incarnation",
    "vcpu",
    "entry",
    "walk",
    "logs",
    "request",
    "requests",
)

UP: Final[dict[m.Role, list[Make]]] = {m.Role.VCPU: UP_MMU[:-2] + UP_MMU[-1:], m.Role.HOST: UP_MMU[-2:]}
DOWN: Final[dict[m.Role, list[Make]]] = {
    m.Role.VCPU: [*DOWN_MMU[1:-4], DOWN_MMU[-1]],
    # Error replies as version 1.1 has them, which name the request: the message may be one of an earlier connection.
    m.Role.HOST: DOWN_MMU[-2:] + DOWN_MMU[-4:-3],
}


class Line:
    """Two ends that are attached, and a connection between them that may be lost and made anew.

    `sent`, `taken`: the messages that count, by their sender: what it has sent, and what the other has taken in.
    `given`: what the service said on this connection, by number.
    """

    def __init__(self, role: m.Role = m.Role.VCPU) -> None:
        self.ends = {side: Session(MMU, side) for side in Side}
        self.wires: dict[Side, deque[Envelope]] = {side: deque() for side in Side}
        self.delivered: list[tuple[Side, Envelope]] = []
        self.given: dict[int, bytes] = {}
        self.sent: dict[Side, list[Message]] = {side: [] for side in Side}
        self.taken: dict[Side, list[Message]] = {side: [] for side in Side}
        self.cut = False
        self.speaking = set(
            Side
        )  # who has this connection: a peer that is resuming waits, a service knows the old one
        self.up, self.down = UP[role], DOWN[role]
        vcpu = 0 if role is m.Role.VCPU else None
        self.say(Side.PEER, m.Attach(role, "x", resumable=True))
        self.settle()
        self.say(Side.SERVICE, m.Attached(vcpu, 7, vpid=True, heartbeat=1.0, token=TOKEN))
        self.settle()

    @property
    def peer(self) -> Session:
        return self.ends[Side.PEER]

    @property
    def service(self) -> Session:
        return self.ends[Side.SERVICE]

    def say(self, side: Side, *bodies: Message) -> None:
        """Sends; on a connection that is lost the message is, too."""
        for body in bodies:
            envelope = self.ends[side].send(body)
            if kind_counts(type(body)):
                self.sent[side].append(body)
            if side in self.speaking:
                self.wires[side].append(envelope)
                if side is Side.SERVICE:
                    self.given[envelope.seq] = FROM_MMU.encode(envelope)[1]

    def try_to_say(self, side: Side, make: Make) -> None:
        with contextlib.suppress(LocalProtocolError):  # what is not legal now
            self.say(side, make(self.ends[side], 0))

    def deliver(self, sender: Side) -> None:
        if not self.wires[sender]:
            return
        envelope = self.wires[sender].popleft()
        self.delivered.append((sender, envelope))
        receiver = self.ends[sender.other]
        body = envelope.body
        before = receiver.continuity.received
        acts = receiver.receive(envelope)
        if receiver.continuity.received > before:
            self.taken[sender].append(body)
        if isinstance(body, m.Resume):
            self.speaking.add(Side.SERVICE)
            for said in receiver.resume(body):
                self.given[said.seq] = FROM_MMU.encode(said)[1]
                self.wires[Side.SERVICE].append(said)
        elif isinstance(body, m.Resumed) and acts:
            self.speaking.add(Side.PEER)
            self.wires[Side.PEER].extend(receiver.lacking(body))

    def repeat(self, index: int) -> None:
        """Something that was delivered on this connection comes again: nothing happens, and an answer is given again."""
        if not self.delivered:
            return
        sender, envelope = self.delivered[index % len(self.delivered)]
        if isinstance(envelope.body, m.Attach | m.Resume):
            return  # who opens a connection is not a matter of numbers
        receiver = self.ends[sender.other]
        before = snapshot(receiver)
        if sender is Side.PEER:
            assert receiver.repeated(envelope)
            answer = receiver.answer(envelope.seq)
            if answer is not None:
                self.check_answer(envelope.body, answer)
                self.wires[Side.SERVICE].append(answer)
        assert receiver.receive(envelope) is False
        assert snapshot(receiver) == before

    def check_answer(self, question: Message, answer: Envelope) -> None:
        """It is one that was given on this connection, byte for byte, and to this question."""
        assert FROM_MMU.encode(answer)[1] == self.given[answer.seq]
        match question:
            case m.HostRequest():
                assert isinstance(answer.body, m.HostReply | m.ErrorReply)
                assert answer.body.request == question.request
            case m.Walk():
                assert isinstance(answer.body, m.Walked | m.WalkFault)
                assert answer.body.walk == question.walk
            case m.Load() | m.Locked():
                assert isinstance(answer.body, m.Loaded)
                assert answer.body.entry == question.entry
            case m.Enter():
                assert answer.body == m.Entered(1)
            case m.Exit():
                assert isinstance(answer.body, m.Entered)
                assert answer.body.entry == question.entry + 1
            case _:
                assert isinstance(question, m.Log)
                assert isinstance(answer.body, m.Applied)

    def lose(self) -> None:
        """The connection is lost, with all that is on its way."""
        for wire in self.wires.values():
            wire.clear()
        self.delivered.clear()
        self.given.clear()
        self.cut = True
        self.speaking.clear()

    def resume(self) -> None:
        """The peer has a new connection."""
        if not self.cut:
            return
        self.cut = False
        received = self.peer.continuity.received
        self.wires[Side.PEER].append(self.peer.send(m.Resume(self.peer.token, received)))

    def settle(self) -> None:
        while any(self.wires.values()):
            for side in Side:
                self.deliver(side)

    def compare(self) -> None:
        """After everything has arrived: each message that counts did so once and in order, and both ends agree."""
        for side in Side:
            assert self.taken[side] == self.sent[side]
        here, there = self.peer, self.service
        assert [getattr(here, name) for name in WHERE_IT_WAS] == [
            getattr(there, name) for name in WHERE_IT_WAS
        ]
        assert (here.send_seq, here.receive_seq) == (there.receive_seq, there.send_seq)
        assert here.continuity.sent == there.continuity.received == len(self.sent[Side.PEER])
        assert there.continuity.sent == here.continuity.received == len(self.sent[Side.SERVICE])


def random_steps(random: Random, line: Line, count: int) -> None:
    kinds = ["deliver up", "deliver down", "up", "down", "repeat", "lose", "resume"]
    for _ in range(count):
        match random.choices(kinds, [22, 22, 22, 16, 8, 2, 8])[0]:
            case "deliver up":
                line.deliver(Side.PEER)
            case "deliver down":
                line.deliver(Side.SERVICE)
            case "up":
                line.try_to_say(Side.PEER, random.choice(line.up))
            case "down":
                line.try_to_say(Side.SERVICE, random.choice(line.down))
            case "repeat":
                line.repeat(random.randrange(1000))
            case "lose":
                line.lose()
            case _:
                line.resume()


@pytest.mark.parametrize("role", [m.Role.VCPU, m.Role.HOST])
@pytest.mark.parametrize("seed", range(150))
def test_every_message_arrives_exactly_once_and_in_order(role: m.Role, seed: int) -> None:
    random = Random(seed)
    line = Line(role)
    for _ in range(30):
        random_steps(random, line, 30)
        line.resume()  # before more is lost than is kept
        line.settle()
    line.compare()
    assert len(line.sent[Side.PEER]) + len(line.sent[Side.SERVICE]) > 25


@settings(max_examples=150)
@given(st.data())
def test_a_cut_anywhere_loses_nothing(data: st.DataObject) -> None:
    line = Line(data.draw(st.sampled_from([m.Role.VCPU, m.Role.HOST])))
    actions = st.tuples(st.integers(0, 6), st.integers(0, 99))
    for action, choice in data.draw(st.lists(actions, max_size=50)):
        match action:
            case 0 | 1:
                line.deliver(Side.PEER if action else Side.SERVICE)
            case 2 | 3:
                line.try_to_say(Side.PEER, line.up[choice % len(line.up)])
            case 4:
                line.try_to_say(Side.SERVICE, line.down[choice % len(line.down)])
            case 5:
                line.lose()
            case _:
                line.resume()
    line.lose()
    line.resume()
    line.settle()
    line.compare()


# --- what is done where --------------------------------------------------------------------------------------------


def in_guest() -> Line:
    line = Line()
    line.say(Side.PEER, m.Enter())
    line.settle()
    line.say(Side.SERVICE, m.Entered(1))
    line.settle()
    return line


def test_a_repeated_question_is_answered_again_with_the_same_bytes_and_the_old_number() -> None:
    line = in_guest()
    line.say(Side.PEER, m.Log(1, [ACCESS]), m.Load(1, ACCESS))
    load = line.wires[Side.PEER][-1]
    line.settle()
    assert line.service.repeated(load)
    assert line.service.answer(load.seq) is None  # it is still being asked
    line.say(Side.SERVICE, m.Applied(1), m.Loaded(1, 42))
    loaded = line.wires[Side.SERVICE][-1]
    line.settle()
    assert line.service.receive(load) is False
    assert line.service.answer(load.seq) == loaded
    before = snapshot(line.peer)
    assert line.peer.receive(loaded) is False
    assert snapshot(line.peer) == before


def test_an_answer_is_kept_for_so_many_messages() -> None:
    line = in_guest()
    line.say(Side.PEER, m.Load(1, ACCESS))
    first = line.wires[Side.PEER][-1].seq
    for turn in range(KEPT):
        if turn:
            line.say(Side.PEER, m.Load(1, ACCESS))
        line.settle()
        line.say(Side.SERVICE, m.Loaded(1, turn))
        line.settle()
    assert line.service.answer(first) is not None
    line.say(Side.PEER, m.Load(1, ACCESS))
    line.settle()
    line.say(Side.SERVICE, m.Loaded(1, 0))
    assert line.service.answer(first) is None


def test_numbers_begin_anew_on_a_new_connection_and_counts_do_not() -> None:
    line = in_guest()
    line.lose()
    line.resume()
    line.deliver(Side.PEER)
    (resumed,) = line.wires[Side.SERVICE]
    assert resumed == Envelope(7, 1, m.Resumed(1))
    line.settle()
    assert (line.peer.send_seq, line.peer.receive_seq) == (1, 2)
    assert (line.service.send_seq, line.service.receive_seq) == (2, 1)
    assert line.service.answer(1) is None
    line.say(Side.PEER, m.Walk(1, 1, 0, 0))
    line.settle()
    line.say(Side.SERVICE, m.Walked(1, 1, 1, 1, 0))
    line.settle()
    line.compare()
    assert line.peer.state is State.IN_GUEST


def test_a_peer_that_resumes_takes_nothing_before_resumed_and_keeps_what_it_says() -> None:
    line = in_guest()
    line.lose()
    line.say(Side.SERVICE, m.Kick(1))
    line.resume()
    line.say(Side.PEER, m.Exit(1, m.ExternalInterruptExit()))
    before = snapshot(line.peer)
    assert line.peer.receive(Envelope(7, 3, m.Kick(1))) is False
    assert line.peer.receive(Envelope(7, 1, m.Heartbeat())) is False
    assert line.peer.receive(Envelope(6, 1, m.Resumed(0))) is False
    assert snapshot(line.peer) == before
    line.settle()
    assert not line.peer.resuming
    line.compare()
    assert line.service.state is State.HANDLING


def test_a_detach_that_was_lost_is_said_again() -> None:
    line = in_guest()
    line.say(Side.PEER, m.Exit(1, m.ExternalInterruptExit()), m.Detach())
    line.lose()
    line.resume()
    line.settle()
    assert line.peer.state is line.service.state is State.LEAVING
    line.lose()  # and once more, when the service had it
    line.resume()
    line.settle()
    line.compare()
    assert line.service.state is State.LEAVING


def test_an_incarnation_may_end_while_its_peer_resumes() -> None:
    line = in_guest()
    line.lose()
    line.peer.send(m.Resume(TOKEN, 1))
    assert line.peer.receive(Envelope(7, 0, m.ErrorReply("not-resumable", ""))) is True
    assert line.peer.receive(Envelope(7, 1, m.Ended("given-up")))
    assert line.peer.state is State.ENDED
    line.peer.send(m.Attach(m.Role.VCPU, "x", 0, resumable=True, token=TOKEN))
    assert not line.peer.resuming


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(line: Line, *resumes: Envelope) -> Iterator[ErrorCode]:
    for resume in resumes:
        before = snapshot(line.service)
        with pytest.raises(RemoteProtocolError) as caught:
            line.service.receive(resume)
        assert snapshot(line.service) == before
        yield caught.value.code


@pytest.mark.parametrize("token", [b"", TOKEN[:-1], TOKEN + b"0", b"x" * len(TOKEN)])
def test_a_wrong_token_is_refused(token: bytes) -> None:
    line = in_guest()
    assert list(refused(line, Envelope(7, 0, m.Resume(token, 1)))) == [ErrorCode.NOT_RESUMABLE]


def test_who_asked_for_no_token_cannot_resume() -> None:
    line = in_guest()
    line.service.token = b""
    assert list(refused(line, Envelope(7, 0, m.Resume(b"", 1)))) == [ErrorCode.NOT_RESUMABLE]


def test_a_count_that_cannot_be_is_refused() -> None:
    line = in_guest()
    counts = [2, 3, KEPT, 1 << 63, (1 << 64) - 1]
    codes = list(refused(line, *(Envelope(7, 0, m.Resume(TOKEN, count)) for count in counts)))
    assert codes == [ErrorCode.NOT_RESUMABLE] * len(counts)
    line.lose()
    line.peer.send(m.Resume(TOKEN, 1))
    before = snapshot(line.peer)
    with pytest.raises(RemoteProtocolError, match="not-resumable"):
        line.peer.receive(Envelope(7, 1, m.Resumed(2)))
    assert snapshot(line.peer) == before


def test_a_resume_has_no_number_and_an_incarnation_that_is_under_way() -> None:
    line = in_guest()
    resume = m.Resume(TOKEN, 1)
    codes = list(refused(line, *(Envelope(i, seq, resume) for i, seq in [(7, 1), (7, 3), (6, 0), (0, 0)])))
    stale = ErrorCode.STALE_INCARNATION
    assert codes == [ErrorCode.BAD_ARGUMENT, ErrorCode.BAD_ARGUMENT, stale, stale]
    line.service.send(m.Ended("given-up"))
    assert list(refused(line, Envelope(7, 0, resume))) == [stale]


def test_a_resumed_that_nobody_asked_for_is_refused() -> None:
    line = in_guest()
    with pytest.raises(RemoteProtocolError, match="unexpected-message"):
        line.peer.receive(Envelope(7, line.peer.receive_seq, m.Resumed(1)))
    with pytest.raises(LocalProtocolError, match="unexpected-message"):
        line.service.send(m.Resumed(1))


@pytest.mark.parametrize("more", [0, 1])
def test_so_much_may_be_lost_and_no_more(more: int) -> None:
    line = in_guest()
    line.lose()
    for _ in range(KEPT + more):
        line.say(Side.SERVICE, m.Kick(1))
    line.resume()
    if more:
        with pytest.raises(RemoteProtocolError, match="not-resumable"):
            line.settle()
    else:
        line.settle()
        line.compare()


def test_a_service_that_lacks_more_than_is_kept_is_told_so_by_its_peer() -> None:
    line = in_guest()
    for turn in range(KEPT + 1):
        line.say(Side.PEER, m.Load(1, ACCESS))
        line.settle()
        line.say(Side.SERVICE, m.Loaded(1, turn))
        line.settle()
    line.lose()
    line.peer.send(m.Resume(TOKEN, line.peer.continuity.received))
    with pytest.raises(RemoteProtocolError, match="not-resumable"):
        line.peer.receive(Envelope(7, 1, m.Resumed(1)))
