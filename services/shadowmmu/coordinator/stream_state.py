"""The event stream as the run's state sees it: which event is wanted next, and what credit is due. Pure.

A batch that was repeated after a lost connection is not taken twice, one that goes on from within what is there is cut.
Credit belongs to a connection: for what came on an earlier one none is given.
"""

from __future__ import annotations

import msgpack

from shadowmmu.protocol.messages import EventBatch
from shadowmmu.protocol.stream_digest import StreamDigest

__all__ = ["StreamError", "StreamState"]


class StreamError(Exception):
    """The MMU service broke the rules of the stream; the message says how."""


class StreamState:
    """`events` is the number of events received, and so that of the next; `batches` how many batches they came in."""

    def __init__(self, window: int) -> None:
        self.events = 0
        self.batches = 0
        self._window = window
        self._taken = 0  # batches that were worked off
        self._uncredited = 0  # of the backlog: came on an earlier connection
        self._digest = StreamDigest()

    @property
    def backlog(self) -> int:
        """Batches that the checker has not worked off."""
        return self.batches - self._taken

    @property
    def digest(self) -> str:
        """The digest of all events received."""
        return self._digest.hexdigest()

    def restore(self, batch: EventBatch) -> None:
        """A batch that was stored by an earlier process; the checker will be given it."""
        self._add(batch)
        self._uncredited += 1

    def reconnected(self) -> None:
        """The MMU service has a new connection: its credits start anew."""
        self._uncredited = self.backlog

    def take(self, batch: EventBatch) -> EventBatch | None:
        """What of a batch is new; None if nothing is. Raises StreamError."""
        if batch.first > self.events:
            raise StreamError(
                f"the event stream has a gap: event {self.events} should come next, and {batch.first} came"
            )
        if self.backlog - self._uncredited >= self._window:
            raise StreamError(f"the MMU service sent more event batches than the {self._window} it may")
        if batch.first + batch.count <= self.events:
            return None
        if batch.first < self.events:
            batch = _without(batch, self.events - batch.first)
        self._add(batch)
        return batch

    def taken_in(self, batches: int) -> int:
        """The checker has worked off so many more: how many credits are due."""
        self._taken += batches
        old = min(batches, self._uncredited)
        self._uncredited -= old
        return batches - old

    def _add(self, batch: EventBatch) -> None:
        self.events = batch.first + batch.count
        self.batches += 1
        self._digest.update(batch.data)


def _without(batch: EventBatch, events: int) -> EventBatch:
    """A batch without its first events."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(batch.data)
    for _ in range(events):
        unpacker.skip()
    return EventBatch(batch.first + events, batch.count - events, batch.data[unpacker.tell() :])
