"""The error registry: every code that an error reply or the end of a session can carry, and what it means.

Data first: `REGISTRY` says of each code what it means, whether the effect of the refused message is known, whether
the session survives, and what the other side should do. `docs/PROTOCOL.md` prints the same table.

An error reply about a message that was not accepted stands outside the numbering (its own sequence number is 0), and
the number of the refused message does not count as used: `error_reply` makes these. A reply that an accepted request
was not possible (host agents only) is an ordinary numbered message of the session.

The two exceptions split errors by whose fault they are, as h11 does: what a peer did wrong is a
`RemoteProtocolError`; what our own code tried to do wrong is a `LocalProtocolError`.
"""

from __future__ import annotations

import enum

import msgspec

from shadowmmu.protocol.messages import Envelope, ErrorReply

__all__ = [
    "REGISTRY",
    "Effect",
    "ErrorCode",
    "ErrorInfo",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "Stage",
    "error_info",
    "error_reply",
]

TEXT_LIMIT = 1024
"""Most characters of an error's text (the constraint of `messages.Text`)."""


class ErrorCode(enum.StrEnum):
    """The codes, as they stand in ErrorReply.code and Ended.code."""

    MALFORMED = "malformed"
    TOO_LARGE = "too-large"
    BAD_PART_COUNT = "bad-part-count"
    UNSUPPORTED_VERSION = "unsupported-version"
    UNEXPECTED_MESSAGE = "unexpected-message"
    NOT_ATTACHED = "not-attached"
    ALREADY_ATTACHED = "already-attached"
    STALE_INCARNATION = "stale-incarnation"
    DUPLICATE = "duplicate"
    SEQUENCE_GAP = "sequence-gap"
    STALE_ENTRY = "stale-entry"
    UNKNOWN_ENTRY = "unknown-entry"
    UNKNOWN_REQUEST = "unknown-request"
    CREDIT_EXCEEDED = "credit-exceeded"
    UNKNOWN_FRAME = "unknown-frame"
    BAD_ARGUMENT = "bad-argument"
    UNKNOWN_VCPU = "unknown-vcpu"
    VCPU_TAKEN = "vcpu-taken"
    RUN_FULL = "run-full"
    DRAINING = "draining"
    GIVEN_UP = "given-up"
    REPLACED = "replaced"
    SLOW_CONSUMER = "slow-consumer"
    UNREACHABLE = "unreachable"
    DETACHED = "detached"
    FINISHED = "finished"
    RUN_FINISHED = "run-finished"
    SHUTDOWN = "shutdown"
    NOT_RESUMABLE = "not-resumable"
    FORBIDDEN = "forbidden"
    FLOODING = "flooding"
    INTERNAL = "internal"


class Effect(enum.Enum):
    """What is known of the effect of the message that an error is about."""

    NONE = "none"  # definite: it changed nothing
    UNKNOWN = "unknown"  # indefinite: it may or may not have taken effect
    DONE = "done"  # no error: everything that was accepted has taken effect


class Stage(enum.Enum):
    """Where a message is refused."""

    FRAME = "frame"  # before anybody knew what it was (codec)
    SESSION = "session"  # its order, its numbers or its content (session, service)
    OPERATION = "operation"  # it was accepted; what it asked for was not possible
    END = "end"  # not about one message: why a session is over (in Ended)


class ErrorInfo(msgspec.Struct, frozen=True):
    """What one code means.

    `effect` of the message refused (for codes of an end: of messages that were not answered); `ends`: the session is
    over, an Ended with this code follows or is the message; `advice`: what the other side should do.
    """

    code: ErrorCode
    stage: Stage
    effect: Effect
    ends: bool
    meaning: str
    advice: str


def _registry() -> dict[ErrorCode, ErrorInfo]:
    frame, session, operation, end = Stage.FRAME, Stage.SESSION, Stage.OPERATION, Stage.END
    none, unknown, done = Effect.NONE, Effect.UNKNOWN, Effect.DONE
    code = ErrorCode
    rows = (
        (code.MALFORMED, frame, none, False,
         "The version frame or the MessagePack of the body is not what the specification says.",
         "Mend the encoder; the text says where. Send the mended message under the same number."),
        (code.TOO_LARGE, frame, none, False,
         "The message is over the soft limit. Over the hard limit the connection is cut without a reply.",
         "Send smaller messages."),
        (code.BAD_PART_COUNT, frame, none, False,
         "A message has exactly two frames.",
         "Send the version frame and the envelope as one message of two frames."),
        (code.UNSUPPORTED_VERSION, frame, none, False,
         "The major version is not spoken here; the text names those that are.",
         "Speak a supported version, or give up."),
        (code.UNEXPECTED_MESSAGE, session, none, False,
         "The message is not legal in this state, for this role or in this direction.",
         "Mend the client: see the tables of legal order."),
        (code.NOT_ATTACHED, session, none, False,
         "The sender has no session here: it never attached, or the service was started anew.",
         "Attach (or join) first."),
        (code.ALREADY_ATTACHED, session, none, False,
         "The sender has a session already.",
         "Use it, or attach from a connection of your own."),
        (code.STALE_INCARNATION, session, none, False,
         "The message belongs to an incarnation that has ended, or is another one's.",
         "Forget the incarnation; attach anew with an empty TLB."),
        (code.DUPLICATE, session, none, False,
         "Version 1.0 only (since 1.1 a repeated message is answered again): its number was accepted before.",
         "Nothing, if it was sent again on purpose; else count the numbers from 1 upwards."),
        (code.SEQUENCE_GAP, session, none, True,
         "A message before this one is missing.",
         "Attach anew with an empty TLB."),
        (code.STALE_ENTRY, session, none, False,
         "The message names a guest entry that has ended.",
         "Send messages of an entry before its Exit."),
        (code.UNKNOWN_ENTRY, session, none, False,
         "The message names a guest entry that has not begun.",
         "Name the entry that the last Entered began."),
        (code.UNKNOWN_REQUEST, session, none, False,
         "The number of a walk or host request is not the next one, or an answer names none that is under way.",
         "Number walks, and host requests, from 1 upwards."),
        (code.CREDIT_EXCEEDED, session, none, False,
         "More messages than the credits allow: logs not applied yet, event batches, host requests under way.",
         "Wait for Applied, EventCredit or HostReply before sending more."),
        (code.UNKNOWN_FRAME, session, none, False,
         "The message names a host frame (pfn) that the simulated machine does not have.",
         "Use frame numbers that a walk returned."),
        (code.BAD_ARGUMENT, operation, none, False,
         "A field has a value that is well-formed but not possible here; the text names it.",
         "Ask for something possible."),
        (code.UNKNOWN_VCPU, session, none, False,
         "The virtual machine has no vCPU of that number.",
         "Attach without a number, or with a smaller one."),
        (code.VCPU_TAKEN, session, none, False,
         "That vCPU is attached.",
         "Attach without a number, or wait until the other one is given up."),
        (code.RUN_FULL, session, none, False,
         "There is no place left for another peer of this role.",
         "Leave."),
        (code.DRAINING, session, none, False,
         "The run ends: nobody attaches, nothing new is begun.",
         "Finish what is under way, report, and detach."),
        (code.GIVEN_UP, end, unknown, True,
         "Nothing was heard of the peer for too long.",
         "Attach anew with an empty TLB. What was not answered may have taken effect; unapplied logs never will."),
        (code.REPLACED, end, unknown, True,
         "Another connection attached as this peer.",
         "Leave, unless you are the other one."),
        (code.SLOW_CONSUMER, end, unknown, True,
         "The peer does not read what is sent to it: the queue for it is full.",
         "Read faster; attach anew with an empty TLB."),
        (code.UNREACHABLE, end, unknown, True,
         "There is no connection to the peer any more.",
         "Attach anew with an empty TLB."),
        (code.DETACHED, end, done, True,
         "The peer detached, as it asked to.",
         "Nothing."),
        (code.FINISHED, end, done, True,
         "The service ends in good order.",
         "End."),
        (code.RUN_FINISHED, session, none, True,
         "The run is over.",
         "End."),
        (code.SHUTDOWN, end, done, True,
         "The virtual machine has shut down this vCPU: a triple fault.",
         "End. The guest's root table is in no memory slot."),
        (code.NOT_RESUMABLE, session, none, False,
         "There is nothing to go on with: a wrong token, or more was lost than is kept.",
         "Attach anew: with the vCPU's token to go on with its program, without for a new one."),
        (code.FORBIDDEN, session, none, False,
         "The key of this connection is not allowed to do that.",
         "Use a key of the right role."),
        (code.FLOODING, session, none, True,
         "The peer sends more than its share of what is refused or without effect.",
         "Mend the client; attach anew."),
        (code.INTERNAL, end, unknown, True,
         "The service has failed; its log says how.",
         "Report it with the journal. What was not answered may have taken effect."),
    )  # fmt: skip
    return {row[0]: ErrorInfo(*row) for row in rows}


REGISTRY: dict[ErrorCode, ErrorInfo] = _registry()
"""Every code's meaning, in the order of the documentation."""


def error_info(code: str) -> ErrorInfo | None:
    """The registry's entry of a code received, or None if we do not know it (a newer peer's)."""
    try:
        return REGISTRY[ErrorCode(code)]
    except ValueError:
        return None


class ProtocolError(Exception):
    """The protocol was violated. `code` says how; `info` is its registry entry."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text

    @property
    def info(self) -> ErrorInfo:
        return REGISTRY[self.code]


class LocalProtocolError(ProtocolError):
    """Our own side tried something that the protocol forbids; nothing was sent and nothing has changed."""


class RemoteProtocolError(ProtocolError):
    """The peer did something that the protocol forbids; its message was refused and nothing has changed.

    `incarnation` and `seq` are those of the message refused, 0 if it could not be read that far.
    """

    def __init__(self, code: ErrorCode, text: str, *, incarnation: int = 0, seq: int = 0) -> None:
        super().__init__(code, text)
        self.incarnation = incarnation
        self.seq = seq


def error_reply(error: RemoteProtocolError) -> Envelope:
    """The reply that tells a peer of its refused message.

    It stands outside the numbering (sequence number 0), since it changes nothing at either end; so it can be sent
    to peers with and without a session.
    """
    return Envelope(error.incarnation, 0, ErrorReply(error.code.value, error.text[:TEXT_LIMIT], error.seq))
