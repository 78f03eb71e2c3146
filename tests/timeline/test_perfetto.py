"""Perfetto's files: what must hold of any of them, and that they say what happened."""

from __future__ import annotations

import functools
import io
from collections import Counter

import pytest

from shadowmmu.protocol import events as ev
from shadowmmu.timeline import ALL, Records
from shadowmmu.timeline.perfetto import write_perfetto
from tests.timeline.decoded import Decoded
from tests.timeline.recorded import ALL_RUNS, RUNS, TIMED, recorded, watched

CUMULATIVE = ("exits", "kicks for flushes")

every_run = pytest.mark.parametrize("name", ALL_RUNS)
every_journal = pytest.mark.parametrize("name", RUNS)


@functools.cache
def decoded(name: str, records: Records = ALL) -> Decoded:
    out = io.BytesIO()
    write_perfetto(recorded(name).execution, out, records)
    return Decoded(out.getvalue())


def seen(name: str, kind: type[ev.Event]) -> list[ev.Event]:
    return [event for _, event in watched(name).events if isinstance(event, kind)]


@every_run
def test_everything_resolves_and_slices_nest(name: str) -> None:
    trace = decoded(name)  # Decoded asserts that tracks and interned names exist, and that every slice ends
    for mark in trace.marks:
        assert 0 <= mark.begin <= mark.end
    assert {track.name for track in trace.tracks.values()} >= {
        "vCPU 0",
        "vCPU 1",
        "vCPU 2",
        "mmu_lock",
        "memory",
    }


@every_run
def test_flows_have_both_ends_and_end_once(name: str) -> None:
    for steps in decoded(name).flows().values():
        assert len(steps) >= 2
        assert [ends for _, ends in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[0][0].name == "waits for kicked vCPUs"


def test_an_arrow_leads_from_the_flush_by_the_exit_of_its_target_to_the_flush_again() -> None:
    arrows = decoded("mixed").flows()
    assert arrows
    for asked, answer, flushed in arrows.values():
        assert asked[0].category == "kick"
        assert answer[0].category == "exit" and answer[0].track in str(asked[0].args["kicked"])
        assert flushed[0].name == "kicks answered" and flushed[0].track == asked[0].track
        assert asked[0].begin <= answer[0].begin <= flushed[0].begin == asked[0].end


@every_run
def test_what_only_grows_only_grows_and_nothing_is_negative(name: str) -> None:
    for counter, points in decoded(name).counters.items():
        values = [value for _, value in points]
        assert min(values) >= 0
        if counter in CUMULATIVE:
            assert values == sorted(values)


@every_run
def test_every_exit_and_every_entry_is_there(name: str) -> None:
    trace = decoded(name)
    exits = Counter(event.reason for event in seen(name, ev.Exited) if isinstance(event, ev.Exited))
    shown = Counter(mark.name.removeprefix("exit ") for mark in trace.marks if mark.category == "exit")
    assert shown == exits
    assert sum(mark.category == "guest" for mark in trace.marks) == len(seen(name, ev.Entered))
    assert trace.counters["exits"][-1][1] == exits.total()


@every_journal
def test_sums_agree_with_the_counters_of_the_run(name: str) -> None:
    trace, counters = decoded(name), recorded(name).counters
    names = Counter(mark.name for mark in trace.marks)
    for counter, count in counters.items():
        if counter.startswith("exits."):
            assert names[f"exit {counter.removeprefix('exits.')}"] == count
    assert names["holds mmu_lock"] == counters["lock.taken"]
    assert names["waits for mmu_lock"] == counters.get("lock.waited", 0)
    assert names["shadow page zapped"] == counters["kvm.mmu_shadow_zapped"]
    assert names["inject #PF"] == counters["kvm.pf_guest"]
    assert trace.counters["mmu_unsync"][-1][1] == counters["kvm.mmu_unsync.current"]
    raised_and_not_cleared = counters.get("tlbs_dirty.raised", 0) - counters.get("tlbs_dirty.cleared", 0)
    assert trace.counters["tlbs_dirty"][-1][1] == raised_and_not_cleared
    kicks = sum(
        len(event.targets) for event in seen(name, ev.FlushRequested) if isinstance(event, ev.FlushRequested)
    )
    assert trace.counters["kicks for flushes"][-1][1] == kicks <= counters.get("kicks.sent", 0)


@every_journal
def test_outcomes_of_page_faults_agree_with_the_counters_of_the_run(name: str) -> None:
    outcomes = Counter(
        f"outcome.{mark.name}.{mark.args['outcome']}"
        for mark in decoded(name).marks
        if mark.category == "operation" and mark.name.startswith("vcpu.") and "outcome" in mark.args
    )
    counters = recorded(name).counters
    counted = {key: count for key, count in counters.items() if key.startswith("outcome.vcpu.") and count}
    assert outcomes == counted


@every_run
def test_one_operation_at_a_time_on_a_track_and_one_holder_of_mmu_lock(name: str) -> None:
    trace = decoded(name)
    for mark in trace.marks:
        if mark.category in ("guest", "exit") or mark.track == "mmu_lock":
            assert mark.depth == 0
        elif mark.category == "operation":
            assert mark.depth == (0 if mark.track.startswith("host agent") else mark.depth) <= 1
    holders = [mark for mark in trace.marks if mark.track == "mmu_lock"]
    held = [mark for mark in trace.marks if mark.name == "holds mmu_lock"]
    assert [mark.begin for mark in holders] == [mark.begin for mark in held]


def test_concurrent_operations_of_the_host_have_tracks_of_their_own() -> None:
    tracks = {mark.track for mark in decoded("mixed").marks if mark.name.startswith("host.")}
    assert {"host agent 0", "host agent 1"} <= tracks


def test_a_violation_is_marked() -> None:
    (found,) = watched("violated").violations
    marks = [mark for mark in decoded("violated").marks if mark.name == "violation"]
    assert [(mark.begin, mark.args["text"]) for mark in marks] == [found]
    assert not [mark for mark in decoded("mixed").marks if mark.category == "finding"]


def test_what_is_under_way_when_a_run_stops_is_unfinished() -> None:
    assert any(mark.args.get("unfinished") for mark in decoded("stopped").marks)
    assert not any(mark.args.get("unfinished") for mark in decoded("mixed").marks)


def test_lost_workers_leave_their_tracks_in_order() -> None:
    marks = decoded("lost-workers").marks
    gone = [mark for mark in marks if mark.name == "worker gone" and mark.args["reason"] == "given-up"]
    assert gone
    assert all(mark.args["exit"] for mark in marks if mark.category == "guest")


@every_journal
def test_a_window_shows_that_part_as_the_whole_does(name: str) -> None:
    last = recorded(name).counters["records"]
    window = decoded(name, Records(last // 3, 2 * last // 3))
    for steps in window.flows().values():
        assert len(steps) >= 2 and steps[-1][1]
    whole = decoded(name)
    times = [mark.begin for mark in window.marks]
    inside = [mark for mark in whole.marks if min(times) < mark.begin < max(times)]
    shown = [mark for mark in window.marks if min(times) < mark.begin < max(times)]
    assert inside and [(m.track, m.name, m.begin) for m in shown] == [
        (m.track, m.name, m.begin) for m in inside
    ]
    assert max(mark.end for mark in window.marks) < max(mark.end for mark in whole.marks)


def test_windows_side_by_side_are_the_whole() -> None:
    middle = recorded("mixed").counters["records"] // 2
    first, second = decoded("mixed", Records(0, middle)), decoded("mixed", Records(middle + 1))
    exits = [sum(mark.category == "exit" for mark in trace.marks) for trace in (first, second)]
    at_the_border = {mark.begin for mark in second.marks if mark.category == "exit"} & {
        mark.end for mark in first.marks if mark.category == "exit"
    }
    whole = sum(mark.category == "exit" for mark in decoded("mixed").marks)
    assert whole <= sum(exits) <= whole + 3
    assert at_the_border or sum(exits) == whole


def test_in_virtual_time_arrows_do_not_lead_back() -> None:
    for steps in decoded(TIMED).flows().values():
        times = [mark.begin for mark, _ in steps]
        assert times == sorted(times)
        assert steps[-1][0].name == "kicks answered"
