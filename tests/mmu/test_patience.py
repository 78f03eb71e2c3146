"""How long parked operations wait for messages, by a clock of the tests' own."""

from __future__ import annotations

import pytest

from shadowmmu.mmu.patience import PATIENCE_SECONDS, TURNS, Patience


def in_turns_after_a_message(patience: Patience, now: float, *, worker_next: bool) -> list[float | None]:
    patience.heard(now)
    return [patience.left(now, worker_next=worker_next) for _ in range(TURNS + 1)]


def test_for_some_turns_after_a_message_they_wait_without_looking_at_the_clock() -> None:
    patience = Patience(0.0)
    for now in (1.0, 1.0 + 2 * PATIENCE_SECONDS):
        assert in_turns_after_a_message(patience, now, worker_next=False)[:TURNS] == [0.0] * TURNS


def test_then_they_go_on_unless_a_worker_is_to_send() -> None:
    assert in_turns_after_a_message(Patience(0.0), 1.0, worker_next=False)[-1] is None
    assert in_turns_after_a_message(Patience(0.0), 1.0, worker_next=True)[-1] == pytest.approx(
        PATIENCE_SECONDS
    )


def test_a_worker_that_does_not_send_keeps_them_so_long_and_no_longer() -> None:
    patience = Patience(0.0)
    in_turns_after_a_message(patience, 1.0, worker_next=True)
    early = patience.left(1.0 + PATIENCE_SECONDS / 2, worker_next=True)
    assert early is not None
    assert 0.0 < early < PATIENCE_SECONDS
    assert patience.left(1.0 + PATIENCE_SECONDS, worker_next=True) is None


def test_each_message_gives_them_all_of_their_patience_again() -> None:
    patience = Patience(0.0)
    in_turns_after_a_message(patience, 1.0, worker_next=True)
    assert in_turns_after_a_message(patience, 1.0 + PATIENCE_SECONDS, worker_next=True)[-1] == pytest.approx(
        PATIENCE_SECONDS
    )
