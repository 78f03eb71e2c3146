"""Draws on tracks: puts a time on what happens.

The clocks of different vCPUs may disagree by a little in virtual time; on a track time never goes back.
"""

from __future__ import annotations

from shadowmmu.timeline.model import (
    Args,
    Begin,
    Category,
    Count,
    End,
    Instant,
    NewTrack,
    Sink,
    Track,
    TrackKind,
)

__all__ = ["Pen"]


class Pen:
    """Gives items to `sink`. `now`, in nanoseconds, is for its user to set."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._last = [0]  # per track, by its id
        self.now = 0

    def track(self, kind: TrackKind, name: str, rank: int, note: str = "") -> int:
        """A new track; the first is the virtual machine's, to which all others belong. Returns its id."""
        number = len(self._last)
        self._last.append(0)
        self._sink(NewTrack(Track(number, min(number - 1, 1), kind, name, rank, note)))
        return number

    def _time(self, track: int) -> int:
        time = max(self.now, self._last[track])
        self._last[track] = time
        return time

    def begin(
        self,
        track: int,
        name: str,
        category: Category,
        args: Args = (),
        *,
        flows: tuple[int, ...] = (),
        ends: tuple[int, ...] = (),
    ) -> None:
        """A slice begins; see `model.Begin`."""
        self._sink(Begin(self._time(track), track, name, category, args, flows, ends))

    def end(self, track: int, args: Args = ()) -> None:
        """The innermost open slice ends."""
        self._sink(End(self._time(track), track, args))

    def instant(
        self,
        track: int,
        name: str,
        category: Category,
        args: Args = (),
        *,
        flows: tuple[int, ...] = (),
        ends: tuple[int, ...] = (),
    ) -> None:
        """A moment; see `model.Instant`."""
        self._sink(Instant(self._time(track), track, name, category, args, flows, ends))

    def count(self, track: int, value: int) -> None:
        """A counter's new value."""
        self._sink(Count(self._time(track), track, value))
