"""The requests of host agents on their way to the machine and back.

A request gets a ticket when it is submitted; the machine's answer bears it. What an agent asks for beyond its share of
the service's time (`fairness`) waits, and with it everything that this agent asks for afterwards.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from shadowmmu.machine import HostAsked, HostDone, HostRefused, Runner
from shadowmmu.mmu.fairness import Fairness, host_work
from shadowmmu.mmu.peers import Peer, Peers
from shadowmmu.mmu.recovered import host_answer
from shadowmmu.protocol import messages as m

__all__ = ["HostRequests"]

BOOT_TICKET: Final = 0
"""That of the requests that load the guest: nobody is told."""
REFUSED_WORK: Final = 200
"""Microseconds that a request costs whose arguments are not usable; of many words it takes as long to see that."""


def _key(incarnation: int) -> bytes:
    """An agent's name for `Fairness`: the same over all its connections."""
    return incarnation.to_bytes(8, "big")


class HostRequests:
    """Who has asked for what. `tickets` and `last` are those of an earlier process, if there was one.

    `tickets`: by ticket, the agent's incarnation and its number for the request. `last`: the highest ticket so far.
    """

    def __init__(
        self,
        runner: Runner,
        peers: Peers,
        fairness: Fairness,
        tickets: dict[int, tuple[int, int]] | None = None,
        last: int = BOOT_TICKET,
    ) -> None:
        self._runner = runner
        self._peers = peers
        self._fairness = fairness
        self._waiting: deque[tuple[int, m.HostRequest]] = deque()
        self._charged: dict[int, int] = {}  # microseconds of work, by ticket
        self.tickets = {} if tickets is None else tickets
        self.last = last

    @property
    def waiting(self) -> bool:
        """Some request waits for its agent's share of the time."""
        return bool(self._waiting)

    def ask(self, incarnation: int, request: m.HostRequest) -> None:
        """A request of the agent with that incarnation."""
        self._waiting.append((incarnation, request))
        self.begin()

    def begin(self) -> None:
        """Submits the requests whose agents have a share of the time left, in order; the others wait."""
        waiting, self._waiting = self._waiting, deque()
        held = set()
        for incarnation, request in waiting:
            if self._peers.incarnation(incarnation) is None:
                continue
            work = host_work(request.operation)
            allowed = incarnation not in held and self._fairness.allows_work(
                _key(incarnation), time.monotonic(), work
            )
            if allowed:
                self._submit(incarnation, request)
                if not isinstance(request.operation, m.WritePhys):
                    self._charged[self.last] = work
            else:
                held.add(incarnation)
                self._waiting.append((incarnation, request))

    def _submit(self, incarnation: int, request: m.HostRequest) -> None:
        self.last += 1
        self.tickets[self.last] = (incarnation, request.request)
        self._runner.submit(
            HostAsked(self.last, request.operation, request.paced, incarnation, request.request)
        )

    def answered(self, output: HostDone | HostRefused) -> tuple[Peer, m.HostReply | m.ErrorReply] | None:
        """Who is to be told what of an operation that has returned; None if the agent is gone."""
        incarnation, request = self.tickets.pop(output.ticket, (0, 0))
        charged = self._charged.pop(output.ticket, 0)
        if isinstance(output, HostRefused) and charged:
            self._fairness.give_back(_key(incarnation), max(charged - REFUSED_WORK, 0))
        peer = self._peers.incarnation(incarnation)
        return None if peer is None else (peer, host_answer(peer.session, request, output))
