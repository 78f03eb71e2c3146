"""The checker: reads the event stream of a run and says when a coherence rule is broken.

It knows the architecture's rules, not KVM's intentions, and reads nothing but events: it works during a run as well
as over a recorded one. `docs/COHERENCE.md` defines each rule. Each rule has a module of its own with its state;
this one numbers the events and hands each to the rules that want it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from shadowmmu.checker.history import History
from shadowmmu.checker.host_frames import HostFrames
from shadowmmu.checker.structure import audit_failed
from shadowmmu.checker.violation import Violation
from shadowmmu.checker.write_protection import WriteProtection
from shadowmmu.protocol.events import (
    Accesses,
    AuditFailed,
    Event,
    FlushAnswered,
    FlushRequested,
    FrameBacked,
    FrameRevoked,
    InputConsumed,
    Invalidated,
    LockReleased,
    OperationEnded,
    OperationStarted,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
    TlbsDirtyCleared,
    TlbsDirtyRaised,
)

__all__ = ["Checker"]

_Handler: TypeAlias = Callable[[Any], Violation | None]


class Checker:
    """Feed it every event of a run, in order; it answers with the violation that an event is, or None.

    Time per event is constant; memory is bounded by the numbers of vCPUs, of shadow pages and of guest frames, plus
    one bit per host frame that was ever revoked.
    """

    def __init__(self) -> None:
        self._history = History()
        self._frames = HostFrames(self._history)
        self._protection = WriteProtection(self._history)
        self._handlers: dict[type[Event], _Handler] = {
            Accesses: self._accesses,
            InputConsumed: self._input_consumed,
            # rule 3
            FrameRevoked: self._frames.frame_revoked,
            FrameBacked: self._frames.frame_backed,
            # rule 4
            ShadowPageCreated: self._protection.created,
            ShadowPageSynced: self._protection.synced,
            ShadowPageUnsynced: self._protection.unsynced,
            ShadowPageZapped: self._protection.zapped,
            LockReleased: self._protection.lock_released,
            # rule 7
            AuditFailed: self._audit_failed,
            # what explains violations
            OperationStarted: self._history.operation_started,
            OperationEnded: self._history.operation_ended,
            FlushRequested: self._history.flush_requested,
            FlushAnswered: self._history.flush_answered,
            Invalidated: self._history.invalidated,
            TlbsDirtyRaised: self._history.tlbs_dirty_raised,
            TlbsDirtyCleared: self._history.tlbs_dirty_cleared,
        }

    @property
    def events(self) -> int:
        """How many events were fed."""
        return self._history.index + 1

    def feed(self, event: Event) -> Violation | None:
        """Take in the next event."""
        self._history.index += 1
        handler = self._handlers.get(type(event))
        return None if handler is None else handler(event)

    def feed_all(self, events: Iterable[Event]) -> Violation | None:
        """Take in events up to the first that is a violation, and return that; None if there is none."""
        feed = self.feed
        for event in events:
            violation = feed(event)
            if violation is not None:
                return violation
        return None

    def _input_consumed(self, event: InputConsumed) -> None:
        self._history.record = event.record

    def _accesses(self, event: Accesses) -> Violation | None:
        return self._frames.accesses(event) or self._protection.accesses(event)

    def _audit_failed(self, event: AuditFailed) -> Violation:
        return audit_failed(self._history, event)
