"""A part of a timeline: from one record of the journal to another.

What is open where the window begins, begins there; what is open where it ends, ends there. Arrows of which one end lies
outside are left out on that side: they end with the window, or begin where the window begins.
"""

from __future__ import annotations

import itertools
from typing import Final

import msgspec

from shadowmmu.timeline.model import (
    Begin,
    Category,
    Count,
    End,
    Instant,
    Item,
    NewTrack,
    RecordConsumed,
    Sink,
)

__all__ = ["ALL", "Records", "Window"]


class Records(msgspec.Struct, frozen=True):
    """Records of a journal, from `first` to `last` (None: to the end)."""

    first: int = 0
    last: int | None = None

    def has(self, record: int) -> bool:
        """Whether the record is one of them."""
        return self.first <= record and (self.last is None or record <= self.last)


ALL: Final = Records()


class Window:
    """A sink that hands on what follows from these records."""

    def __init__(self, sink: Sink, records: Records) -> None:
        self._sink = sink
        self._records = records
        self._open: dict[int, list[Begin]] = {}
        self._counts: dict[int, int] = {}
        self._live: set[int] = set()  # flows that have begun and not ended
        self._shown: set[int] = set()  # those of them that were handed on
        self._inside = records.has(0)
        self._over = False
        self._machine = 0

    def __call__(self, item: Item) -> None:
        """The next item."""
        match item:
            case NewTrack():
                self._machine = self._machine or item.track.id
                self._sink(item)
                return
            case RecordConsumed():
                self._record(item)
                return
            case Begin():
                self._open.setdefault(item.track, []).append(item)
                self._flow(item)
            case Instant():
                self._flow(item)
            case End():
                self._open[item.track].pop()
            case Count():
                self._counts[item.track] = item.value
        if self._inside:
            self._hand_on(item)

    def _record(self, item: RecordConsumed) -> None:
        inside = self._records.has(item.record)
        if self._over or inside == self._inside:
            return
        if inside:
            self._begin(item.time)
        else:
            self._close(item.time)

    def _flow(self, item: Begin | Instant) -> None:
        self._live.update(item.flows)
        self._live.difference_update(item.ends)

    def _hand_on(self, item: Begin | Instant | End | Count) -> None:
        if isinstance(item, Begin | Instant) and (item.flows or item.ends):
            # An end of which nothing was shown would be an arrow from nowhere.
            item = msgspec.structs.replace(
                item, ends=tuple(flow for flow in item.ends if flow in self._shown)
            )
            self._shown.difference_update(item.ends)
            self._shown.update(item.flows)
        self._sink(item)

    def _begin(self, time: int) -> None:
        self._inside = True
        for track, value in self._counts.items():
            self._sink(Count(time, track, value))
        # In the order in which they began: arrows lead from one to the next.
        for begun in sorted(itertools.chain(*self._open.values()), key=lambda begun: begun.time):
            flows = tuple(flow for flow in begun.flows if flow in self._live)
            self._hand_on(msgspec.structs.replace(begun, time=time, flows=flows, ends=()))

    def _close(self, time: int) -> None:
        if self._inside:
            if self._shown:
                ends = tuple(sorted(self._shown))
                self._sink(Instant(time, self._machine, "answered later", Category.KICK, ends=ends))
            for track, stack in self._open.items():
                for _ in stack:
                    self._sink(End(time, track))
        self._inside = False
        self._over = True
