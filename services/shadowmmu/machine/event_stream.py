"""The event stream as it leaves the machine: counted, digested, handed on in pieces.

`emit` is on the hottest path of the program and does no more than append; `flush` encodes what has gathered, adds it
to the digest and hands it to the listeners.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol, TypeAlias

from shadowmmu.protocol.events import Event, encode_events

__all__ = ["EventListener", "EventSink", "EventStream"]

EventListener: TypeAlias = Callable[[int, list[Event], bytes], None]
"""Called with the number of the first event, the events, and their concatenated encoding."""


class EventSink(Protocol):
    """Where a machine's events go."""

    emit: Callable[[Event], None]


class EventStream:
    """Gathers events; numbers count from 0."""

    def __init__(self, *listeners: EventListener) -> None:
        self._pending: list[Event] = []
        self._listeners = listeners
        self._digest = hashlib.blake2b(digest_size=16)
        self.count = 0
        self.emit: Callable[[Event], None] = self._pending.append

    @property
    def pending(self) -> int:
        """Events emitted and not flushed."""
        return len(self._pending)

    def flush(self) -> None:
        """Digests the gathered events and passes them to the listeners."""
        if not self._pending:
            return
        events = self._pending.copy()
        self._pending.clear()
        data = encode_events(events)
        self._digest.update(data)
        first = self.count
        self.count += len(events)
        for listener in self._listeners:
            listener(first, events, data)

    def digest(self) -> str:
        """BLAKE2b-128 (hex) of the bytes of all events up to the last flush."""
        return self._digest.hexdigest()
