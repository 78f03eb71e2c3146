from __future__ import annotations

import pytest

from shadowmmu.protocol import HeartbeatTimer


def test_a_heartbeat_is_due_after_our_own_silence() -> None:
    timer = HeartbeatTimer(1.0, 100.0)
    assert not timer.due(100.9)
    assert timer.due(101.0)
    timer.sent(101.5)
    assert not timer.due(102.4)
    assert timer.due(102.5)


def test_a_silent_peer_is_given_up() -> None:
    timer = HeartbeatTimer(1.0, 0.0, missed=3)
    assert [timer.expired(t / 2) for t in range(1, 8)] == [False] * 5 + [True] * 2
    assert timer.silence == 3.5


def test_any_message_counts() -> None:
    timer = HeartbeatTimer(1.0, 0.0, missed=2)
    assert not timer.expired(1.5)
    timer.heard(1.9)
    assert not timer.expired(2.8)
    assert not timer.expired(3.8)
    assert timer.expired(3.95)


def test_silence_while_we_slept_does_not_count() -> None:
    timer = HeartbeatTimer(1.0, 0.0, missed=5)
    assert not timer.expired(1000.0)  # we were stopped; what the peer sent may still lie in the socket
    timer.heard(1000.1)
    assert not timer.expired(1001.0)
    assert timer.silence == pytest.approx(0.9)
    assert not any(timer.expired(2000.0 + 1000 * i) for i in range(4))
    assert timer.expired(9000.0)


def test_a_clock_that_goes_back_does_no_harm() -> None:
    timer = HeartbeatTimer(1.0, 10.0, missed=1)
    assert not timer.expired(5.0)
    assert not timer.due(5.0)


@pytest.mark.parametrize("interval, missed", [(0.0, 5), (-1.0, 5), (1.0, 0), (float("nan"), 5)])
def test_bad_arguments(interval: float, missed: int) -> None:
    with pytest.raises(ValueError):
        HeartbeatTimer(interval, 0.0, missed=missed)
