"""Who can take a step in an exploration, as small numbers that a schedule is made of.

| actor | its step |
| --- | --- |
| `vN` | vCPU N: one instruction, one level of a walk, or, after an exit, its host operation to where that stops next |
| `kN` | the kick that was sent to vCPU N arrives, and it leaves guest mode |
| `hN` | host thread N: its next operation begins, or goes on to where it stops next |
| `dN` | the oldest store in the store buffer of vCPU N's host thread becomes visible (only with TSO) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Final, TypeAlias

__all__ = [
    "KIND",
    "Actor",
    "actor_name",
    "drain",
    "format_schedule",
    "host",
    "is_drain",
    "kick",
    "number",
    "parse_schedule",
    "vcpu",
]

Actor: TypeAlias = int

KIND: Final = 64
"""Numbers of one kind; a scenario has at most so many vCPUs and host threads."""
_LETTERS: Final = "vkhd"


def vcpu(index: int) -> Actor:
    """A vCPU."""
    return index


def kick(index: int) -> Actor:
    """A kick on its way to a vCPU."""
    return KIND + index


def host(index: int) -> Actor:
    """A host thread."""
    return 2 * KIND + index


def drain(index: int) -> Actor:
    """The store buffer of a vCPU's host thread."""
    return 3 * KIND + index


def is_drain(actor: Actor) -> bool:
    """Whether it is a store buffer."""
    return actor >= 3 * KIND


def number(actor: Actor) -> int:
    """The vCPU's or host thread's number."""
    return actor % KIND


def actor_name(actor: Actor) -> str:
    """`v0`, `k1`, `h0`, `d1`."""
    return f"{_LETTERS[actor // KIND]}{actor % KIND}"


def format_schedule(schedule: Iterable[Actor]) -> str:
    """A schedule as text, runs of the same actor counted: `v0*3 h0 v1*2`."""
    parts = []
    for actor, run in groupby(schedule):
        count = len(list(run))
        parts.append(actor_name(actor) + (f"*{count}" if count > 1 else ""))
    return " ".join(parts)


def parse_schedule(text: str) -> list[Actor]:
    """The schedule that `format_schedule` wrote. Raises ValueError."""
    schedule: list[Actor] = []
    for part in text.split():
        match = re.fullmatch(r"([vkhd])(\d+)(?:\*(\d+))?", part, re.ASCII)
        if match is None or int(match[2]) >= KIND:
            raise ValueError(f"{part!r} is no step of a schedule")
        schedule += [_LETTERS.index(match[1]) * KIND + int(match[2])] * int(match[3] or 1)
    return schedule
