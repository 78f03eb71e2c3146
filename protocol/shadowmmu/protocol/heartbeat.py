"""Heartbeats: when to send one, and when a peer is given up.

Pure: the user says what time it is (seconds, from any clock that does not go back). Any message counts as a sign of
life, in either direction. Silence is counted only while we ourselves were looking: after a pause of our own (a
stopped process, a blocked loop) the peer's messages may still lie unread in the socket, so one look never counts for
more than one interval.
"""

from __future__ import annotations

__all__ = ["MISSED_LIMIT", "HeartbeatTimer"]

MISSED_LIMIT = 5
"""A peer is given up after the silence of this many intervals, unless configured otherwise."""


class HeartbeatTimer:
    """The heartbeats of one connection, both directions.

    Call `sent` and `heard` for every message (not only heartbeats), `due` to learn whether a heartbeat should be
    sent now, and `expired` about once per interval (at least) to learn whether the peer should be given up.
    """

    __slots__ = ("_last_look", "_last_sent", "_silence", "interval", "missed")

    def __init__(self, interval: float, now: float, *, missed: int = MISSED_LIMIT) -> None:
        if not interval > 0 or missed < 1:
            raise ValueError(f"interval {interval} and missed {missed} must be positive")
        self.interval = interval
        self.missed = missed
        self._last_sent = now
        self._last_look = now
        self._silence = 0.0

    def sent(self, now: float) -> None:
        """We sent something."""
        self._last_sent = now

    def heard(self, now: float) -> None:
        """The peer sent something."""
        self._silence = 0.0
        self._last_look = now

    def due(self, now: float) -> bool:
        """Whether we have been silent for an interval."""
        return now - self._last_sent >= self.interval

    def expired(self, now: float) -> bool:
        """Whether the peer has been silent for `missed` intervals during which we were awake to hear it."""
        self._silence += min(max(now - self._last_look, 0.0), self.interval)
        self._last_look = now
        return self._silence >= self.missed * self.interval

    @property
    def silence(self) -> float:
        """Seconds of silence counted by the last `expired`."""
        return self._silence
