"""The event stream as it leaves the machine: counted, digested, handed on in pieces.

`emit` is on the hottest path of the program and does no more than append; `gather` encodes what has come and adds it to
the digest, `flush` hands it to the listeners too. In between a journal can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from shadowmmu.protocol.events import Event, encode_events
from shadowmmu.protocol.stream_digest import StreamDigest

__all__ = ["EventListener", "EventSink", "EventStream"]

EventListener: TypeAlias = Callable[[int, list[Event], bytes], None]
"""Called with the number of the first event, the events, and their concatenated encoding."""


class EventSink(Protocol):
    """Where a machine's events go."""

    emit: Callable[[Event], None]


class EventStream:
    """Gathers events; numbers count from 0.

    `count` and `digest` are how many there were before, and their digest: a stream that goes on.
    """

    def __init__(self, *listeners: EventListener, count: int = 0, digest: StreamDigest | None = None) -> None:
        self._pending: list[Event] = []
        self._unheard: list[tuple[int, list[Event], bytes]] = []
        self._listeners = listeners
        self._digest = digest or StreamDigest()
        self.count = count
        self.emit: Callable[[Event], None] = self._pending.append

    def gather(self) -> None:
        """Numbers and digests what was emitted, and tells nobody yet."""
        if not self._pending:
            return
        events = self._pending.copy()
        self._pending.clear()
        data = encode_events(events)
        self._digest.update(data)
        self._unheard.append((self.count, events, data))
        self.count += len(events)

    def flush(self) -> None:
        """Passes what was emitted to the listeners."""
        self.gather()
        unheard, self._unheard = self._unheard, []
        for first, events, data in unheard:
            for listener in self._listeners:
                listener(first, events, data)

    def digest(self) -> str:
        """Of the bytes of all events that `count` counts, in hexadecimal."""
        return self._digest.hexdigest()

    @property
    def stream_digest(self) -> StreamDigest:
        """The same, as something that can go on."""
        return self._digest
