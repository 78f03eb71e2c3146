"""The session tables and numbers: each state by each message, at both ends."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any, get_args

import pytest

from shadowmmu.protocol import (
    CONVERSATIONS,
    COORDINATOR,
    EVENT_CREDITS,
    HOST_CREDITS,
    LOG_CREDITS,
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
    error_reply,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.continuity import Continuity
from shadowmmu.protocol.states import HOST, MEMBER, MMU_MEMBER, OPENINGS, PROBE, RUN_PROBE, VCPU, Conversation
from tests.protocol.strategies import MESSAGES

S = State
ACCESS = (1, 0x1000, 1, 8, 0)
TOKEN = b"0123456789abcdef"
BODIES: dict[type, Message] = {
    m.Attach: m.Attach(m.Role.VCPU, "x"),
    m.Resume: m.Resume(TOKEN, 0),
    m.Resumed: m.Resumed(0),
    m.Enter: m.Enter(),
    m.Log: m.Log(1, [ACCESS]),
    m.Walk: m.Walk(1, 2, 0x1000, 0),
    m.Load: m.Load(1, ACCESS),
    m.Locked: m.Locked(1, ACCESS, m.LockedOp.XADD),
    m.Exit: m.Exit(1, m.HaltExit()),
    m.Detach: m.Detach(),
    m.HostRequest: m.HostRequest(2, m.ZapAll()),
    m.Attached: m.Attached(0, 7, vpid=True, heartbeat=1.0),
    m.Entered: m.Entered(1),
    m.Walked: m.Walked(1, 1, 1, 1, 0),
    m.WalkFault: m.WalkFault(1, 1, 0),
    m.Loaded: m.Loaded(1, 0),
    m.Applied: m.Applied(1),
    m.Kick: m.Kick(1),
    m.HostReply: m.HostReply(1, 0),
    m.Heartbeat: m.Heartbeat(),
    m.ErrorReply: m.ErrorReply("bad-argument", "", 1),
    m.Ended: m.Ended("finished"),
    m.Join: m.Join(m.Role.MMU, "x"),
    m.Joined: m.Joined(7, m.RunConfig(), "", 1.0),
    m.Ready: m.Ready(),
    m.Start: m.Start(1),
    m.Progress: m.Progress({}),
    m.EventBatch: m.EventBatch(5, 1, b""),
    m.EventCredit: m.EventCredit(1),
    m.VcpuLost: m.VcpuLost(0, ""),
    m.Drain: m.Drain(),
    m.Report: m.Report({}),
    m.Finished: m.Finished(m.Verdict.PASS),
}
ROLES: dict[Conversation, tuple[Service, m.Role]] = {
    conversation: key for key, conversation in reversed(list(OPENINGS.items()))
}


class Pair:
    """Both ends, with nothing in between."""

    def __init__(self, service: Service = MMU) -> None:
        self.peer = Session(service, Side.PEER)
        self.service = Session(service, Side.SERVICE)

    def up(self, *bodies: Message) -> None:
        for body in bodies:
            assert self.service.receive(self.peer.send(body))

    def down(self, *bodies: Message) -> None:
        for body in bodies:
            assert self.peer.receive(self.service.send(body))

    def states(self) -> set[State]:
        return {self.peer.state, self.service.state}

    def end(self, side: Side) -> Session:
        return self.peer if side is Side.PEER else self.service


def opened(conversation: Conversation) -> Pair:
    service, role = ROLES[conversation]
    pair = Pair(service)
    if service is MMU:
        pair.up(m.Attach(role, "x", resumable=True))
        vcpu = 0 if role is m.Role.VCPU else None
        pair.down(m.Attached(vcpu, 7, vpid=True, heartbeat=1.0, token=TOKEN))
    else:
        pair.up(m.Join(role, "x"))
        pair.down(m.Joined(7, m.RunConfig(), "", 1.0))
    return pair


def in_state(conversation: Conversation, state: State) -> Pair:
    """Both ends in that state, with a log, a walk, an event batch and a host request in their past."""
    service, role = ROLES[conversation]
    pair = Pair(service)
    if state is S.DETACHED:
        return pair
    if state is S.ATTACHING:
        pair.up(m.Attach(role, "x") if service is MMU else m.Join(role, "x"))
        return pair
    pair = opened(conversation)
    if state is S.ENDED:
        pair.down(m.Ended("finished"))
    elif conversation is VCPU:
        _drive_vcpu(pair, state)
    elif conversation in (HOST, PROBE):
        if conversation is HOST:
            pair.up(m.HostRequest(1, m.ZapAll()))
        if state is S.LEAVING:
            pair.up(m.Detach())
    elif conversation in (MEMBER, MMU_MEMBER):
        if conversation is MMU_MEMBER:
            pair.up(m.EventBatch(0, 5, b""))
        path = [S.JOINED, S.READY, S.RUNNING, S.DRAINING, S.REPORTED]
        bodies: list[Message] = [m.Ready(), m.Start(1), m.Drain(), m.Report({})]
        for step, body in zip(path[1:], bodies, strict=True):
            if path.index(state) >= path.index(step):
                pair.down(body) if isinstance(body, m.Start | m.Drain) else pair.up(body)
    assert pair.peer.state is pair.service.state is state
    return pair


def _drive_vcpu(pair: Pair, state: State) -> None:
    if state is S.OUTSIDE:
        return
    pair.up(m.Enter())
    pair.down(m.Entered(1))
    pair.up(m.Log(1, [ACCESS]), m.Walk(1, 1, 0x1000, 0))
    if state is S.WAITING_WALK:
        return
    pair.down(m.Walked(1, 1, 1, 1, 0))
    if state is S.WAITING_VALUE:
        pair.up(m.Load(1, ACCESS))
    elif state in (S.HANDLING, S.LEAVING):
        pair.up(m.Exit(1, m.HaltExit()))
        if state is S.LEAVING:
            pair.up(m.Detach())


def snapshot(session: Session) -> dict[str, Any]:
    names = [name for kind in type(session).__mro__ for name in getattr(kind, "__slots__", ())]
    values = {name: getattr(session, name) for name in names}
    values["continuity"] = {name: copy(getattr(session.continuity, name)) for name in Continuity.__slots__}
    return {name: dict(value) if name == "requests" else value for name, value in values.items()}


def names(kinds: Iterable[type]) -> set[str]:
    return {kind.__name__ for kind in kinds}


# What each end may send, and what the other must take besides (crossing), written down by hand: not from the tables.
ALIVE = "Heartbeat"
RESUMABLE = (VCPU, HOST)
UP = {
    VCPU: {
        S.OUTSIDE: "Enter Detach",
        S.HANDLING: "Detach",
        S.IN_GUEST: "Log Walk Load Locked Exit",
        S.WAITING_WALK: "Exit",
        S.WAITING_VALUE: "",
        S.LEAVING: "",
    },
    HOST: {S.SERVING: "HostRequest Detach", S.LEAVING: ""},
    PROBE: {S.SERVING: "Detach", S.LEAVING: ""},
    MMU_MEMBER: {
        S.JOINED: "Ready EventBatch VcpuLost Report",
        S.READY: "EventBatch VcpuLost Report",
        S.RUNNING: "Progress EventBatch VcpuLost Report",
        S.DRAINING: "Progress EventBatch VcpuLost Report",
        S.REPORTED: "",
    },
    MEMBER: {
        S.JOINED: "Ready Report",
        S.READY: "Report",
        S.RUNNING: "Progress Report",
        S.DRAINING: "Progress Report",
        S.REPORTED: "",
    },
    RUN_PROBE: {S.JOINED: ""},
}
UP_CROSSING = {
    VCPU: {S.IN_GUEST: "Detach", S.LEAVING: "Detach"},
    HOST: {S.LEAVING: "Detach"},
    MMU_MEMBER: {S.DRAINING: "Ready"},
    MEMBER: {S.DRAINING: "Ready"},
}
LATE = "Walked WalkFault"
DOWN = {
    VCPU: {
        S.ATTACHING: "Attached ErrorReply",
        S.OUTSIDE: "",
        S.HANDLING: f"Entered Applied {LATE}",
        S.IN_GUEST: f"Applied Kick {LATE}",
        S.WAITING_WALK: "Applied Kick Walked WalkFault",
        S.WAITING_VALUE: f"Applied Kick Loaded {LATE}",
        S.LEAVING: f"Applied {LATE}",
    },
    HOST: {
        S.ATTACHING: "Attached ErrorReply",
        S.SERVING: "HostReply ErrorReply",
        S.LEAVING: "HostReply ErrorReply",
    },
    PROBE: {S.ATTACHING: "Attached ErrorReply", S.SERVING: "", S.LEAVING: ""},
    MMU_MEMBER: {
        S.ATTACHING: "Joined ErrorReply",
        S.JOINED: "Drain EventCredit Finished",
        S.READY: "Start Drain EventCredit Finished",
        S.RUNNING: "Drain EventCredit Finished",
        S.DRAINING: "EventCredit Finished",
        S.REPORTED: "EventCredit Finished",
    },
    MEMBER: {
        S.ATTACHING: "Joined ErrorReply",
        S.JOINED: "Drain Finished",
        S.READY: "Start Drain Finished",
        S.RUNNING: "Drain Finished",
        S.DRAINING: "Finished",
        S.REPORTED: "Finished",
    },
    RUN_PROBE: {S.ATTACHING: "Joined ErrorReply", S.JOINED: "Finished"},
}
DOWN_CROSSING = {
    VCPU: {S.HANDLING: "Kick", S.LEAVING: "Kick Entered"},
    MMU_MEMBER: {S.REPORTED: "Start Drain"},
    MEMBER: {S.REPORTED: "Start Drain"},
}
CASES = [(conversation, state) for conversation in CONVERSATIONS for state in conversation.states]
IDS = [f"{conversation.name}-{state.value}" for conversation, state in CASES]
DEAD = (S.DETACHED, S.ENDED)


def expected(table: dict[Any, dict[State, str]], conversation: Conversation, state: State) -> set[str]:
    return set(table.get(conversation, {}).get(state, "").split())


@pytest.mark.parametrize("conversation, state", CASES, ids=IDS)
def test_tables_are_what_the_specification_says(conversation: Conversation, state: State) -> None:
    alive = {ALIVE} if state not in (*DEAD, S.ATTACHING) else set()
    up = expected(UP, conversation, state) | alive
    if state in DEAD:
        up |= {"Attach"} if ROLES[conversation][0] is MMU else {"Join"}
    down = expected(DOWN, conversation, state) | alive
    if conversation in RESUMABLE and alive:
        up |= {"Resume"}
        down |= {"Resumed"}
    down |= {"Ended"} if state not in DEAD else set()
    assert names(conversation.sends(Side.PEER)[state]) == up
    assert names(conversation.sends(Side.SERVICE)[state]) == down
    assert names(conversation.receives(Side.SERVICE)[state]) == up | expected(
        UP_CROSSING, conversation, state
    )
    assert names(conversation.receives(Side.PEER)[state]) == down | expected(
        DOWN_CROSSING, conversation, state
    )


def test_all_messages_and_states_are_in_some_conversation() -> None:
    assert {rule.message for conversation in CONVERSATIONS for rule in conversation.rules} == set(MESSAGES)
    assert {state for conversation in CONVERSATIONS for state in conversation.states} == set(State)
    for conversation in CONVERSATIONS:
        service = ROLES[conversation][0]
        up = set(get_args(m.VcpuMessage if service is MMU else m.MemberMessage))
        down = set(get_args(m.MmuMessage if service is MMU else m.CoordinatorMessage))
        for rule in conversation.rules:
            assert rule.message in (up if rule.sender is Side.PEER else down)


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("conversation, state", CASES, ids=IDS)
def test_every_message_in_every_state(conversation: Conversation, state: State, kind: type[Message]) -> None:
    for side in Side:
        _receive_case(conversation, state, kind, side)
        _send_case(conversation, state, kind, side)


def _receive_case(conversation: Conversation, state: State, kind: type[Message], side: Side) -> None:
    pair = in_state(conversation, state)
    session = pair.end(side)
    opener = kind in (m.Attach, m.Join)
    if state is S.ATTACHING and side is Side.PEER:
        incarnation, seq = (0, 0) if kind in (m.ErrorReply, m.Ended) else (7, 1)
    else:
        incarnation, seq = (0, 0) if opener else (session.incarnation, session.receive_seq)
    if kind is m.Resume and side is Side.SERVICE:
        seq = 0
    envelope = Envelope(incarnation, seq, _body(kind, conversation, state))
    before = snapshot(session)
    legal = (
        kind in conversation.receives(side)[state] and kind is not m.Resumed
    )  # that is answered, see below
    if state is S.ATTACHING and side is Side.PEER and kind is m.ErrorReply:
        legal = True
    if legal:
        to = conversation.receives(side)[state][kind].to
        ignored = conversation.receives(side)[state][kind].ignored or _is_late(kind, state)
        assert session.check(envelope) is not ignored
        assert snapshot(session) == before
        assert session.receive(envelope) is not ignored
        assert session.state is (state if _is_late(kind, state) else to)
        assert session.receive_seq == (1 if opener else before["receive_seq"] + bool(seq))
        return
    if state is S.ATTACHING and side is Side.PEER and kind not in (m.Attach, m.Join, m.Attached, m.Joined):
        assert session.receive(envelope) is False  # of an incarnation before
        assert snapshot(session) == before
        return
    if opener and state is S.ATTACHING and side is Side.SERVICE:
        assert session.receive(envelope) is False  # it came twice
        assert snapshot(session) == before
        return
    with pytest.raises(RemoteProtocolError) as caught:
        session.receive(envelope)
    assert snapshot(session) == before
    error = caught.value
    assert (error.incarnation, error.seq) == (envelope.incarnation, envelope.seq)
    if opener and side is Side.SERVICE and state not in DEAD and kind is _opener(conversation):
        assert error.code == ErrorCode.ALREADY_ATTACHED
    elif opener:
        assert error.code == ErrorCode.UNEXPECTED_MESSAGE
    elif kind is m.Resume and side is Side.SERVICE:
        probe = conversation is PROBE and state is not S.ATTACHING
        living = ErrorCode.UNEXPECTED_MESSAGE if probe else ErrorCode.NOT_RESUMABLE
        assert error.code == (ErrorCode.STALE_INCARNATION if state in DEAD else living)
    elif state is S.DETACHED or (state is S.ATTACHING and side is Side.SERVICE):
        assert error.code == ErrorCode.NOT_ATTACHED
    elif state is S.ENDED:
        assert error.code == ErrorCode.STALE_INCARNATION
    else:
        assert error.code in (ErrorCode.UNEXPECTED_MESSAGE, ErrorCode.NOT_ATTACHED)


def _send_case(conversation: Conversation, state: State, kind: type[Message], side: Side) -> None:
    pair = in_state(conversation, state)
    session = pair.end(side)
    before = snapshot(session)
    body = _body(kind, conversation, state)
    legal = kind in conversation.sends(side)[state] and kind is not m.Resumed
    if legal:
        preview = session.preview(body)
        assert snapshot(session) == before
        envelope = session.send(body)
        assert preview == envelope
        assert session.state is (state if _is_late(kind, state) else conversation.sends(side)[state][kind].to)
        if envelope.seq:
            assert session.send_seq == envelope.seq + 1
        assert isinstance(pair.end(side.other).receive(envelope), bool)
        assert pair.peer.state is pair.service.state
    else:
        with pytest.raises(LocalProtocolError):
            session.send(body)
        assert snapshot(session) == before


def _body(kind: type[Message], conversation: Conversation, state: State) -> Message:
    service, role = ROLES[conversation]
    if kind is m.Attach:
        return m.Attach(role, "x")
    if kind is m.Join:
        return m.Join(role, "x")
    if kind is m.Attached and role is not m.Role.VCPU:
        return m.Attached(None, 7, vpid=True, heartbeat=1.0)
    if kind is m.Entered and state in (S.HANDLING, S.LEAVING):
        return m.Entered(2)
    if kind in (m.Walked, m.WalkFault) and state in (S.IN_GUEST, S.WAITING_VALUE):
        # An answer to a walk of an entry that has ended: these paths have had one entry only, so 0 stands for it.
        return m.Walked(0, 1, 1, 1, 0) if kind is m.Walked else m.WalkFault(0, 1, 0)
    if kind is m.ErrorReply and conversation is HOST and state is not S.ATTACHING:
        return m.ErrorReply("bad-argument", "", 1)
    assert service in (MMU, COORDINATOR)
    return BODIES[kind]


def _opener(conversation: Conversation) -> type:
    return m.Attach if ROLES[conversation][0] is MMU else m.Join


def _is_late(kind: type, state: State) -> bool:
    return kind in (m.Walked, m.WalkFault) and state is not S.WAITING_WALK


# --- numbers ------------------------------------------------------------------------------------------------------


def refuse(session: Session, envelope: Envelope) -> RemoteProtocolError:
    before = snapshot(session)
    with pytest.raises(RemoteProtocolError) as checked:
        session.check(envelope)
    with pytest.raises(RemoteProtocolError) as received:
        session.receive(envelope)
    assert snapshot(session) == before
    assert str(checked.value) == str(received.value)
    return received.value


def test_numbers_of_both_directions() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    assert [pair.service.send(m.Kick(1)).seq for _ in range(3)] == [4, 5, 6]
    envelope = pair.peer.send(m.Log(1, [ACCESS]))
    assert (envelope.incarnation, envelope.seq) == (7, 4)
    before = snapshot(pair.service)
    assert pair.service.receive(Envelope(7, 3, envelope.body)) is False  # a repetition, whatever it is
    assert snapshot(pair.service) == before
    assert refuse(pair.service, Envelope(7, 0, envelope.body)).code == ErrorCode.BAD_ARGUMENT
    gap = refuse(pair.service, Envelope(7, 5, envelope.body))
    assert gap.code == ErrorCode.SEQUENCE_GAP and gap.info.ends
    assert refuse(pair.service, Envelope(6, 4, envelope.body)).code == ErrorCode.STALE_INCARNATION
    assert refuse(pair.service, Envelope(8, 4, envelope.body)).code == ErrorCode.STALE_INCARNATION
    assert refuse(pair.service, Envelope(0, 0, envelope.body)).code == ErrorCode.STALE_INCARNATION
    assert not pair.service.repeated(envelope)
    assert pair.service.receive(envelope)
    assert pair.service.repeated(envelope)
    assert pair.service.receive(envelope) is False
    # An answer behind a missing log is never accepted.
    pair.peer.send(m.Log(1, [ACCESS]))
    assert refuse(pair.service, pair.peer.send(m.Exit(1, m.HaltExit()))).code == ErrorCode.SEQUENCE_GAP


def test_a_refused_message_does_not_use_its_number() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    assert refuse(pair.service, Envelope(7, 4, m.Exit(2, m.HaltExit()))).code == ErrorCode.UNKNOWN_ENTRY
    pair.up(m.Exit(1, m.HaltExit()))


def test_entries() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    pair.up(m.Exit(1, m.HaltExit()))
    pair.down(m.Entered(2))
    seq = pair.service.receive_seq
    ended: list[Message] = [
        m.Log(1, [ACCESS]),
        m.Walk(1, 2, 0, 0),
        m.Load(1, ACCESS),
        m.Exit(1, m.HaltExit()),
    ]
    for body in ended:
        assert refuse(pair.service, Envelope(7, seq, body)).code == ErrorCode.STALE_ENTRY
        with pytest.raises(LocalProtocolError, match="stale-entry"):
            pair.peer.send(body)
    not_begun: list[Message] = [m.Log(3, [ACCESS]), m.Walk(3, 2, 0, 0), m.Locked(3, ACCESS, m.LockedOp.XCHG)]
    for body in not_begun:
        assert refuse(pair.service, Envelope(7, seq, body)).code == ErrorCode.UNKNOWN_ENTRY
    for kick in (1, 3):
        with pytest.raises(LocalProtocolError):
            pair.service.send(m.Kick(kick))
    down = pair.peer.receive_seq
    assert pair.peer.receive(Envelope(7, down, m.Kick(1))) is False
    assert pair.peer.receive(Envelope(7, down + 1, m.Kick(2))) is True
    assert refuse(pair.peer, Envelope(7, down + 2, m.Kick(3))).code == ErrorCode.UNKNOWN_ENTRY
    pair.up(m.Exit(2, m.HaltExit()))
    for entry in (2, 4):
        with pytest.raises(LocalProtocolError):
            pair.service.send(m.Entered(entry))


def test_walks() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    seq = pair.service.receive_seq
    for walk in (0, 1, 3):
        assert refuse(pair.service, Envelope(7, seq, m.Walk(1, walk, 0, 0))).code == ErrorCode.UNKNOWN_REQUEST
    pair.up(m.Walk(1, 2, 0, 0))
    for entry, walk in ((1, 1), (1, 3), (2, 2)):
        with pytest.raises(LocalProtocolError):
            pair.service.send(m.Walked(entry, walk, 1, 1, 0))
    # The kick's answer abandons the walk; its answer comes in the next entry, in which another walk is under way.
    pair.up(m.Exit(1, m.ExternalInterruptExit()))
    pair.down(m.Entered(2))
    pair.up(m.Walk(2, 3, 0, 0))
    late = pair.service.send(m.Walked(1, 2, 1, 1, 0))
    assert pair.peer.receive(late) is False
    assert pair.states() == {S.WAITING_WALK}
    pair.down(m.WalkFault(2, 3, 0))
    assert pair.states() == {S.IN_GUEST}
    down = pair.peer.receive_seq
    assert refuse(pair.peer, Envelope(7, down, m.WalkFault(2, 3, 0))).code == ErrorCode.UNKNOWN_REQUEST


def test_log_credits() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    assert pair.peer.logs == 1
    while pair.peer.log_credits:
        pair.up(m.Log(1, [ACCESS]))
    assert pair.service.logs == LOG_CREDITS
    with pytest.raises(LocalProtocolError, match="credit-exceeded"):
        pair.peer.send(m.Log(1, [ACCESS]))
    envelope = Envelope(7, pair.service.receive_seq, m.Log(1, [ACCESS]))
    assert refuse(pair.service, envelope).code == ErrorCode.CREDIT_EXCEEDED
    for count in (0, LOG_CREDITS + 1):
        with pytest.raises(LocalProtocolError):
            pair.service.send(m.Applied(count))
    pair.down(m.Applied(LOG_CREDITS - 1))
    assert pair.peer.log_credits == pair.service.log_credits == LOG_CREDITS - 1
    down = pair.peer.receive_seq
    assert refuse(pair.peer, Envelope(7, down, m.Applied(2))).code == ErrorCode.CREDIT_EXCEEDED


def test_host_requests() -> None:
    pair = opened(HOST)
    for number in range(1, HOST_CREDITS + 1):
        pair.up(m.HostRequest(number, m.ZapAll()))
    with pytest.raises(LocalProtocolError, match="credit-exceeded"):
        pair.peer.send(m.HostRequest(HOST_CREDITS + 1, m.ZapAll()))
    pair.down(m.HostReply(5, 0), m.HostReply(2, 0))
    with pytest.raises(LocalProtocolError, match="unknown-request"):
        pair.service.send(m.HostReply(2, 0))
    assert pair.service.requests[9] == 9
    pair.down(m.ErrorReply("bad-argument", "", 9))
    assert pair.peer.requests == pair.service.requests
    assert 9 not in pair.peer.requests
    with pytest.raises(LocalProtocolError, match="unknown-request"):
        pair.service.send(m.ErrorReply("bad-argument", "", 9))
    pair.down(m.ErrorReply("bad-argument", "", request=10))
    assert pair.peer.requests == pair.service.requests
    assert 10 not in pair.peer.requests
    with pytest.raises(LocalProtocolError, match="unknown-request"):
        pair.service.send(m.ErrorReply("bad-argument", "", 11, request=10))
    seq = pair.service.receive_seq
    skipping = Envelope(7, seq, m.HostRequest(HOST_CREDITS + 2, m.ZapAll()))
    assert refuse(pair.service, skipping).code == ErrorCode.UNKNOWN_REQUEST
    pair.up(m.Detach())
    pair.down(m.HostReply(1, 0), m.Ended("detached"))


def test_event_batches() -> None:
    pair = opened(MMU_MEMBER)
    pair.up(m.EventBatch(100, 10, b""))
    with pytest.raises(LocalProtocolError, match="sequence-gap"):
        pair.peer.send(m.EventBatch(111, 1, b""))
    for i in range(EVENT_CREDITS - 1):
        pair.up(m.EventBatch(110 + i, 1, b""))
    assert pair.service.batches == EVENT_CREDITS
    with pytest.raises(LocalProtocolError, match="credit-exceeded"):
        pair.peer.send(m.EventBatch(109 + EVENT_CREDITS, 1, b""))
    pair.down(m.EventCredit(EVENT_CREDITS))
    assert pair.peer.event_credits == pair.service.event_credits == EVENT_CREDITS
    with pytest.raises(LocalProtocolError, match="credit-exceeded"):
        pair.service.send(m.EventCredit(1))


# --- opening and ending -------------------------------------------------------------------------------------------


def test_roles_open_conversations() -> None:
    for (service, role), conversation in OPENINGS.items():
        pair = Pair(service)
        pair.up(m.Attach(role, "x") if service is MMU else m.Join(role, "x"))
        assert pair.peer.conversation is pair.service.conversation is conversation
        assert not pair.peer.attached
    pair = Pair(MMU)
    wrong = Envelope(0, 0, m.Attach(m.Role.MMU, "x"))
    assert refuse(pair.service, wrong).code == ErrorCode.BAD_ARGUMENT
    with pytest.raises(LocalProtocolError):
        pair.peer.send(wrong.body)


@pytest.mark.parametrize("incarnation, seq", [(0, 1), (1, 0), (7, 3)])
def test_openers_are_unnumbered(incarnation: int, seq: int) -> None:
    envelope = Envelope(incarnation, seq, m.Attach(m.Role.VCPU, "x"))
    assert refuse(Session(MMU, Side.SERVICE), envelope).code == ErrorCode.BAD_ARGUMENT


def test_openers_go_one_way() -> None:
    with pytest.raises(LocalProtocolError, match="by a service"):
        Session(MMU, Side.SERVICE).send(m.Attach(m.Role.VCPU, "x"))
    with pytest.raises(LocalProtocolError, match="not for this service"):
        Session(COORDINATOR, Side.PEER).send(m.Attach(m.Role.VCPU, "x"))


def test_a_refused_attach_and_another_try() -> None:
    pair = Pair()
    pair.up(m.Attach(m.Role.VCPU, "x", 3))
    refusal = pair.service.send(m.ErrorReply("vcpu-taken", "", 0))
    assert (refusal.incarnation, refusal.seq) == (0, 0)
    assert pair.peer.receive(refusal)
    assert pair.peer.state is pair.service.state is S.DETACHED
    pair.up(m.Attach(m.Role.VCPU, "x"))
    pair.down(m.Attached(2, 1, vpid=False, heartbeat=1.0))
    assert pair.peer.vcpu == 2
    assert pair.peer.attached and pair.service.attached


def test_an_attach_that_is_answered_by_the_end() -> None:
    pair = Pair()
    pair.up(m.Attach(m.Role.VCPU, "x"))
    pair.down(m.Ended("run-finished"))
    assert pair.peer.state is pair.service.state is S.ENDED


@pytest.mark.parametrize(
    "body",
    [
        m.Attached(0, 0, vpid=True, heartbeat=1.0),
        m.Attached(None, 1, vpid=True, heartbeat=1.0),
    ],
)
def test_bad_welcomes(body: m.Attached) -> None:
    pair = Pair()
    pair.up(m.Attach(m.Role.VCPU, "x"))
    with pytest.raises(LocalProtocolError):
        pair.service.send(body)
    assert refuse(pair.peer, Envelope(body.incarnation, 1, body)).code in (
        ErrorCode.BAD_ARGUMENT,
        ErrorCode.UNEXPECTED_MESSAGE,
    )


def test_a_welcome_begins_incarnation_and_numbers() -> None:
    pair = Pair()
    pair.up(m.Attach(m.Role.VCPU, "x"))
    body = m.Attached(0, 5, vpid=True, heartbeat=1.0)
    assert refuse(pair.peer, Envelope(5, 2, body)).code == ErrorCode.BAD_ARGUMENT
    assert refuse(pair.peer, Envelope(4, 1, body)).code == ErrorCode.BAD_ARGUMENT
    assert pair.peer.receive(Envelope(5, 1, body))


def test_a_new_incarnation() -> None:
    pair = in_state(VCPU, S.WAITING_WALK)
    late = pair.service.send(m.Kick(1))
    old = pair.peer.send(m.Exit(1, m.HaltExit()))
    ended = pair.service.send(m.Ended("given-up"))
    assert pair.service.state is S.ENDED
    assert refuse(pair.service, old).code == ErrorCode.STALE_INCARNATION
    assert pair.peer.receive(late) is False
    assert pair.peer.receive(ended)
    attach = pair.peer.send(m.Attach(m.Role.VCPU, "x", 0))
    assert pair.peer.receive(ended) is False  # a remainder, whatever it is
    assert (
        pair.peer.receive(error_reply(RemoteProtocolError(ErrorCode.DUPLICATE, "", incarnation=7))) is False
    )
    pair.service.receive(attach)
    assert refuse(pair.service, old).code == ErrorCode.STALE_INCARNATION
    pair.down(m.Attached(0, 8, vpid=True, heartbeat=1.0))
    assert refuse(pair.service, old).code == ErrorCode.STALE_INCARNATION
    assert pair.peer.receive(late) is False
    assert (pair.peer.entry, pair.peer.walk, pair.peer.logs) == (0, 0, 0)
    pair.up(m.Enter())
    pair.down(m.Entered(1))


def test_error_replies_about_messages_that_were_not_accepted() -> None:
    pair = in_state(VCPU, S.IN_GUEST)
    error = refuse(pair.service, Envelope(7, 9, m.Enter()))
    reply = error_reply(error)
    assert (reply.incarnation, reply.seq) == (7, 0)
    assert reply.body == m.ErrorReply("sequence-gap", error.text, 9)
    before = snapshot(pair.peer)
    assert pair.peer.receive(reply) is True
    assert pair.peer.receive(error_reply(RemoteProtocolError(ErrorCode.MALFORMED, "x" * 5000))) is True
    assert (
        pair.peer.receive(error_reply(RemoteProtocolError(ErrorCode.MALFORMED, "", incarnation=3))) is False
    )
    assert snapshot(pair.peer) == before


def test_repr() -> None:
    assert repr(in_state(VCPU, S.IN_GUEST).peer) == "<Session vcpu peer in-guest incarnation 7>"
    assert repr(Session(COORDINATOR, Side.SERVICE)) == "<Session coordinator service detached incarnation 0>"
