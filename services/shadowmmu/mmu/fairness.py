"""What one sender may cost the others: allowances for messages that move nothing forward, and for host requests.

A client that keeps to the protocol is slowed by its answers: a vCPU has one request under way, a host agent 16. What
needs limits is what nobody has to wait for: messages that are refused, repeated, or heartbeats (here: *idle*
messages). Each sender has a token bucket for them, and so have all strangers together, who get new names for nothing.
A sender that goes on when its bucket is empty is *flooding*: its session ends, and what it sends is dropped unread
for a while. Host requests can be large: each agent has a share of the service's time, and what it asks for beyond
that waits.

A flood costs even if it is dropped: so an idle message ends the reading of this turn (`TURN_LIMIT`). Since the socket
takes its peers' messages in turn, everybody else has had one read for each of these.

Pure: the user says what time it is, in seconds, from a clock that does not go back.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from shadowmmu.protocol import messages as m

__all__ = ["Fairness", "TokenBucket", "host_work"]

IDLE_RATE: Final = 200.0
"""Idle messages per second that a sender may go on with. With heartbeats every 0.1 s an honest one sends 10."""
IDLE_BURST: Final = 2000.0
"""So many at once. A conformance check sends some hundred in a row."""
STRANGERS_RATE: Final = 500.0
STRANGERS_BURST: Final = 2000.0
"""The same for all together who have no session. Beyond it they get no answers, and nothing is logged."""
WORK_RATE: Final = 250_000.0
WORK_BURST: Final = 100_000.0
"""Microseconds of `host_work` per second that an agent may have, and at once."""
TURN_LIMIT: Final = 1
"""Idle messages in one turn, after which the rest of the queue waits for the next."""
SENDERS_KEPT: Final = 1024
"""Most senders whose buckets are remembered: those that were heard of last."""
DROPPED_SECONDS: Final = 1.0
"""For so long after its last message a flooder's messages are dropped unread."""


class TokenBucket:
    """`rate` tokens per second come in, up to `burst`."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Takes `cost` tokens, or none and returns False."""
        self._level = min(self._burst, self._level + max(now - self._at, 0.0) * self._rate)
        self._at = now
        if self._level < cost:
            return False
        self._level -= cost
        return True

    def spend(self, now: float, cost: float) -> bool:
        """The same on credit: takes `cost`, however much that is, unless there is debt already."""
        if not self.take(now, 0.0):
            return False
        self._level -= cost
        return True

    def give_back(self, cost: float) -> None:
        """Tokens that were taken for nothing."""
        self._level = min(self._burst, self._level + cost)


class _Sender:
    """What is remembered of one sender; `dropped_until` 0: it is read."""

    __slots__ = ("dropped_until", "idle", "work")

    def __init__(self, now: float) -> None:
        self.idle = TokenBucket(IDLE_RATE, IDLE_BURST, now)
        self.work: TokenBucket | None = None
        self.dropped_until = 0.0


class Fairness:
    """The allowances of all senders, by routing id.

    `idle_in_turn` counts up from `begin_turn`; `turn_is_over` says when to stop reading.
    """

    def __init__(self, now: float) -> None:
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()
        self._strangers = TokenBucket(STRANGERS_RATE, STRANGERS_BURST, now)
        self._idle_in_turn = 0

    def begin_turn(self) -> None:
        """The queue is read again."""
        self._idle_in_turn = 0

    @property
    def turn_is_over(self) -> bool:
        """Enough idle messages were read in this turn."""
        return self._idle_in_turn >= TURN_LIMIT

    def is_dropped(self, sender: bytes, now: float) -> bool:
        """Whether a message of this sender is to be dropped unread; it must be silent for a while to be heard again."""
        known = self._senders.get(sender)
        if known is None or known.dropped_until <= now:
            return False
        known.dropped_until = now + DROPPED_SECONDS
        self._idle_in_turn += 1
        return True

    def allows_idle(self, sender: bytes, now: float, *, stranger: bool) -> bool:
        """Counts an idle message. False: the sender is flooding, nothing of it is answered any more.

        The session of one that has any is then to be ended. Of strangers, False may also mean that there are too many.
        """
        self._idle_in_turn += 1
        known = self._known(sender, now)
        if not known.idle.take(now):
            known.dropped_until = now + DROPPED_SECONDS
            return False
        return not stranger or self._strangers.take(now)

    def allows_work(self, sender: bytes, now: float, work: float) -> bool:
        """Whether a host request of so much work (`host_work`) may begin; if so it is counted. If not, it waits."""
        known = self._known(sender, now)
        if known.work is None:
            known.work = TokenBucket(WORK_RATE, WORK_BURST, now)
        return known.work.spend(now, work)

    def give_back(self, sender: bytes, work: float) -> None:
        """Work that was counted and did not take place."""
        known = self._senders.get(sender)
        if known is not None and known.work is not None:
            known.work.give_back(work)

    def _known(self, sender: bytes, now: float) -> _Sender:
        known = self._senders.get(sender)
        if known is None:
            known = self._senders[sender] = _Sender(now)
            if len(self._senders) > SENDERS_KEPT:
                self._senders.popitem(last=False)
        else:
            self._senders.move_to_end(sender)
        return known


def host_work(operation: m.HostOperation) -> int:
    """About how many microseconds a request takes, with its way through the service.

    Deleting a memory slot takes long and says little: what it costs is counted when the slot is made.
    """
    match operation:
        case m.WritePhys(words):
            return 200 + 6 * len(words)
        case m.UnmapRange(_, npages) | m.SetMemoryRegion(_, _, npages):
            return 200 + 2 * npages
        case m.ReclaimIdle(gfns):
            return 200 + 32 * len(gfns)
        case _:
            return 200
