"""What a timeline consists of: tracks, and what happens on them.

The model is that of Perfetto's track events. On a track of slices each slice begins and ends, and lies within the one
that was open when it began; an instant is a moment on such a track; a flow is an arrow from one slice or instant to the
next that names it, until one that ends it. A track of a counter has values. Times are nanoseconds of the timeline's
axis and do not decrease. Relies on nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TypeAlias

import msgspec

__all__ = [
    "Address",
    "Args",
    "Begin",
    "Category",
    "Count",
    "End",
    "Instant",
    "Item",
    "NewTrack",
    "RecordConsumed",
    "Sink",
    "Track",
    "TrackKind",
]


class TrackKind(enum.Enum):
    """What lies on a track."""

    MACHINE = "machine"  # a virtual machine: the parent of its other tracks; instants only
    SLICES = "slices"
    COUNTER = "counter"


class Category(enum.Enum):
    """What sort of thing a slice or an instant is."""

    GUEST = "guest"  # a vCPU in guest mode
    EXIT = "exit"  # between an exit and the next entry
    OPERATION = "operation"  # a host operation
    LOCK = "lock"  # mmu_lock, held or waited for
    KICK = "kick"  # a remote flush that waits for vCPUs
    SHADOW = "shadow"  # shadow pages
    MEMORY = "memory"  # host frames, memory slots, dirty logs
    FAULT = "fault"  # a page fault that the guest takes
    WORKER = "worker"  # incarnations
    FINDING = "finding"  # violations, failed audits, no progress


class Track(msgspec.Struct, frozen=True):
    """A track; `id` from 1 is unique, `parent` the id of the virtual machine's, 0 for that one itself.

    `rank`: tracks are shown in this order. `note` says in words what the track shows.
    """

    id: int
    parent: int
    kind: TrackKind
    name: str
    rank: int
    note: str = ""


class Address(msgspec.Struct, frozen=True):
    """An argument that people read in hexadecimal."""

    value: int


Args: TypeAlias = tuple[tuple[str, int | str | bool | Address], ...]
"""Names and values that a slice or an instant has with it."""


class _Item(msgspec.Struct, frozen=True, gc=False):
    pass


class NewTrack(_Item, frozen=True):
    """A track; it comes before all that lies on it."""

    track: Track


class Begin(_Item, frozen=True):
    """A slice begins. `flows` lead here or begin here; `ends` are flows that lead here and no further."""

    time: int
    track: int
    name: str
    category: Category
    args: Args = ()
    flows: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class End(_Item, frozen=True):
    """The innermost open slice of the track ends; `args` are added to its own."""

    time: int
    track: int
    args: Args = ()


class Instant(_Item, frozen=True):
    """A moment; `flows` and `ends` as in Begin."""

    time: int
    track: int
    name: str
    category: Category
    args: Args = ()
    flows: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class Count(_Item, frozen=True):
    """The counter has this value from now on."""

    time: int
    track: int
    value: int


class RecordConsumed(_Item, frozen=True):
    """What follows comes of this record of the journal. Nothing to be drawn."""

    time: int
    record: int


Item: TypeAlias = NewTrack | Begin | End | Instant | Count | RecordConsumed
Sink: TypeAlias = Callable[[Item], None]
"""Takes the items of a timeline, in order."""
