"""One end of one conversation: checks and numbers every message in both directions.

Both ends use the same class, `Session(service, side)`; so there is one place that says what is legal when. It
checks the order (the tables of `states`), the incarnation, the sequence numbers, and the numbers inside messages
(`ledger`: guest entries, walks, requests, credits). It holds no messages and does no I/O. A refused message changes
nothing:

- `receive(envelope)` takes a peer's message, or raises RemoteProtocolError. It returns whether the message is to be
  acted on: False for those that the protocol says to ignore (a kick of an entry that has ended, the answer to an
  abandoned walk, remains of an earlier incarnation).
- `check(envelope)` is the same without taking it: for a service that wants to check contents in between.
- `send(body)` numbers a message of ours, or raises LocalProtocolError.
- `repeated(envelope)`: whether a message was taken before; `answer(seq)` is then what a service says again.

After the loss of a connection the peer sends Resume on a new one, the service answers Resumed (`resume`), and both
send again what the other lacks (`resume`, `lacking`): see `continuity`. Until then the peer's session is `resuming`:
it takes nothing else, and what it sends is only kept.

The session opens with Attach (or Join); the role in it selects the conversation. It ends by sending or receiving
Ended (or Finished); the same object may then be used for the next Attach. A sequence gap raises an error whose
registry entry says `ends`; ending the session is then the caller's: `send(Ended(...))`.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Final

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.continuity import Continuity
from shadowmmu.protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from shadowmmu.protocol.ledger import (
    COMMITS,
    EVENT_CREDITS,
    GUARDS,
    HOST_CREDITS,
    Ledger,
    Refused,
    incarnation_given,
)
from shadowmmu.protocol.states import GUEST_MODE, OPENINGS, Conversation, Service, Side, State, Step

__all__ = ["EVENT_CREDITS", "HOST_CREDITS", "Session"]

_Table = Mapping[State, Mapping[type, Step]]
_NO_TABLE: Final[_Table] = {state: {} for state in State}
_UNATTACHED: Final = frozenset({State.DETACHED, State.ENDED})
_OPENERS: Final[Mapping[Service, type]] = {Service.MMU: m.Attach, Service.COORDINATOR: m.Join}

_OWN: Final = ("continuity", "receive_seq", "resuming", "send_seq", "service", "side", "token")
_CHOSEN: Final = ("_receives", "_sends", "conversation")


class Session(Ledger):
    """One end (`side`) of a conversation with `service`.

    Attributes, to be read only: `state`; `conversation` and `role` (None before Attach or Join); `incarnation` (0
    before Attached; of a member of a run, its member number); `vcpu`; `entry`, the number of the last guest entry that
    this end has seen; `walk`, of the last walk; `logs`, the Log messages not applied yet, as far as this end knows;
    `batches`, likewise of event batches; `requests`, the host requests under way with their sequence numbers;
    `receive_seq` and `send_seq`, the next sequence numbers of the two directions; `token`, of Attached; `resuming`.
    """

    __slots__ = (*_OWN, *_CHOSEN)

    def __init__(self, service: Service, side: Side) -> None:
        self.service = service
        self.side = side
        super().__init__()

    def __getstate__(self) -> dict[str, object]:
        """For a copy (pickle): everything but the tables, which the role selects."""
        return {name: getattr(self, name) for name in (*Ledger.__slots__, *_OWN)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._select(None if self.role is None else OPENINGS[self.service, self.role])

    def _select(self, conversation: Conversation | None) -> None:
        self.conversation = conversation
        self._sends: _Table = _NO_TABLE if conversation is None else conversation.sends(self.side)
        self._receives: _Table = _NO_TABLE if conversation is None else conversation.receives(self.side)

    def reset(self) -> None:
        super().reset()
        self._select(None)
        self.receive_seq = 1
        self.send_seq = 1
        self.token = b""
        self.resuming = False
        self.continuity = Continuity()

    def __repr__(self) -> str:
        name = self.conversation.name if self.conversation else self.service.value
        return f"<Session {name} {self.side.value} {self.state.value} incarnation {self.incarnation}>"

    @property
    def attached(self) -> bool:
        """Whether an incarnation is under way."""
        return self.incarnation != 0 and self.state is not State.ENDED

    @property
    def in_guest(self) -> bool:
        """Whether the vCPU is in guest mode, as this end sees it."""
        return self.state in GUEST_MODE

    @property
    def log_credits(self) -> int:
        """How many more Log messages may be sent before the next Applied."""
        return m.LOG_CREDITS - self.logs

    @property
    def event_credits(self) -> int:
        """How many more event batches may be sent before the next EventCredit."""
        return EVENT_CREDITS - self.batches

    @property
    def host_credits(self) -> int:
        """How many more host requests may be sent before the next reply."""
        return HOST_CREDITS - len(self.requests)

    # --- receiving ------------------------------------------------------------------------------------------------

    def check(self, envelope: m.Envelope) -> bool:
        """What `receive` would return or raise; changes nothing."""
        return self._judge(envelope)[1]

    def receive(self, envelope: m.Envelope) -> bool:
        """Take a message of the other end. Returns whether it is to be acted on; raises RemoteProtocolError."""
        state, act = self._judge(envelope)
        if state is None:
            return act
        body = envelope.body
        if isinstance(body, m.Attach | m.Join):
            self._begin(body)
        elif isinstance(body, m.Resumed):
            self._renumber()
            self.receive_seq = 2
            self.resuming = False
        elif envelope.seq:
            self.receive_seq = envelope.seq + 1
            commit = COMMITS.get(type(body))
            if commit is not None:
                commit(self, body, envelope.seq)
            self.continuity.took(body, envelope.seq)
            if isinstance(body, m.Attached):
                self.token = body.token
        self.state = state
        return act

    def _judge(self, envelope: m.Envelope) -> tuple[State | None, bool]:
        """The next state (None: nothing at all changes) and whether to act; raises RemoteProtocolError."""
        try:
            if (
                envelope.incarnation != self.incarnation
                or envelope.seq != self.receive_seq
                or not self.incarnation
                or self.resuming
                or self.state is State.ENDED
                or (isinstance(envelope.body, m.Resume) and self.side is Side.SERVICE)
            ):
                exceptional = self._judge_numbers(envelope)
                if exceptional is not None:
                    return exceptional
            body = envelope.body
            kind = type(body)
            step = self._receives[self.state].get(kind)
            if step is None or kind is m.Resumed:  # the latter is for a session that is resuming, and above
                raise self._out_of_order(envelope)
            guard = GUARDS.get(kind)
            if guard is not None and guard(self, body, False):
                return self.state, False
            return step.to, not step.ignored
        except Refused as refused:
            raise RemoteProtocolError(
                refused.code, refused.text, incarnation=envelope.incarnation, seq=envelope.seq
            ) from None

    def _out_of_order(self, envelope: m.Envelope) -> Refused:
        if self.state is State.ENDED:
            return Refused(ErrorCode.STALE_INCARNATION, f"incarnation {envelope.incarnation} has ended")
        return Refused(
            ErrorCode.UNEXPECTED_MESSAGE, f"{type(envelope.body).__name__} in state {self.state.value}"
        )

    def _judge_numbers(self, envelope: m.Envelope) -> tuple[State | None, bool] | None:
        """Messages that are not simply the next of this incarnation. None: the tables have the last word."""
        body = envelope.body
        if isinstance(body, m.Attach | m.Join):
            return self._judge_opener(envelope, body)
        if isinstance(body, m.Resume) and self.side is Side.SERVICE:
            return self._judge_resume(envelope, body)
        if self.side is Side.PEER:
            if self.resuming:
                return self._judge_while_resuming(envelope)
            if isinstance(body, m.ErrorReply) and not envelope.seq:
                return self._judge_unnumbered_error(envelope)
            if self.state is State.ATTACHING:
                if isinstance(body, m.Attached | m.Joined):
                    if envelope.seq != 1 or envelope.incarnation != incarnation_given(body):
                        raise Refused(ErrorCode.BAD_ARGUMENT, "a welcome begins incarnation and numbers")
                    return None
                if isinstance(body, m.Ended) and not envelope.incarnation and not envelope.seq:
                    return State.ENDED, True
            if envelope.incarnation not in (0, self.incarnation):
                return None, False  # of an earlier incarnation; sent before our Attach arrived
        if not self.incarnation and (not envelope.incarnation or self.state is State.DETACHED):
            raise Refused(ErrorCode.NOT_ATTACHED, f"{type(body).__name__} without a session")
        if envelope.incarnation != self.incarnation:
            raise Refused(
                ErrorCode.STALE_INCARNATION,
                f"incarnation {envelope.incarnation}; this one is {self.incarnation or 'yet to be given'}",
            )
        if self.state is State.ENDED:
            raise self._out_of_order(envelope)
        if not envelope.seq:
            raise Refused(ErrorCode.BAD_ARGUMENT, f"{type(body).__name__} without a number")
        if envelope.seq < self.receive_seq:
            return None, False
        raise Refused(ErrorCode.SEQUENCE_GAP, f"number {envelope.seq}; number {self.receive_seq} is missing")

    def _judge_opener(self, envelope: m.Envelope, body: m.Attach | m.Join) -> tuple[State | None, bool]:
        if self.side is Side.PEER:
            raise Refused(ErrorCode.UNEXPECTED_MESSAGE, f"{type(body).__name__} from a service")
        if self.state is State.ATTACHING:
            return None, False  # it came twice, and the first is not answered yet
        self._check_opener(body)
        if envelope.incarnation or envelope.seq:
            raise Refused(ErrorCode.BAD_ARGUMENT, "incarnation and number are 0 before a session")
        return State.ATTACHING, True

    def _judge_unnumbered_error(self, envelope: m.Envelope) -> tuple[State | None, bool]:
        """A message of ours was not accepted."""
        if self.state is State.ATTACHING:
            return (None, False) if envelope.incarnation else (State.DETACHED, True)
        return None, envelope.incarnation in (0, self.incarnation)

    # --- repetitions and new connections --------------------------------------------------------------------------

    def repeated(self, envelope: m.Envelope) -> bool:
        """Whether a message with this number was taken before, on this connection."""
        return envelope.incarnation == self.incarnation and 0 < envelope.seq < self.receive_seq

    def answer(self, seq: int) -> m.Envelope | None:
        """What a service answered to message `seq` of this connection, to be sent again as it is; None if it has not
        yet, or if that is too long ago.
        """
        return self.continuity.answer(seq)

    def resume(self, body: m.Resume) -> list[m.Envelope]:
        """A service that has received Resume goes on: Resumed, and what the peer lacks."""
        lacking = self.continuity.lacking(body.received)
        self._renumber()
        self.receive_seq = 1
        bodies = [m.Resumed(self.continuity.received), *lacking]
        self.send_seq = len(bodies) + 1
        return [m.Envelope(self.incarnation, number, each) for number, each in enumerate(bodies, start=1)]

    def lacking(self, body: m.Resumed) -> list[m.Envelope]:
        """What a peer that has received Resumed has to send again."""
        bodies = self.continuity.lacking(body.received)
        if self.state is State.LEAVING:
            bodies.append(m.Detach())
        self.send_seq = len(bodies) + 1
        for number, each in enumerate(bodies, start=1):
            if isinstance(each, m.HostRequest):
                self.requests[each.request] = number
        return [m.Envelope(self.incarnation, number, each) for number, each in enumerate(bodies, start=1)]

    def _renumber(self) -> None:
        self.continuity.renumbered()
        self.requests = dict.fromkeys(self.requests, 0)  # they have no number on this connection
        self.send_seq = 1

    def _judge_resume(self, envelope: m.Envelope, body: m.Resume) -> tuple[State | None, bool]:
        if self.state in _UNATTACHED or envelope.incarnation != self.incarnation:
            raise Refused(ErrorCode.STALE_INCARNATION, f"incarnation {envelope.incarnation} is not under way")
        if envelope.seq:
            raise Refused(ErrorCode.BAD_ARGUMENT, "Resume has number 0")
        if not self.token or not hmac.compare_digest(self.token, body.token):
            raise Refused(ErrorCode.NOT_RESUMABLE, "that is not the token of this incarnation")
        if type(body) not in self._receives[self.state]:
            raise self._out_of_order(envelope)
        self.continuity.lacking(body.received)
        return self.state, True

    def _judge_while_resuming(self, envelope: m.Envelope) -> tuple[State | None, bool]:
        """On a connection that has not been taken up yet: only the answer to Resume counts."""
        body = envelope.body
        if isinstance(body, m.ErrorReply) and not envelope.seq:
            return None, envelope.incarnation in (0, self.incarnation)
        if envelope.incarnation != self.incarnation:
            return None, False
        if isinstance(body, m.Resumed) and envelope.seq == 1:
            self.continuity.lacking(body.received)
            return self.state, True
        if isinstance(body, m.Ended):
            return State.ENDED, True
        return None, False

    # --- sending --------------------------------------------------------------------------------------------------

    def send(self, body: m.Message) -> m.Envelope:
        """Number a message of ours and take note of it. Raises LocalProtocolError if it is not legal now."""
        try:
            if isinstance(body, m.Attach | m.Join):
                return self._open(body)
            if isinstance(body, m.Resume):
                return self._ask_to_resume(body)
            kind = type(body)
            step = self._sends[self.state].get(kind)
            if step is None or kind is m.Resumed:  # the latter is for `resume`
                raise Refused(
                    ErrorCode.UNEXPECTED_MESSAGE,
                    f"{kind.__name__} by the {self.side.value} in state {self.state.value}",
                )
            guard = GUARDS.get(kind)
            ignored = guard is not None and guard(self, body, True)
        except Refused as refused:
            raise LocalProtocolError(refused.code, refused.text) from None
        seq = 0
        envelope = None
        if self.incarnation or isinstance(body, m.Attached | m.Joined):
            seq = self.send_seq
            self.send_seq = seq + 1
            asked = self._request_number(body)
            commit = COMMITS.get(kind)
            if commit is not None:
                commit(self, body, seq)
            if isinstance(body, m.Attached):
                self.token = body.token
            envelope = m.Envelope(self.incarnation, seq, body)
            self.continuity.gave(envelope, asked)
        if not ignored:
            self.state = step.to
        return envelope or m.Envelope(self.incarnation, 0, body)

    def _request_number(self, body: m.Message) -> int | None:
        """The number of the message with the host request that this answers."""
        match body:
            case m.HostReply():
                return self.requests.get(body.request)
            case m.ErrorReply():
                return self.requests.get(body.request, body.seq or None)
            case _:
                return None

    def _ask_to_resume(self, body: m.Resume) -> m.Envelope:
        if self.side is not Side.PEER or type(body) not in self._sends[self.state]:
            raise Refused(
                ErrorCode.UNEXPECTED_MESSAGE, f"Resume by the {self.side.value} in state {self.state.value}"
            )
        self.resuming = True
        return m.Envelope(self.incarnation, 0, body)

    def preview(self, body: m.Message) -> m.Envelope:
        """The envelope that `send` would return if the message is legal. Encode this first, then call `send`: a
        message that cannot be encoded is then not numbered.
        """
        if isinstance(body, m.Attach | m.Join):
            return m.Envelope(0, 0, body)
        if isinstance(body, m.Resume):
            return m.Envelope(self.incarnation, 0, body)
        if isinstance(body, m.Attached | m.Joined):
            return m.Envelope(incarnation_given(body), self.send_seq, body)
        return m.Envelope(self.incarnation, self.send_seq if self.incarnation else 0, body)

    def _open(self, body: m.Attach | m.Join) -> m.Envelope:
        if self.side is not Side.PEER:
            raise Refused(ErrorCode.UNEXPECTED_MESSAGE, f"{type(body).__name__} by a service")
        self._check_opener(body)
        self._begin(body)
        self.state = State.ATTACHING
        return m.Envelope(0, 0, body)

    # --- opening --------------------------------------------------------------------------------------------------

    def _check_opener(self, body: m.Attach | m.Join) -> None:
        if type(body) is not _OPENERS[self.service]:
            raise Refused(ErrorCode.UNEXPECTED_MESSAGE, f"{type(body).__name__} is not for this service")
        if self.state not in _UNATTACHED:
            raise Refused(ErrorCode.ALREADY_ATTACHED, f"state {self.state.value}")
        if (self.service, body.role) not in OPENINGS:
            raise Refused(ErrorCode.BAD_ARGUMENT, f"role {body.role.value} is not for this service")

    def _begin(self, body: m.Attach | m.Join) -> None:
        self.reset()
        self.role = body.role
        self._select(OPENINGS[self.service, body.role])
