"""The event stream's batches, against a coordinator that is a list."""

from __future__ import annotations

from shadowmmu.mmu.event_sender import EventSender
from shadowmmu.protocol.events import Event, InputConsumed, encode_events


class Line:
    """A sender with so much credit, and what it sent."""

    def __init__(self, credits: int, next_event: int = 0) -> None:
        self.credits = credits
        self.sent: list[tuple[int, int, bytes]] = []
        self.sender = EventSender(self._send, lambda: self.credits, next_event)

    def _send(self, first: int, count: int, data: bytes) -> None:
        self.credits -= 1
        self.sent.append((first, count, data))

    def emit(self, first: int, count: int) -> None:
        events: list[Event] = [InputConsumed(number) for number in range(first, first + count)]
        self.sender.listen(first, events, encode_events(events))
        self.sender.close_batch()

    @property
    def firsts(self) -> list[int]:
        return [first for first, _, _ in self.sent]


def test_batches_wait_for_credit() -> None:
    line = Line(credits=1)
    line.emit(0, 2)
    line.emit(2, 2)
    assert line.firsts == [0]
    assert line.sender.waiting
    line.credits = 1
    line.sender.credited(1)
    assert line.firsts == [0, 2]
    assert not line.sender.finished
    line.sender.credited(1)
    assert line.sender.finished


def test_what_the_coordinator_does_not_have_is_sent_again() -> None:
    line = Line(credits=2)
    for first in (0, 2, 4):
        line.emit(first, 2)
    line.credits = 16
    line.sender.resume(2)
    assert line.firsts == [0, 2, 2, 4]


def test_a_service_that_recovers_leaves_out_what_the_coordinator_has() -> None:
    line = Line(credits=16, next_event=3)
    line.emit(0, 2)
    line.emit(2, 3)
    assert line.sent == [(3, 2, encode_events([InputConsumed(3), InputConsumed(4)]))]


def test_too_much_waiting_blocks_the_service() -> None:
    line = Line(credits=0)
    for first in range(9):
        assert not line.sender.blocked
        line.emit(first, 1)
    assert line.sender.blocked
