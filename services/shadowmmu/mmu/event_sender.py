"""The event stream on its way to the coordinator: in order, in batches, against credits, nothing dropped.

The machine's flushes are gathered into batches of a useful size. A batch goes out only if the coordinator has given
credit for it, and is kept until it is credited: after a lost connection the coordinator says with which event to go on.
If too much waits, the service stops stepping and reading (`blocked`) until credit comes. A service that recovers makes
its events anew; those that the coordinator has are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from shadowmmu.protocol.events import Event, encode_events

__all__ = ["EventSender"]

BATCH_BYTES: Final = 48 * 1024
"""A batch is closed when it has this many bytes."""
WAITING_BATCHES: Final = 8
"""So many closed batches may wait for credit before the service stops."""


class _Batch(msgspec.Struct, frozen=True):
    first: int
    count: int
    data: bytes


class EventSender:
    """Batches the event stream.

    `send` takes (number of the first event, count, bytes); `credits_left` says how many batches may be sent now;
    `next_event` is the first event that the coordinator wants.
    """

    def __init__(
        self,
        send: Callable[[int, int, bytes], object],
        credits_left: Callable[[], int],
        next_event: int = 0,
    ) -> None:
        self._send = send
        self._credits_left = credits_left
        self._next_event = next_event
        self._first = 0
        self._count = 0
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._waiting: deque[_Batch] = deque()
        self._sent: deque[_Batch] = deque()  # not credited yet

    @property
    def blocked(self) -> bool:
        """Too much waits for credit."""
        return len(self._waiting) > WAITING_BATCHES

    @property
    def waiting(self) -> bool:
        """Some batch waits for credit."""
        return bool(self._waiting)

    @property
    def finished(self) -> bool:
        """Nothing waits to be sent or credited."""
        return not self._waiting and not self._sent

    def listen(self, first: int, events: list[Event], data: bytes) -> None:
        """An event listener of the machine."""
        if first < self._next_event:
            events = events[self._next_event - first :]
            if not events:
                return
            first, data = self._next_event, encode_events(events)
        if not self._count:
            self._first = first
        self._count += len(events)
        self._pieces.append(data)
        self._bytes += len(data)
        if self._bytes >= BATCH_BYTES:
            self.close_batch()

    def close_batch(self) -> None:
        """What has gathered is a batch, whatever its size; sends what credit there is for."""
        if self._count:
            self._waiting.append(_Batch(self._first, self._count, b"".join(self._pieces)))
            self._pieces.clear()
            self._count = self._bytes = 0
        self.pump()

    def pump(self) -> None:
        """Sends what credit there is for."""
        while self._waiting and self._credits_left():
            batch = self._waiting.popleft()
            self._sent.append(batch)
            self._send(batch.first, batch.count, batch.data)

    def credited(self, batches: int) -> None:
        """The coordinator has taken in so many, the oldest: they need not be kept."""
        for _ in range(min(batches, len(self._sent))):
            self._sent.popleft()
        self.pump()

    def resume(self, next_event: int) -> None:
        """The coordinator, on a new connection, wants the stream from this event on."""
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        while self._waiting and self._waiting[0].first + self._waiting[0].count <= next_event:
            self._waiting.popleft()
        self.pump()
