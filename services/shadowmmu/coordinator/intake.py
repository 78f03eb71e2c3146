"""Event batches on their way to the checker, worked off in bounded slices.

The coordinator's loop also answers heartbeats; so a slice takes in a few thousand events at most, and the MMU
service gets its credits back batch by batch. What the checker cannot keep up with stays with the MMU service, which
waits: nothing is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from shadowmmu.checker import Checker, Violation
from shadowmmu.protocol.events import Event, decode_events
from shadowmmu.protocol.messages import EventBatch

__all__ = ["SLICE_EVENTS", "Intake", "Slice"]

SLICE_EVENTS = 2000
"""Most events that one slice takes in; about 5 ms."""


class Slice(msgspec.Struct, frozen=True):
    """What a slice came to: batches finished, the first violation, and what made the stream unreadable."""

    batches: int
    violation: Violation | None = None
    error: str | None = None


class Intake:
    """The queue of batches in front of a checker. `check` False: batches are counted and dropped unread."""

    def __init__(self, *, check: bool) -> None:
        self._checker = Checker() if check else None
        self._batches: deque[EventBatch] = deque()
        self._stored: Iterator[EventBatch] | None = None
        self._events: list[Event] = []  # of the batch at hand
        self._position = 0

    def put(self, batch: EventBatch) -> None:
        """One more batch, the next of the stream."""
        self._batches.append(batch)

    def put_stored(self, batches: Iterator[EventBatch]) -> None:
        """Batches from before everything that is put, taken from the iterator one at a time."""
        self._stored = batches

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._batches) or self._stored is not None or self._position < len(self._events)

    def work(self) -> Slice:
        """Takes in the next slice. After a violation or an error the rest is dropped unread."""
        if self._checker is None:
            return self._give_up(0)
        batches = 0
        left = SLICE_EVENTS
        while self.pending and left:
            if self._position >= len(self._events):
                batch = self._next()
                if batch is None:
                    break
                try:
                    self._events = decode_events(batch.data, batch.count)
                except msgspec.MsgspecError as error:
                    text = f"events {batch.first} and up are not readable: {error}"
                    return self._give_up(batches + 1, error=text)
                self._position = 0
            piece = self._events[self._position : self._position + left]
            violation = self._checker.feed_all(piece)
            if violation is not None:
                return self._give_up(batches + 1, violation=violation)
            left -= len(piece)
            self._position += len(piece)
            if self._position >= len(self._events):
                batches += 1
        return Slice(batches)

    def _next(self) -> EventBatch | None:
        if self._stored is not None:
            batch = next(self._stored, None)
            if batch is not None:
                return batch
            self._stored = None
        return self._batches.popleft() if self._batches else None

    def _give_up(self, batches: int, violation: Violation | None = None, error: str | None = None) -> Slice:
        self._checker = None
        batches += len(self._batches) + sum(1 for _ in self._stored or ())
        self._stored = None
        self._batches.clear()
        self._events = []
        self._position = 0
        return Slice(batches, violation, error)
