"""What one end keeps so that a conversation survives repetitions and the loss of its connection.

A message *counts* if it means something to the machine or to the processor; heartbeats, openings and the end do not.
Both ends count, in both directions, from the welcome of an incarnation on, and keep the last `KEPT` messages that
they sent. On a new connection they tell each other their counts, and each sends again what the other lacks. A service
keeps its answers as well, by the number of what they answer, to give them again when a message comes twice on the
same connection.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.ledger import Refused

__all__ = ["INCARNATION_LOST", "KEPT", "NOTHING_TO_RESUME", "QUIET_INTERVALS", "Continuity", "kind_counts"]

KEPT: Final = 64
"""Messages that count, and answers, that an end keeps."""

QUIET_INTERVALS: Final = 3
"""After the silence of so many heartbeat intervals a peer that can resume tries another connection: before the service
gives it up."""
NOTHING_TO_RESUME: Final = frozenset(
    {ErrorCode.STALE_INCARNATION, ErrorCode.NOT_RESUMABLE, ErrorCode.NOT_ATTACHED}
)
"""Refusals after which there is no incarnation to go on with. To something else than Resume they mean: resume."""
INCARNATION_LOST: Final = frozenset(
    {ErrorCode.GIVEN_UP, ErrorCode.SEQUENCE_GAP, ErrorCode.UNREACHABLE, ErrorCode.SLOW_CONSUMER}
)
"""Why a service ends an incarnation behind which another may follow."""

_UNCOUNTED: Final = frozenset({m.Attach, m.Attached, m.Resume, m.Resumed, m.Heartbeat, m.Detach, m.Ended})


def kind_counts(kind: type[m.Message]) -> bool:
    """Whether numbered messages of this type count, in a vCPU's or a host agent's conversation."""
    return kind not in _UNCOUNTED


def _question(body: m.Message) -> tuple[type, int] | None:
    """What a vCPU waits for that has asked so: of a walk, that one."""
    match body:
        case m.Enter() | m.Exit():
            return m.Entered, 0
        case m.Walk():
            return m.Walked, body.walk
        case m.Load() | m.Locked():
            return m.Loaded, 0
        case _:
            return None


def _answered(body: m.Message) -> tuple[type, int] | None:
    """The question that this answers, as `_question` says it."""
    match body:
        case m.Entered() | m.Loaded():
            return type(body), 0
        case m.Walked() | m.WalkFault():
            return m.Walked, body.walk
        case _:
            return None


class Continuity:
    """The counts and what is kept, of one incarnation.

    `received`, `sent`: messages that count, since the welcome.
    """

    __slots__ = ("_answers", "_asked", "_kept", "_logs", "_question", "received", "sent")

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0
        self._kept: deque[m.Message] = deque(maxlen=KEPT)
        self._answers: dict[int, m.Envelope] = {}
        self._asked = 0  # the number of the last question
        self._question: tuple[type, int] | None = None
        self._logs: deque[int] = deque()  # the numbers of logs that are not applied

    # --- what came and what went ---------------------------------------------------------------------------------

    def took(self, body: m.Message, seq: int) -> None:
        """A message with this number was taken in."""
        kind = type(body)
        if kind in _UNCOUNTED:
            return
        self.received += 1
        question = _question(body)
        if question is not None:
            self._question = question
            self._asked = seq
        elif kind is m.Log:
            self._logs.append(seq)

    def gave(self, envelope: m.Envelope, asked: int | None) -> None:
        """A message of ours; `asked`: the number of the host request that it answers, if it is such an answer."""
        body = envelope.body
        kind = type(body)
        if kind in _UNCOUNTED:
            return
        self.sent += 1
        self._kept.append(body)
        answered = _answered(body)
        if answered is not None:
            if answered == self._question:  # else: of a walk that was abandoned
                self._keep_answer(self._asked, envelope)
        elif isinstance(body, m.Applied):
            for _ in range(min(body.logs, len(self._logs))):
                self._keep_answer(self._logs.popleft(), envelope)
        elif asked is not None:
            self._keep_answer(asked, envelope)

    def _keep_answer(self, seq: int, envelope: m.Envelope) -> None:
        if not seq:
            return  # it was asked on an earlier connection
        answers = self._answers
        answers[seq] = envelope
        if len(answers) > KEPT:
            del answers[next(iter(answers))]

    # --- repetitions ---------------------------------------------------------------------------------------------

    def answer(self, seq: int) -> m.Envelope | None:
        """What was answered to message `seq` of this connection, if it is kept."""
        return self._answers.get(seq)

    def lacking(self, received: int) -> list[m.Message]:
        """What the other end lacks that has taken in so many. Raises Refused if that cannot be, or is not kept."""
        missing = self.sent - received
        if not 0 <= missing <= len(self._kept):
            raise Refused(
                ErrorCode.NOT_RESUMABLE,
                f"{received} messages were taken in of {self.sent}; the last {len(self._kept)} are kept",
            )
        kept = list(self._kept)
        return kept[len(kept) - missing :]

    def renumbered(self) -> None:
        """A new connection: numbers begin anew, and what was asked on the old one keeps no answer."""
        self._answers.clear()
        self._asked = 0
        self._logs = deque([0] * len(self._logs))
