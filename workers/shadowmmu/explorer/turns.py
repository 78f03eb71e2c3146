"""Fairness: a vCPU that faults again and again because of somebody else lets the others go on.

KVM tries an access again while the host is in the middle of taking a range of pages away. A scheduler that prefers
that vCPU would execute the same page fault for ever. So a vCPU whose page fault is the same as its last one, with
nothing done by anybody in between, is passed over until something is done, or the host has taken a step (as a thread
that yields in Musuvathi, Qadeer: "Fair stateless model checking", PLDI 2008). If nobody else can go on it goes on
itself: a fault that nobody else is to blame for shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shadowmmu.explorer.actors import KIND, Actor
from shadowmmu.protocol.events import (
    Entered,
    Event,
    Exited,
    InputConsumed,
    Invalidated,
    LockReleased,
    LockTaken,
    OperationEnded,
    OperationStarted,
    Walked,
)

__all__ = ["Turns"]

_NOTHING_DONE: Final = (
    Entered,
    InputConsumed,
    Invalidated,
    LockReleased,
    LockTaken,
    OperationEnded,
    OperationStarted,
    Walked,
)


class Turns:
    """`passed_over`: the vCPUs that let others go on."""

    def __init__(self) -> None:
        self.passed_over: set[Actor] = set()
        # By vCPU: its last page fault, if nothing was done since.
        self._faults: dict[int, tuple[int, int]] = {}

    def look(self, actor: Actor, events: Iterable[Event]) -> None:
        """The actor has taken a step, with these events."""
        if actor >= KIND:
            self.passed_over.clear()
        for event in events:
            if isinstance(event, Exited) and event.reason == "page_fault":
                fault = event.gva, event.error_code
                if self._faults.get(event.vcpu) == fault:
                    self.passed_over.add(event.vcpu)
                self._faults[event.vcpu] = fault
            elif not isinstance(event, (Exited, *_NOTHING_DONE)):
                self._faults.clear()
                self.passed_over.clear()

    def of(self, enabled: list[Actor]) -> list[Actor]:
        """Those of `enabled` whose turn it can be."""
        if not self.passed_over:
            return enabled
        return [actor for actor in enabled if actor >= KIND or actor not in self.passed_over] or enabled

    def key(self) -> tuple[object, ...]:
        """For comparison."""
        return tuple(sorted(self.passed_over)), tuple(sorted(self._faults.items()))
