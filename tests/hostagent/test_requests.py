"""Which requests a host agent sends when: pure, with a fake clock."""

from __future__ import annotations

from hdrh.histogram import HdrHistogram

from shadowmmu.hostagent.requests import OUTSTANDING, HostRequests
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.protocol import messages as m

CONFIG = m.RunConfig(seed=5)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def busy(clock: Clock | None = None) -> HostRequests:
    return HostRequests(lambda vcpus: HostProgram(CONFIG, vcpus), clock or Clock())


def test_two_paced_requests_are_outstanding() -> None:
    requests = busy()
    sent = requests.start(2)
    assert len(sent) == OUTSTANDING == 2
    for _ in range(50):
        more = requests.replied(m.HostReply(sent[-2].request, 0))
        assert len(more) == 1 and requests.under_way == OUTSTANDING
        sent += more
    assert all(request.paced for request in sent)
    assert [request.request for request in sent] == list(range(1, len(sent) + 1))
    program = HostProgram(CONFIG, 2)
    assert [request.operation for request in sent] == [program.next_operation() for _ in sent]


def test_drain_sends_one_request_that_starts_those_that_wait() -> None:
    requests = busy()
    sent = requests.start(2)
    (last,) = requests.drain()
    assert last == m.HostRequest(3, m.TestAge(0), paced=False)
    assert requests.drain() == []
    for request in (*sent, last):
        assert requests.under_way
        assert requests.replied(m.HostReply(request.request, 0)) == []
    assert not requests.under_way


def test_a_host_that_does_nothing_sends_nothing() -> None:
    requests = HostRequests(lambda _: None, Clock())
    assert requests.start(2) == requests.drain() == []
    assert not requests.under_way
    assert not requests.counters() and not requests.histograms()


def test_drain_before_the_start() -> None:
    requests = busy()
    assert requests.drain() == []
    assert not requests.under_way


def test_counters_and_latency() -> None:
    clock = Clock()
    requests = busy(clock)
    sent = requests.start(1)
    clock.now += 0.5
    sent += requests.replied(m.HostReply(1, 0))
    assert sum(requests.counters().values()) == len(sent) == 3
    assert set(requests.counters()) == {f"host.{request.operation.__struct_config__.tag}" for request in sent}
    histogram = HdrHistogram.decode(requests.histograms()["host_latency_us"])
    assert histogram.get_total_count() == 1
    assert abs(histogram.get_max_value() - 500_000) < 1000
