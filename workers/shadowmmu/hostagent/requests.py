"""Which host operations to ask the MMU service for, and when: pure.

Two requests are always outstanding, both *paced*: the service starts them when the guest has come as far as the run's
`host_rate` says, so that the rate is one of guest instructions and not of anybody's speed. At the end one request
that is not paced starts whatever still waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from hdrh.histogram import HdrHistogram

from shadowmmu.protocol import messages as m

__all__ = ["OUTSTANDING", "HostRequests", "Operations"]

OUTSTANDING: Final = 2
"""Requests under way at once."""
LOWEST_US: Final = 1
HIGHEST_US: Final = 60_000_000
SIGNIFICANT_DIGITS: Final = 3


class Operations(Protocol):
    """What is needed of `shadowmmu.machine.host_program.HostProgram`."""

    def next_operation(self) -> m.HostOperation: ...


class HostRequests:
    """The requests of one agent in one run.

    `make_program(vcpus)`: the program for so many vCPUs, None if the host does nothing in this run; `clock`: seconds,
    of any clock that does not go back. `start`, `replied` and `drain` return the requests to be sent, in order.
    """

    def __init__(self, make_program: Callable[[int], Operations | None], clock: Callable[[], float]) -> None:
        self._make_program = make_program
        self._program: Operations | None = None
        self._clock = clock
        self._numbers = 0
        self._sent: dict[int, float] = {}  # requests under way, by number: when they were sent
        self._draining = False
        self._counts: Counter[str] = Counter()
        self._latency = HdrHistogram(LOWEST_US, HIGHEST_US, SIGNIFICANT_DIGITS)

    def start(self, vcpus: int) -> list[m.HostRequest]:
        """The run begins."""
        self._program = self._make_program(vcpus)
        return self._more()

    def replied(self, reply: m.HostReply) -> list[m.HostRequest]:
        """A request returned."""
        sent = self._sent.pop(reply.request)
        microseconds = int((self._clock() - sent) * 1e6)
        self._latency.record_value(min(max(microseconds, LOWEST_US), HIGHEST_US))
        return self._more()

    def drain(self) -> list[m.HostRequest]:
        """No more of the program: what is under way is to end."""
        if self._draining:
            return []
        self._draining = True
        return [self._request(m.TestAge(0), paced=False)] if self._sent else []

    def forget(self) -> None:
        """The incarnation in which requests were made is over: what became of those under way is not known."""
        self._sent.clear()
        self._numbers = 0

    def resume(self) -> list[m.HostRequest]:
        """There is a new incarnation: goes on with the program."""
        return self._more()

    @property
    def under_way(self) -> int:
        """Requests without reply."""
        return len(self._sent)

    def counters(self) -> dict[str, int]:
        """Requests sent, by kind: "host.unmap" and so on."""
        return dict(self._counts)

    def histograms(self) -> dict[str, str]:
        """Microseconds from a request to its reply; of a paced one this includes the wait for the guest."""
        if not self._latency.get_total_count():
            return {}
        return {"host_latency_us": self._latency.encode().decode("ascii")}

    def _more(self) -> list[m.HostRequest]:
        requests = []
        while self._program is not None and not self._draining and len(self._sent) < OUTSTANDING:
            requests.append(self._request(self._program.next_operation(), paced=True))
        return requests

    def _request(self, operation: m.HostOperation, *, paced: bool) -> m.HostRequest:
        self._numbers += 1
        self._sent[self._numbers] = self._clock()
        self._counts[f"host.{operation.__struct_config__.tag}"] += 1
        return m.HostRequest(self._numbers, operation, paced=paced)
