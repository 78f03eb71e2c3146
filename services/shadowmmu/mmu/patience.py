"""How long the service lets parked operations wait for what workers are about to send.

An operation is parked at a point so that something of another vCPU falls there. When all that came is dealt with, there
may be more on its way: the service waits for it a little before parked operations go on early. Where nothing has fallen
yet it waits longer, by the clock, if the next move is a worker's: that may be waiting for a processor.

Pure: the user says what time it is, in seconds, from a clock that does not go back.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.machine import Machine

__all__ = ["PATIENCE_SECONDS", "Patience", "worker_next"]

TURNS: Final = 4
"""Turns of the service without a message after which what may be on its way has come, or is late."""
PATIENCE_SECONDS: Final = 0.05
"""The longest wait after the last message, at a point at which nothing has fallen yet: more than a worker waits for a
processor if there are some times as many processes as processors.
"""


class Patience:
    """Asked once a turn. `seconds`: the longest wait, see PATIENCE_SECONDS; 0 for who has all messages at hand."""

    def __init__(self, now: float, seconds: float = PATIENCE_SECONDS) -> None:
        self._seconds = seconds
        self._heard = now
        self._turns = 0  # since a message came

    def heard(self, now: float) -> None:
        """A message came that is more than a sign of life."""
        self._heard = now
        self._turns = 0

    def left(self, now: float, *, worker_next: bool) -> float | None:
        """Seconds that parked operations still wait if nothing comes: 0.0 until the next turn, None: they go on.

        `worker_next`: some of them are where nothing has fallen yet, and it is for a worker to send.
        """
        self._turns += 1
        if self._turns <= TURNS:
            return 0.0
        left = self._heard + self._seconds - now
        return left if worker_next and left > 0.0 else None


def worker_next(machine: Machine) -> bool:
    """Whether an operation is parked where nothing has fallen yet, while some vCPU has all its answers."""
    return machine.parked_uncovered and any(
        lane.incarnation and lane.task is None and not lane.halted and not lane.runnable
        for lane in machine.lanes
    )
