"""Event batches in bounded slices."""

import pytest

from shadowmmu.coordinator.intake import Intake
from shadowmmu.protocol import events as ev
from shadowmmu.protocol.messages import EventBatch


def batch(first: int, *events: ev.Event) -> EventBatch:
    return EventBatch(first, len(events), ev.encode_events(events))


def many(first: int, count: int) -> EventBatch:
    return batch(first, *(ev.InputConsumed(first + n) for n in range(count)))


def test_a_slice_is_bounded_and_batches_may_span_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shadowmmu.coordinator.intake.SLICE_EVENTS", 10)
    intake = Intake(check=True)
    for first in (0, 4, 19):
        intake.put(many(first, {0: 4, 4: 15, 19: 1}[first]))
    assert [intake.work().batches for _ in range(2)] == [1, 2]
    assert not intake.pending


def test_a_violation_is_found_and_the_rest_is_dropped() -> None:
    intake = Intake(check=True)
    intake.put(many(0, 3))
    intake.put(batch(3, ev.AuditFailed("rmap", "bad"), ev.InputConsumed(9)))
    intake.put(many(5, 2))
    piece = intake.work()
    assert piece.violation is not None
    assert piece.violation.event_index == 3
    assert piece.batches == 3
    intake.put(many(7, 2))
    assert intake.work().batches == 1


def test_without_a_checker_batches_are_only_counted() -> None:
    intake = Intake(check=False)
    intake.put(batch(0, ev.AuditFailed("rmap", "bad")))
    assert intake.work().batches == 1
    assert intake.work().violation is None


@pytest.mark.parametrize("data, count", [(b"\xc1", 1), (b"", 1), (ev.encode_event(ev.InputConsumed(1)), 2)])
def test_rubbish_is_an_error(data: bytes, count: int) -> None:
    intake = Intake(check=True)
    intake.put(EventBatch(7, count, data))
    piece = intake.work()
    assert piece.error is not None
    assert "events 7 and up" in piece.error
    assert piece.batches == 1
    assert not intake.pending


def test_an_empty_batch_is_taken_in() -> None:
    intake = Intake(check=True)
    intake.put(EventBatch(0, 0, b""))
    intake.put(many(0, 1))
    assert intake.work().batches == 2
