"""How far the program of a vCPU got: what another worker needs to go on with it if its worker is lost.

That is the program's state that took effect last, and since then how many accesses of logs were applied and what the
vCPU was told (`messages.Resumption`). Whether a worker was there to hear it does not matter: what an operation gave
belongs to the virtual machine. An access or a request that was not applied is no part of the trail: it has not
happened. A lane keeps its trail; `shadowmmu.cpu.resume` follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.messages import TRAIL_LIMIT, Asked, LoggedAccess, Resumption, TrailStep

__all__ = ["Answer", "Question", "Trail", "asked_by"]

Question: TypeAlias = m.Enter | m.Walk | m.Load | m.Locked | m.Exit
"""What a vCPU asks for, if it is to be told something that concerns its program."""
Answer: TypeAlias = m.Entered | m.Loaded | m.WalkFault

_ASKED: Final[dict[type, Asked]] = {
    kind: Asked(m.tag_of(kind)) for kind in (m.Enter, m.Walk, m.Load, m.Locked)
}
_ASKED_BY_EXIT: Final[dict[type, Asked]] = {
    kind: Asked(m.tag_of(kind))
    for kind in (
        m.PageFaultExit,
        m.EptMisconfigExit,
        m.InvlpgExit,
        m.RegisterWriteExit,
        m.SendIpiExit,
        m.HaltExit,
        m.ExternalInterruptExit,
    )
}
_EXECUTING_NOTHING: Final = (Asked.ENTER, Asked.EXTERNAL_INTERRUPT, Asked.PAGE_FAULT, Asked.EPT_MISCONFIG)


def asked_by(question: Question) -> Asked:
    """What a message of a vCPU asks for."""
    if isinstance(question, m.Exit):
        return _ASKED_BY_EXIT[type(question.reason)]
    return _ASKED[type(question)]


class Trail(msgspec.Struct):
    """The trail of one vCPU's program, over all incarnations that executed it.

    `asked`: what took effect and is not answered yet. `resumable`: no step is missing.
    """

    state: bytes | None = None
    steps: list[TrailStep] = []
    accesses: int = 0
    asked: Asked | None = None
    resumable: bool = True

    def begin(self) -> None:
        """The program begins anew."""
        self._restart(None)
        self.asked = None

    def applied(self, accesses: Sequence[LoggedAccess]) -> None:
        """Accesses of a log were applied."""
        self.accesses += len(accesses)

    def asks(self, question: Question) -> None:
        """A message takes effect that is going to be answered. If it has a state, the trail begins there."""
        if isinstance(question, m.Load | m.Locked | m.Exit) and question.state is not None:
            self._restart(question.state)
        self.asked = asked_by(question)

    def told(self, answer: Answer) -> None:
        """The answer to what was asked last, whether or not anybody is there to hear it."""
        asked, self.asked = self.asked, None
        if asked is None or not self.resumable:
            return  # nobody asked: the program that did was replaced by a new one
        if isinstance(answer, m.Entered) and asked in _EXECUTING_NOTHING and not _tells(answer):
            return
        if len(self.steps) == TRAIL_LIMIT:
            self.resumable = False
            self.steps = []
            return
        self.steps.append(TrailStep(self.accesses, asked, answer))
        self.accesses = 0

    def withdraw(self) -> None:
        """What was asked has not happened, and is asked again by whoever goes on with the program."""
        self.asked = None

    def resumption(self) -> Resumption:
        """What the first Entered of a new incarnation says; only if `resumable`."""
        assert self.resumable
        return Resumption(self.state, self.steps.copy(), self.accesses)

    def _restart(self, state: bytes | None) -> None:
        self.state = state
        self.steps = []
        self.accesses = 0
        self.resumable = True


def _tells(entered: m.Entered) -> bool:
    """Whether the program hears of the entry at all."""
    return bool(entered.inject or entered.completed or entered.general_protection or entered.interrupts)
