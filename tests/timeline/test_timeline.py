"""What becomes of single events: the timeline as a function."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.protocol import events as ev
from shadowmmu.timeline import build
from shadowmmu.timeline.model import Begin, Category, Count, End, Instant, Item, NewTrack
from shadowmmu.timeline.sorter import Sorter


def items(*events: tuple[int, ev.Event]) -> list[Item]:
    found: list[Item] = []
    build(events, found.append, "vm", "steps")
    return found


def drawing(*events: tuple[int, ev.Event]) -> list[str]:
    """Slices and instants, indented by how deep they lie, as `TIME TRACK: NAME`."""
    tracks: dict[int, str] = {}
    depth: dict[int, int] = {}
    rows = []
    for item in items(*events):
        match item:
            case NewTrack():
                tracks[item.track.id] = item.track.name
            case Begin() | Instant():
                indent = "  " * depth.get(item.track, 0)
                rows.append(f"{item.time} {tracks[item.track]}: {indent}{item.name}")
                depth[item.track] = depth.get(item.track, 0) + isinstance(item, Begin)
            case End():
                depth[item.track] -= 1
                rows.append(f"{item.time} {tracks[item.track]}: {'  ' * depth[item.track]}end")
            case _:
                pass
    return rows


def test_an_exit_its_operation_and_mmu_lock() -> None:
    assert drawing(
        (1, ev.Entered(0, 1, False, 7)),
        (5, ev.Exited(0, 1, "page_fault", 0x1000, 2)),
        (6, ev.OperationStarted(1, 0, "vcpu.page_fault")),
        (7, ev.LockTaken(1)),
        (9, ev.LockReleased(1)),
        (10, ev.OperationEnded(1)),
        (11, ev.Entered(0, 2, True, 7)),
    ) == [
        "1 vCPU 0: guest mode",
        "5 vCPU 0: end",
        "5 vCPU 0: exit page_fault",
        "6 vCPU 0:   vcpu.page_fault",
        "7 vCPU 0:     holds mmu_lock",
        "7 mmu_lock: vCPU 0",
        "9 vCPU 0:     end",
        "9 mmu_lock: end",
        "10 vCPU 0:   end",
        "11 vCPU 0: end",
        "11 vCPU 0: guest mode",
        "11 vCPU 0: end",
    ]


def test_who_waits_for_mmu_lock_is_in_the_queue_until_it_has_it() -> None:
    found = items(
        (1, ev.OperationStarted(1, 0, "vcpu.page_fault")),
        (1, ev.OperationStarted(2, -1, "host.unmap")),
        (2, ev.LockTaken(1)),
        (3, ev.LockWaited(2)),
        (8, ev.LockReleased(1)),
        (9, ev.LockTaken(2)),
        (10, ev.LockReleased(2)),
    )
    track = next(
        i.track.id for i in found if isinstance(i, NewTrack) and i.track.name == "waiting for mmu_lock"
    )
    assert [(i.time, i.value) for i in found if isinstance(i, Count) and i.track == track] == [
        (0, 0),
        (3, 1),
        (9, 0),
    ]


def test_concurrent_operations_of_the_host_take_the_lowest_free_track() -> None:
    rows = drawing(
        (1, ev.OperationStarted(1, -1, "host.age")),
        (2, ev.OperationStarted(2, -1, "host.unmap")),
        (3, ev.OperationEnded(1)),
        (4, ev.OperationStarted(3, -1, "host.move")),
    )
    assert [row for row in rows if "host." in row] == [
        "1 host agent 0: host.age",
        "2 host agent 1: host.unmap",
        "4 host agent 0: host.move",
    ]


def test_an_operation_outlives_the_worker_that_caused_it() -> None:
    rows = drawing(
        (1, ev.Entered(0, 1, False, 7)),
        (2, ev.Exited(0, 1, "invlpg", 0x1000, 0)),
        (3, ev.OperationStarted(1, 0, "vcpu.invlpg")),
        (4, ev.IncarnationEnded(0, 1, "given-up")),
        (5, ev.IncarnationStarted(0, 2)),
        (6, ev.OperationEnded(1)),
        (7, ev.OperationStarted(2, 0, "vcpu.enter")),
        (8, ev.OperationEnded(2)),
    )
    assert rows[2:] == [
        "2 vCPU 0: exit invlpg",
        "3 vCPU 0:   vcpu.invlpg",
        "4 vCPU 0:     worker gone",
        "5 vCPU 0:     worker attached",
        "6 vCPU 0:   end",
        "6 vCPU 0: end",
        "7 vCPU 0: vcpu.enter",
        "8 vCPU 0: end",
    ]


def test_a_flush_whose_target_is_lost_has_its_answer_there() -> None:
    found = items(
        (1, ev.Entered(1, 4, False, 7)),
        (2, ev.OperationStarted(1, -1, "host.unmap")),
        (3, ev.FlushRequested(1, [(1, 4)])),
        (5, ev.IncarnationEnded(1, 1, "given-up")),
        (5, ev.FlushAnswered(1)),
        (6, ev.OperationEnded(1)),
    )
    (asked,) = [i for i in found if isinstance(i, Begin) and i.category is Category.KICK]
    (gone,) = [i for i in found if isinstance(i, Instant) and i.name == "worker gone"]
    (answered,) = [i for i in found if isinstance(i, Instant) and i.name == "kicks answered"]
    assert asked.flows == gone.flows == answered.ends != ()


def test_a_zapped_page_is_neither_in_use_nor_unsync_but_a_root_stays_until_nobody_has_it() -> None:
    def last_counts(*events: ev.Event) -> tuple[int, int]:
        found = items(*enumerate(events))
        names = {i.track.id: i.track.name for i in found if isinstance(i, NewTrack)}
        last = {names[i.track]: i.value for i in found if isinstance(i, Count)}
        return last["shadow pages in use"], last["mmu_unsync"]

    made = (
        ev.ShadowPageCreated(1, 16, 1, False, 0),
        ev.ShadowPageUnsynced(1, 16),
        ev.ShadowPageCreated(2, 17, 4, False, 0),
    )
    assert last_counts(*made) == (2, 1)
    assert last_counts(*made, ev.ShadowPageZapped(1, 16, False)) == (1, 0)
    assert last_counts(*made, ev.ShadowPageZapped(2, 17, True)) == (2, 1)
    assert last_counts(*made, ev.ShadowPageZapped(2, 17, True), ev.ShadowPageZapped(2, 17, False)) == (1, 1)


def test_on_a_track_time_does_not_go_back() -> None:
    rows = drawing(
        (9, ev.OperationStarted(1, 0, "vcpu.page_fault")),
        (9, ev.LockTaken(1)),
        (9, ev.LockReleased(1)),
        (7, ev.OperationStarted(2, 1, "vcpu.invlpg")),
        (7, ev.LockTaken(2)),
        (8, ev.LockReleased(2)),
    )
    assert [row for row in rows if "mmu_lock:" in row] == [
        "9 mmu_lock: vCPU 0",
        "9 mmu_lock: end",
        "9 mmu_lock: vCPU 1",
        "9 mmu_lock: end",
    ]
    assert "7 vCPU 1: vcpu.invlpg" in rows


@given(st.lists(st.integers(0, 50)), st.integers(0, 60))
def test_the_sorter_hands_on_everything_and_in_order_if_nothing_is_too_late(
    times: list[int], depth: int
) -> None:
    out: list[tuple[int, int]] = []
    sorter = Sorter(out.append, depth)
    for index, time in enumerate(times):
        sorter.put(time, (time, index))
    sorter.end()
    assert sorted(out) == sorted((time, index) for index, time in enumerate(times))
    if depth >= len(times):
        assert out == sorted(out)


@pytest.mark.skipif(
    "PERFETTO_TP" not in os.environ, reason="PERFETTO_TP does not name trace_processor's binary"
)
def test_the_trace_processor_reads_it(tmp_path: Path) -> None:
    from shadowmmu.timeline.perfetto import write_perfetto
    from tests.timeline.recorded import recorded, watched

    path = tmp_path / "run.pftrace"
    with path.open("wb") as out:
        write_perfetto(recorded("mixed").execution, out)
    query = tmp_path / "query.sql"
    query.write_text(
        "select (select count(*) from slice where category = 'exit'), "
        "(select value from stats where name = 'misplaced_end_event');"
    )
    done = subprocess.run(
        [os.environ["PERFETTO_TP"], "-q", str(query), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    exits = sum(isinstance(event, ev.Exited) for _, event in watched("mixed").events)
    assert done.stdout.splitlines()[-1] == f"{exits},0"


def test_an_exit_answers_every_kick_of_its_entry() -> None:
    found = items(
        (1, ev.Entered(1, 4, False, 7)),
        (2, ev.OperationStarted(1, -1, "host.unmap")),
        (2, ev.OperationStarted(2, 0, "vcpu.page_fault")),
        (3, ev.FlushRequested(1, [(1, 4)])),
        (4, ev.FlushRequested(2, [(1, 4), (2, 9)])),
        (5, ev.Exited(1, 4, "external_interrupt", -1, 0)),
        (5, ev.FlushAnswered(1)),
    )
    names = {i.track.id: i.track.name for i in found if isinstance(i, NewTrack)}
    assert [i.value for i in found if isinstance(i, Count) and names[i.track] == "unanswered kicks"] == [
        0,
        1,
        3,
        1,
    ]
    first, second = (i.flows for i in found if isinstance(i, Begin) and i.category is Category.KICK)
    (left,) = (i for i in found if isinstance(i, Begin) and i.category is Category.EXIT)
    assert left.flows == (*first, second[0])
    (loose,) = (i for i in found if isinstance(i, Instant) and i.name == "kicks unanswered")
    assert loose.ends == second
