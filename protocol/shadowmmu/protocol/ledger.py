"""The numbers inside messages: guest entries, walks, requests, credits.

`Ledger` holds what one end of a session knows of them. Two tables, by message type, say what must hold of a message's
numbers (`GUARDS`) and what it changes (`COMMITS`); both ends and both directions use the same ones, since either end
keeps the same books. A guard raises `Refused`, or answers True for a message that the protocol says to ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.states import GUEST_MODE, State

__all__ = ["COMMITS", "EVENT_CREDITS", "GUARDS", "HOST_CREDITS", "Ledger", "Refused", "incarnation_given"]

HOST_CREDITS: Final = 16
"""Most host requests of an agent under way at once."""
EVENT_CREDITS: Final = 16
"""Most event batches that the coordinator has not taken in yet."""


class Refused(Exception):  # noqa: N818 (an outcome: the session makes it an error of the one side or the other)
    """A message that is not legal here."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Ledger:
    """What one end knows of the numbers of a session."""

    __slots__ = (
        "batches",
        "entry",
        "incarnation",
        "logs",
        "next_event",
        "request",
        "requests",
        "role",
        "state",
        "vcpu",
        "walk",
    )

    def __init__(self) -> None:
        self.state = State.DETACHED
        self.reset()

    def reset(self) -> None:
        """What a new incarnation starts with."""
        self.role: m.Role | None = None
        self.incarnation = 0
        self.vcpu: int | None = None
        self.entry = 0
        self.walk = 0
        self.logs = 0
        self.batches = 0
        self.next_event: int | None = None
        self.request = 0
        self.requests: dict[int, int] = {}


def incarnation_given(body: m.Attached | m.Joined) -> int:
    """The incarnation that a welcome gives; a member's number serves as one."""
    return body.incarnation if isinstance(body, m.Attached) else body.member


def _guard_welcome(ledger: Ledger, body: m.Attached | m.Joined, _sending: bool) -> bool:
    if not incarnation_given(body):
        raise Refused(ErrorCode.BAD_ARGUMENT, "incarnations (members) are numbered from 1")
    if isinstance(body, m.Attached) and (body.vcpu is None) == (ledger.role is m.Role.VCPU):
        raise Refused(ErrorCode.BAD_ARGUMENT, "a vCPU, and nobody else, has a vCPU number")
    return False


def _commit_welcome(ledger: Ledger, body: m.Attached | m.Joined, _seq: int) -> None:
    ledger.incarnation = incarnation_given(body)
    if isinstance(body, m.Attached):
        ledger.vcpu = body.vcpu


# --- guest entries ------------------------------------------------------------------------------------------------


def _wrong_entry(ledger: Ledger, entry: int) -> Refused:
    if entry < ledger.entry:
        return Refused(ErrorCode.STALE_ENTRY, f"entry {entry} has ended; the last one is {ledger.entry}")
    return Refused(ErrorCode.UNKNOWN_ENTRY, f"entry {entry} has not begun; the last one is {ledger.entry}")


def _guard_entry(ledger: Ledger, body: m.Load | m.Locked | m.Exit | m.Loaded, _sending: bool) -> bool:
    if body.entry != ledger.entry:
        raise _wrong_entry(ledger, body.entry)
    return False


def _guard_entered(ledger: Ledger, body: m.Entered, _sending: bool) -> bool:
    if body.entry != ledger.entry + 1:
        raise Refused(ErrorCode.UNKNOWN_ENTRY, f"entry {body.entry}; the next is {ledger.entry + 1}")
    return False


def _commit_entered(ledger: Ledger, body: m.Entered, _seq: int) -> None:
    ledger.entry = body.entry


def _guard_kick(ledger: Ledger, body: m.Kick, sending: bool) -> bool:
    """True: a kick of an entry that has ended."""
    if body.entry > ledger.entry or (sending and body.entry != ledger.entry):
        raise _wrong_entry(ledger, body.entry)
    return body.entry != ledger.entry


# --- logs and walks -----------------------------------------------------------------------------------------------


def _guard_log(ledger: Ledger, body: m.Log, _sending: bool) -> bool:
    if body.entry != ledger.entry:
        raise _wrong_entry(ledger, body.entry)
    if ledger.logs >= m.LOG_CREDITS:
        raise Refused(ErrorCode.CREDIT_EXCEEDED, f"{ledger.logs} logs are not applied yet")
    return False


def _commit_log(ledger: Ledger, _body: m.Log, _seq: int) -> None:
    ledger.logs += 1


def _guard_applied(ledger: Ledger, body: m.Applied, _sending: bool) -> bool:
    if not 1 <= body.logs <= ledger.logs:
        raise Refused(ErrorCode.CREDIT_EXCEEDED, f"{body.logs} logs applied of {ledger.logs} under way")
    return False


def _commit_applied(ledger: Ledger, body: m.Applied, _seq: int) -> None:
    ledger.logs -= body.logs


def _guard_walk(ledger: Ledger, body: m.Walk, _sending: bool) -> bool:
    if body.entry != ledger.entry:
        raise _wrong_entry(ledger, body.entry)
    if body.walk != ledger.walk + 1:
        raise Refused(ErrorCode.UNKNOWN_REQUEST, f"walk {body.walk}; the next is {ledger.walk + 1}")
    return False


def _commit_walk(ledger: Ledger, body: m.Walk, _seq: int) -> None:
    ledger.walk = body.walk


def _guard_walked(ledger: Ledger, body: m.Walked | m.WalkFault, _sending: bool) -> bool:
    """True: the answer to an abandoned walk."""
    if body.entry > ledger.entry or body.walk > ledger.walk:
        raise Refused(ErrorCode.UNKNOWN_REQUEST, f"walk {body.walk} of entry {body.entry} was not asked for")
    if body.entry < ledger.entry or ledger.state not in GUEST_MODE:
        return True
    if body.walk != ledger.walk or ledger.state is not State.WAITING_WALK:
        raise Refused(ErrorCode.UNKNOWN_REQUEST, f"walk {body.walk} is not under way")
    return False


# --- host requests ------------------------------------------------------------------------------------------------


def _guard_host_request(ledger: Ledger, body: m.HostRequest, _sending: bool) -> bool:
    if body.request != ledger.request + 1:
        raise Refused(ErrorCode.UNKNOWN_REQUEST, f"request {body.request}; the next is {ledger.request + 1}")
    if len(ledger.requests) >= HOST_CREDITS:
        raise Refused(ErrorCode.CREDIT_EXCEEDED, f"{HOST_CREDITS} requests are under way")
    return False


def _commit_host_request(ledger: Ledger, body: m.HostRequest, seq: int) -> None:
    ledger.request = body.request
    ledger.requests[body.request] = seq


def _guard_host_reply(ledger: Ledger, body: m.HostReply, _sending: bool) -> bool:
    if body.request not in ledger.requests:
        raise Refused(ErrorCode.UNKNOWN_REQUEST, f"request {body.request} is not under way")
    return False


def _commit_host_reply(ledger: Ledger, body: m.HostReply, _seq: int) -> None:
    del ledger.requests[body.request]


def _refused_request(ledger: Ledger, body: m.ErrorReply) -> int | None:
    """The request that an error is about: by its own number or (version 1.0) by its message's."""
    if body.request:
        return body.request if body.request in ledger.requests else None
    return next((request for request, seq in ledger.requests.items() if seq == body.seq), None)


def _guard_error(ledger: Ledger, body: m.ErrorReply, _sending: bool) -> bool:
    if ledger.incarnation and _refused_request(ledger, body) is None:
        raise Refused(
            ErrorCode.UNKNOWN_REQUEST, f"no request with number {body.request or body.seq} is under way"
        )
    return False


def _commit_error(ledger: Ledger, body: m.ErrorReply, _seq: int) -> None:
    request = _refused_request(ledger, body)
    if request is not None:
        del ledger.requests[request]


# --- the event stream ---------------------------------------------------------------------------------------------


def _guard_event_batch(ledger: Ledger, body: m.EventBatch, _sending: bool) -> bool:
    if ledger.batches >= EVENT_CREDITS:
        raise Refused(ErrorCode.CREDIT_EXCEEDED, f"{ledger.batches} event batches are not taken in yet")
    if ledger.next_event is not None and body.first != ledger.next_event:
        raise Refused(ErrorCode.SEQUENCE_GAP, f"event {body.first}; the next is {ledger.next_event}")
    return False


def _commit_event_batch(ledger: Ledger, body: m.EventBatch, _seq: int) -> None:
    ledger.batches += 1
    ledger.next_event = body.first + body.count


def _guard_event_credit(ledger: Ledger, body: m.EventCredit, _sending: bool) -> bool:
    if not 1 <= body.batches <= ledger.batches:
        raise Refused(ErrorCode.CREDIT_EXCEEDED, f"{body.batches} batches taken in of {ledger.batches}")
    return False


def _commit_event_credit(ledger: Ledger, body: m.EventCredit, _seq: int) -> None:
    ledger.batches -= body.batches


GUARDS: Final[Mapping[type, Callable[[Ledger, Any, bool], bool]]] = {
    m.Attached: _guard_welcome,
    m.Joined: _guard_welcome,
    m.Log: _guard_log,
    m.Walk: _guard_walk,
    m.Load: _guard_entry,
    m.Locked: _guard_entry,
    m.Exit: _guard_entry,
    m.Entered: _guard_entered,
    m.Walked: _guard_walked,
    m.WalkFault: _guard_walked,
    m.Loaded: _guard_entry,
    m.Applied: _guard_applied,
    m.Kick: _guard_kick,
    m.HostRequest: _guard_host_request,
    m.HostReply: _guard_host_reply,
    m.ErrorReply: _guard_error,
    m.EventBatch: _guard_event_batch,
    m.EventCredit: _guard_event_credit,
}
"""By message type: what must hold. Called with the ledger, the message and whether we send it."""

COMMITS: Final[Mapping[type, Callable[[Ledger, Any, int], None]]] = {
    m.Attached: _commit_welcome,
    m.Joined: _commit_welcome,
    m.Log: _commit_log,
    m.Walk: _commit_walk,
    m.Entered: _commit_entered,
    m.Applied: _commit_applied,
    m.HostRequest: _commit_host_request,
    m.HostReply: _commit_host_reply,
    m.ErrorReply: _commit_error,
    m.EventBatch: _commit_event_batch,
    m.EventCredit: _commit_event_credit,
}
"""By message type: what changes. Called with the ledger, the message and its sequence number."""
