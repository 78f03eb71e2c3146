"""A part of a timeline: what crosses its borders."""

from __future__ import annotations

from shadowmmu.timeline import Records
from shadowmmu.timeline.model import (
    Begin,
    Category,
    Count,
    End,
    Instant,
    Item,
    NewTrack,
    RecordConsumed,
    Track,
    TrackKind,
)
from shadowmmu.timeline.window import Window

MACHINE, VCPU, HOST, COUNTER = 1, 2, 3, 4
TRACKS = [
    NewTrack(Track(MACHINE, 0, TrackKind.MACHINE, "vm", 0)),
    *(NewTrack(Track(n, MACHINE, TrackKind.SLICES, "", 0)) for n in (VCPU, HOST)),
    NewTrack(Track(COUNTER, MACHINE, TrackKind.COUNTER, "", 0)),
]


def record(number: int) -> RecordConsumed:
    """At time 10 times its number."""
    return RecordConsumed(number * 10, number)


def asks(time: int, *flows: int) -> Begin:
    return Begin(time, HOST, "waits", Category.KICK, flows=flows)


def leaves(time: int, *flows: int, ends: tuple[int, ...] = ()) -> Begin:
    return Begin(time, VCPU, "exit", Category.EXIT, flows=flows, ends=ends)


def answered(time: int, *ends: int) -> Instant:
    return Instant(time, HOST, "answered", Category.KICK, ends=ends)


def window(records: Records, *items: Item) -> list[Item]:
    shown: list[Item] = []
    sink = Window(shown.append, records)
    for item in (*TRACKS, *items):
        sink(item)
    assert shown[: len(TRACKS)] == TRACKS
    return shown[len(TRACKS) :]


def test_what_is_open_at_the_borders_begins_and_ends_there_and_counters_have_their_values() -> None:
    shown = window(
        Records(2, 3),
        record(1),
        leaves(12),
        Count(13, COUNTER, 5),
        record(2),
        Count(25, COUNTER, 6),
        record(4),
        End(45, VCPU),
        Count(46, COUNTER, 7),
    )
    assert shown == [Count(20, COUNTER, 5), leaves(20), Count(25, COUNTER, 6), End(40, VCPU)]


def test_an_arrow_on_its_way_at_the_beginning_begins_there() -> None:
    shown = window(
        Records(2), record(1), asks(11, 7, 8), leaves(12, 7), record(2), answered(22, 7, 8), End(23, HOST)
    )
    assert shown == [
        asks(20, 7, 8),
        leaves(20, 7),
        Instant(22, HOST, "answered", Category.KICK, ends=(7, 8)),
        End(23, HOST),
    ]


def test_an_arrow_that_has_ended_before_is_not_in_a_slice_that_is_still_open() -> None:
    shown = window(
        Records(2),
        record(1),
        asks(11, 7),
        leaves(12, 7),
        answered(13, 7),
        End(14, HOST),
        record(2),
        End(22, VCPU),
    )
    assert shown == [leaves(20), End(22, VCPU)]


def test_an_end_whose_beginning_is_not_shown_is_left_out() -> None:
    shown = window(
        Records(2), record(1), asks(11, 7), End(12, HOST), record(2), leaves(22, ends=(7,)), End(23, VCPU)
    )
    assert shown == [leaves(22), End(23, VCPU)]


def test_an_arrow_on_its_way_at_the_end_ends_there() -> None:
    shown = window(
        Records(0, 1), record(1), asks(11, 7), record(2), leaves(22, 7), answered(23, 7), End(24, HOST)
    )
    later = Instant(20, MACHINE, "answered later", Category.KICK, ends=(7,))
    assert shown == [asks(11, 7), later, End(20, HOST)]


def test_arrows_keep_their_direction_at_the_border_whatever_the_order_of_tracks() -> None:
    before = (Begin(8, VCPU, "guest", Category.GUEST), asks(11, 7), End(12, VCPU), leaves(12, 7))
    shown = window(Records(2), *before, record(2), answered(22, 7))
    assert [item.name for item in shown if isinstance(item, Begin | Instant)] == ["waits", "exit", "answered"]
