"""Which faults a chaos run is to have: a seeded plan. Pure.

A fault is due when the guests have executed so many instructions, not at a time of day: so a plan means much the same
on a fast machine and on a slow one. A process is killed fewer times than it is started again.
"""

from __future__ import annotations

import enum
import random
from typing import Final

import msgspec

__all__ = ["COORDINATOR", "MMU", "Fault", "FaultKind", "host_name", "plan", "worker_name"]

COORDINATOR: Final = "coordinator"
MMU: Final = "mmu"
MOST_KILLS: Final = 4
"""Of one process."""
FIRST: Final = 0.05
LAST: Final = 0.85
"""Between these fractions of the run faults happen: before and after there is nobody to be hit."""
LONGEST_STOP: Final = 8.0
"""Seconds; more than it takes until a silent process is given up, less than until one that hangs is killed."""


class FaultKind(enum.Enum):
    """What is done to a process."""

    KILL = "killed"  # SIGKILL
    STOP = "stopped"  # SIGSTOP, and SIGCONT after a while
    CUT = "cut off"  # all its connections are closed
    HALF_OPEN = "half open"  # nothing passes on its connections, and nobody is told


_WEIGHTS: Final = {FaultKind.KILL: 5, FaultKind.STOP: 2, FaultKind.CUT: 3, FaultKind.HALF_OPEN: 1}


class Fault(msgspec.Struct, frozen=True):
    """`target` is the name of a process; due after `at` instructions. `seconds`: how long it is stopped."""

    at: int
    kind: FaultKind
    target: str
    seconds: float = 0.0


def worker_name(number: int) -> str:
    """The name of a vCPU worker."""
    return f"worker-{number}"


def host_name(number: int) -> str:
    """The name of a host agent."""
    return f"host-{number}"


def plan(seed: int, ops: int, vcpus: int, hosts: int, faults: int) -> list[Fault]:
    """So many faults, in the order in which they are due, for a run of `ops` instructions."""
    source = random.Random(f"chaos {seed}")
    workers = [worker_name(number) for number in range(vcpus)]
    agents = [host_name(number) for number in range(hosts)]
    # Each kind of process is hit as often as the others, however many of it there are.
    groups = [group for group in ([MMU], [COORDINATOR], workers, agents) if group]
    kills: dict[str, int] = {}
    planned = []
    for at in sorted(int(ops * source.uniform(FIRST, LAST)) for _ in range(faults)):
        target = source.choice(source.choice(groups))
        (kind,) = source.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        if kind is FaultKind.KILL and kills.get(target, 0) == MOST_KILLS:
            kind = FaultKind.CUT
        if kind is FaultKind.KILL:
            kills[target] = kills.get(target, 0) + 1
        seconds = round(source.uniform(0.2, LONGEST_STOP), 1) if kind is FaultKind.STOP else 0.0
        planned.append(Fault(at, kind, target, seconds))
    return planned
