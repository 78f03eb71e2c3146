"""The event stream on its way to the coordinator: in order, in batches, against credits, nothing dropped.

The machine's flushes are gathered into batches of a useful size. A batch goes out only if the coordinator has given
credit for it; if too much waits, the service stops stepping and reading (`blocked`) until credit comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from shadowmmu.protocol.events import Event

__all__ = ["EventSender"]

BATCH_BYTES: Final = 48 * 1024
"""A batch is closed when it has this many bytes."""
WAITING_BATCHES: Final = 8
"""So many closed batches may wait for credit before the service stops."""


class EventSender:
    """Batches the event stream.

    `send` takes (number of the first event, count, bytes); `credits_left` says how many batches may be sent now.
    """

    def __init__(self, send: Callable[[int, int, bytes], object], credits_left: Callable[[], int]) -> None:
        self._send = send
        self._credits_left = credits_left
        self._first = 0
        self._count = 0
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._waiting: deque[tuple[int, int, bytes]] = deque()

    @property
    def blocked(self) -> bool:
        """Too much waits for credit."""
        return len(self._waiting) > WAITING_BATCHES

    @property
    def waiting(self) -> bool:
        """Some batch waits for credit."""
        return bool(self._waiting)

    def listen(self, first: int, events: list[Event], data: bytes) -> None:
        """An event listener of the machine."""
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
            self._waiting.append((self._first, self._count, b"".join(self._pieces)))
            self._pieces.clear()
            self._count = self._bytes = 0
        self.pump()

    def pump(self) -> None:
        """Sends what credit there is for."""
        while self._waiting and self._credits_left():
            self._send(*self._waiting.popleft())
