"""Scenes about the session: credits, time, encodings, versions, ends; and the list of all scenes. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import VERSION, VERSION_FRAME
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.states import State
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.scene import HELD_SECONDS, Hand, Scene
from shadowmmu.protocol_check.scenes_entries import (
    Bypass,
    Completed,
    Injected,
    Interrupted,
    Kicked,
    RefusedRegister,
)
from shadowmmu.protocol_check.scenes_tlb import Moved, NewProcessors, NoVpid, PreciseInvlpg
from shadowmmu.protocol_check.wide_pack import wide_frames

__all__ = ["SCENES"]

SLOW_INTERVALS: Final = 6
"""How long a slow service takes, in heartbeat intervals: longer than silence is borne."""
TIMES_WITHOUT_CREDIT: Final = 6
UNKNOWN_CODE: Final = "not-yet-invented"


class _Credits(Scene):
    """Logs are applied, but Applied comes late, and for several at once."""

    name = "few credits"
    blame = ClientCheck.CREDITS

    def __init__(self) -> None:
        self._held = 0
        self._since = 0.0
        self._times = 0

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        if not isinstance(body, m.Applied) or self._times == TIMES_WITHOUT_CREDIT:
            return (body,)
        if not self._held:
            self._since = hand.now
        self._held += body.logs
        return ()

    def tick(self, hand: Hand) -> None:
        if self._held and hand.now - self._since > HELD_SECONDS:
            held, self._held = self._held, 0
            self._times += 1
            hand.send(m.Applied(held))


class _Slow(Scene):
    """Everything takes longer than silence is borne: the first entry, a walk, the end."""

    name = "slow service"
    blame = ClientCheck.HEARTBEAT
    heartbeat = 0.2
    delays = 4 * SLOW_INTERVALS * heartbeat

    def __init__(self) -> None:
        self._slowed: set[type] = set()
        self._held: list[m.MmuMessage] = []
        self._since = 0.0

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        kind = m.Walked if isinstance(body, m.WalkFault) else type(body)
        if self._held:
            self._held.append(body)
            return ()
        slow = kind in (m.Entered, m.Walked, m.Ended)
        if not slow or kind in self._slowed:
            return (body,)
        self._slowed.add(kind)
        self._held.append(body)
        self._since = hand.now
        return ()

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        if isinstance(body, m.Heartbeat):
            hand.exercise(ClientCheck.HEARTBEAT)
        elif isinstance(body, m.Exit):
            # A walk that was abandoned: its answer has the right to stay away.
            self._held = [held for held in self._held if not isinstance(held, m.Walked | m.WalkFault)]
        return False

    def tick(self, hand: Hand) -> None:
        if self._held and hand.now - self._since > SLOW_INTERVALS * self.heartbeat:
            held, self._held = self._held, []
            for body in held:
                hand.send(body)


class _Twice(Scene):
    """Every message of the service comes twice."""

    name = "everything twice"
    blame = ClientCheck.REPEATED

    def times(self, envelope: m.Envelope) -> int:
        return 2 if envelope.seq else 1


class _Lost(Scene):
    """The connection is lost, again and again: with an Exit, a Walk, a Log or a value on its way, or the answer.

    For a client that says that it can resume; to others nothing happens.
    """

    name = "lost connections"
    blame = ClientCheck.RESUME
    heartbeat = 0.2
    delays = 8.0

    def __init__(self) -> None:
        self._due: list[type[m.Message]] = [m.Exit, m.Walk, m.Log, m.Entered, m.Walked, m.Exit, m.Detach]

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        """The answer to it is lost."""
        self._lose(hand, body)
        return False

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        """What comes next is lost."""
        self._lose(hand, body)

    def _lose(self, hand: Hand, body: m.Message) -> None:
        if self._due and hand.session.token and type(body) is self._due[0]:
            self._due.pop(0)
            hand.lose_connection()


class _NewerMinor(Scene):
    """A service of a later minor version, which uses nothing of it."""

    name = "newer minor version"
    blame = ClientCheck.MINOR

    def frames(self, envelope: m.Envelope) -> list[bytes]:
        newer = b"SMMU/%d.%d" % (VERSION[0], VERSION[1] + 7)
        return [newer, *super().frames(envelope)[1:]]


class _OtherEncodings(Scene):
    """Every value in any of its forms, members in any order, defaults written out."""

    name = "other encodings"
    blame = ClientCheck.ENCODING

    def __init__(self) -> None:
        self._random = random.Random(1)

    def frames(self, envelope: m.Envelope) -> list[bytes]:
        return wide_frames(envelope, self._random, VERSION_FRAME)


class _Ended(Scene):
    """The session is ended in the middle of guest mode."""

    ending = True
    code: str = ErrorCode.GIVEN_UP.value

    def __init__(self) -> None:
        self._said = 0
        self._ended = False

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        """In guest mode, once the client has some translations."""
        if isinstance(body, m.Walked | m.Loaded):
            self._said += 1
        if not self._ended and self._said == 2 and hand.session.state is State.IN_GUEST:
            self._ended = True
            hand.end(self.code, "the conformance kit ends this session")

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        if isinstance(body, m.Exit) and not self._ended and hand.session.entry >= 8:
            # It walks little: then here.
            self._ended = True
            hand.end(self.code, "the conformance kit ends this session")
            return True
        return False


class _GivenUp(_Ended):
    name = "given up"
    blame = ClientCheck.GIVEN_UP


class _UnknownEnd(_Ended):
    name = "ended with an unknown code"
    blame = ClientCheck.UNKNOWN_CODE
    code = UNKNOWN_CODE


class _UnknownRefusal(Scene):
    """The first Attach is refused with a code that is in no registry yet."""

    name = "refused with an unknown code"
    blame = ClientCheck.UNKNOWN_CODE
    ending = True

    def refuses_attach(self, attempt: int) -> m.ErrorReply | None:
        return m.ErrorReply(UNKNOWN_CODE, "a later version knows why") if attempt == 1 else None


SCENES: Final[tuple[type[Scene], ...]] = (
    Scene,
    Kicked,
    Moved,
    PreciseInvlpg,
    NewProcessors,
    NoVpid,
    Interrupted,
    Injected,
    Completed,
    RefusedRegister,
    Bypass,
    _Credits,
    _Slow,
    _Twice,
    _Lost,
    _NewerMinor,
    _OtherEncodings,
    _GivenUp,
    _UnknownEnd,
    _UnknownRefusal,
)
"""All scenes, in the order in which they are played."""
