"""What a step has touched, as far as it matters for whether two steps commute.

A footprint is coarse on purpose: most steps of host operations touch too much to say. Told apart are the steps of vCPUs
in guest mode: a load, a store, a level of a walk. Two steps commute if neither order can be told from the other, by
the machine, by a program, or by the checker, which sees the order of events.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, TypeAlias

from shadowmmu.protocol.events import (
    Accesses,
    AccessFlag,
    Event,
    InputConsumed,
    LockTaken,
    OperationEnded,
    OperationStarted,
)

__all__ = ["Footprint", "Kind", "commute", "footprint_of"]


class Kind(enum.Enum):
    """What a step did."""

    LOAD = "load"  # of a vCPU in guest mode, by its TLB
    STORE = "store"  # likewise
    WALK_LEVEL = "walk"  # a level of a hardware walk that is not over; only reads shadow tables
    QUIET = "quiet"  # of a host operation, without an event that anybody's access is judged by
    ANYTHING = "anything"


Footprint: TypeAlias = tuple[Kind, int]
"""What was done, and the 8-byte word of guest memory (gpa >> 3) that was loaded or stored, -1 without one."""

_WRITE: Final = int(AccessFlag.WRITE)
_USED: Final = int(AccessFlag.USED)
_UNTOLD: Final = (InputConsumed, OperationStarted, OperationEnded, LockTaken)


def footprint_of(events: Sequence[Event], in_guest: bool, walking: bool) -> Footprint:
    """The footprint of a step that made these events.

    `in_guest`: of a vCPU in guest mode, before and after it; `walking`: it stands in a walk after it.
    """
    told = [event for event in events if not isinstance(event, _UNTOLD)]
    if in_guest:
        if walking and not told:
            return Kind.WALK_LEVEL, -1
        if len(told) == 1 and isinstance(told[0], Accesses) and len(told[0].items) == 1:
            flags, gva, gfn, _, _, _ = told[0].items[0]
            word = gfn << 9 | (gva & 0xFFF) >> 3
            return (Kind.STORE if flags & _WRITE else Kind.LOAD), word
        return Kind.ANYTHING, -1
    return (Kind.ANYTHING if told else Kind.QUIET), -1


_COMMUTE: Final = frozenset(
    {
        frozenset({Kind.LOAD}),
        frozenset({Kind.LOAD, Kind.WALK_LEVEL}),
        frozenset({Kind.STORE, Kind.WALK_LEVEL}),
        frozenset({Kind.WALK_LEVEL}),
        frozenset({Kind.LOAD, Kind.QUIET}),
    }
)


def commute(a: Footprint, b: Footprint) -> bool:
    """Whether the order of two steps of different actors makes no difference."""
    kinds = frozenset({a[0], b[0]})
    if kinds in _COMMUTE:
        return True
    return kinds <= {Kind.LOAD, Kind.STORE} and a[1] != b[1]
