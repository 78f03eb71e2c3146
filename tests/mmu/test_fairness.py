"""What a sender may cost the others: counts, not times."""

from __future__ import annotations

import pytest

from shadowmmu.client import RequestRefused
from shadowmmu.mmu import fairness
from shadowmmu.mmu.fairness import Fairness, TokenBucket, host_work
from shadowmmu.protocol import messages as m
from tests.mmu.conftest import Served

BURST = int(fairness.IDLE_BURST)


def idle(fair: Fairness, sender: bytes, now: float, count: int, *, stranger: bool = False) -> int:
    """How many of so many idle messages are allowed."""
    return sum(fair.allows_idle(sender, now, stranger=stranger) for _ in range(count))


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(10.0, 5.0, 0.0)
    assert [bucket.take(0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [bucket.take(0.25) for _ in range(3)] == [True, True, False]
    assert [bucket.take(100.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_bucket_in_debt_gives_nothing_until_it_is_paid() -> None:
    bucket = TokenBucket(10.0, 5.0, 0.0)
    assert bucket.spend(0.0, 25.0)
    assert not bucket.spend(1.9, 1.0)
    assert bucket.spend(2.1, 1.0)


def test_a_flooder_is_dropped_until_it_is_silent_for_a_while_and_nobody_else_is() -> None:
    fair = Fairness(0.0)
    assert idle(fair, b"flooder", 0.0, BURST + 100) == BURST
    assert idle(fair, b"other", 0.0, 100) == 100
    assert fair.is_dropped(b"flooder", 0.5)
    assert fair.is_dropped(b"flooder", 1.4)  # it went on: the second begins anew
    assert not fair.is_dropped(b"other", 0.5)
    assert not fair.is_dropped(b"flooder", 2.5)


def test_the_heartbeats_of_an_honest_peer_are_never_too_many() -> None:
    fair = Fairness(0.0)
    assert all(fair.allows_idle(b"honest", number / 10, stranger=False) for number in range(10_000))


def test_strangers_with_many_names_have_one_allowance_together() -> None:
    fair = Fairness(0.0)
    answered = sum(fair.allows_idle(b"%d" % number, 0.0, stranger=True) for number in range(10_000))
    assert answered == int(fairness.STRANGERS_BURST)
    assert len(fair._senders) == fairness.SENDERS_KEPT
    assert fair.allows_idle(b"a peer", 0.0, stranger=False)


def test_idle_messages_end_the_turn() -> None:
    fair = Fairness(0.0)
    idle(fair, b"x", 0.0, fairness.TURN_LIMIT - 1)
    over = [fair.turn_is_over]
    idle(fair, b"y", 0.0, 1)
    over.append(fair.turn_is_over)
    fair.begin_turn()
    over.append(fair.turn_is_over)
    assert over == [False, True, False]


def test_large_host_requests_wait_for_their_agents_share() -> None:
    fair = Fairness(0.0)
    large = host_work(m.WritePhys([(0, 0)] * 4096))
    begun = sum(fair.allows_work(b"agent", second / 100, large) for second in range(1000))
    most = fairness.WORK_BURST + 10 * fairness.WORK_RATE + large
    assert begun * large <= most
    assert begun > 10
    assert fair.allows_work(b"another", 9.99, large)


def test_work_grows_with_what_is_asked_for() -> None:
    assert host_work(m.WritePhys([(0, 0)] * 100)) > host_work(m.WritePhys([(0, 0)])) > 0
    assert host_work(m.UnmapRange(0, 512)) > host_work(m.Unmap(0)) > 0
    assert host_work(m.SetMemoryRegion(1, 0, 512)) > host_work(m.SetMemoryRegion(1, 0, 0)) > 0
    assert host_work(m.ReclaimIdle([1, 2])) > host_work(m.ReclaimIdle([1])) > 0


async def test_a_request_that_is_refused_costs_little(served: Served) -> None:
    """However large what it asks for: the agent's next ones do not wait for work that was not done."""
    async with await served.host() as host:
        for _ in range(20):
            with pytest.raises(RequestRefused):
                await host.request(m.UnmapRange(3072, 1 << 20))
        assert not served.service._hosts.waiting
        assert (await host.request(m.TestAge(100))).result == 0
