"""The text form: lines as the kernel prints them, that say what happened."""

from __future__ import annotations

from collections import Counter

import pytest

from shadowmmu.protocol import events as ev
from shadowmmu.timeline import Records
from shadowmmu.timeline.ftrace import FtraceLines
from tests.timeline.ftrace_lines import lines, text
from tests.timeline.print_formats import DATA
from tests.timeline.recorded import ALL_RUNS, recorded, watched

every_run = pytest.mark.parametrize("name", ALL_RUNS)


def count(name: str, kind: type[ev.Event]) -> int:
    return sum(isinstance(event, kind) for _, event in watched(name).events)


@every_run
def test_every_line_is_as_the_kernel_prints_it(name: str) -> None:
    assert lines(name)


@every_run
def test_lines_are_in_order_and_name_their_tasks(name: str) -> None:
    times = [float(line.time) for line in lines(name)]
    assert times == sorted(times)
    for line in lines(name):
        vcpu = line.fields.get("vcpu_id")
        if vcpu is not None:
            assert (line.comm, line.pid, line.cpu) == (f"vcpu-{vcpu}", 1000 + int(vcpu), int(vcpu))


@every_run
def test_there_is_a_line_for_every_event(name: str) -> None:
    shown = Counter(line.event for line in lines(name))
    assert shown["kvm_entry"] == count(name, ev.Entered)
    assert shown["kvm_exit"] == count(name, ev.Exited)
    made = [line for line in lines(name) if line.fields.get("created") == "new"]
    assert len(made) == count(name, ev.ShadowPageCreated)
    assert shown["kvm_mmu_unsync_page"] == count(name, ev.ShadowPageUnsynced)
    assert shown["kvm_mmu_sync_page"] == count(name, ev.ShadowPageSynced)
    assert shown["kvm_mmu_prepare_zap_page"] == count(name, ev.ShadowPageZapped)


def test_the_head_is_the_kernels() -> None:
    ours = text("mixed").splitlines()[:12]
    real = (DATA / "kernel-6.1.txt").read_text().splitlines()[:12]
    assert ours[:2] + ours[3:] == real[:2] + real[3:]
    written = len(lines("mixed"))
    assert ours[2].startswith(f"# entries-in-buffer/entries-written: {written}/{written}   #P:")


def test_pages_are_shown_as_they_are_before_the_change() -> None:
    for name in ("mixed", "linux-3.1"):
        states = {"kvm_mmu_unsync_page": "sync", "kvm_mmu_sync_page": "unsync"}
        shown = [line for line in lines(name) if line.event in states]
        assert {line.event for line in shown} == set(states)
        for line in shown:
            assert line.fields["unsync"] == states[line.event]


def test_levels_follow_the_guest_tables() -> None:
    pages = [line for line in lines("mixed") if line.event == "kvm_mmu_get_page"]
    assert {line.fields["level"] for line in pages} == {"1", "2", "3", "4"}
    assert {line.fields["has_4_byte_gpte"] for line in pages} == {"8"}
    created = {
        (event.gfn, event.level)
        for _, event in watched("mixed").events
        if isinstance(event, ev.ShadowPageCreated)
    }
    assert {(int(line.fields["gfn"], 16), int(line.fields["level"])) for line in pages} == created


def test_what_exits_are_called_is_the_processors_affair() -> None:
    def reasons(name: str) -> set[str]:
        return {line.fields["exit_reason"] for line in lines(name) if line.event == "kvm_exit"}

    assert {"EXCEPTION_NMI", "CR_ACCESS", "INVLPG", "EXTERNAL_INTERRUPT", "HLT"} <= reasons("mixed")
    assert {"EPT_VIOLATION", "EPT_MISCONFIG"} <= reasons("ept")
    assert {"npf", "write_cr3", "interrupt"} <= reasons("npt")


def test_an_exit_says_which_address_and_which_register() -> None:
    faults = [
        event for _, event in watched("mixed").events if isinstance(event, ev.Exited) and event.gva >= 0
    ]
    addresses = Counter(event.gva for event in faults)
    exits = [line for line in lines("mixed") if line.event == "kvm_exit"]
    shown = Counter(
        int(line.fields["info1"], 16)
        for line in exits
        if line.fields["exit_reason"] in ("EXCEPTION_NMI", "INVLPG")
    )
    assert shown == addresses
    written = {int(line.fields["info1"], 16) for line in exits if line.fields["exit_reason"] == "CR_ACCESS"}
    assert 3 in written


def test_a_violation_is_noted() -> None:
    ((_, violation),) = watched("violated").violations
    (note,) = [
        line for line in lines("violated") if line.event == "tracing_mark_write" and "violation" in line.text
    ]
    assert note.text == f"violation: {violation}"


def test_a_window_has_the_lines_of_its_records() -> None:
    last = recorded("mixed").counters["records"]
    parts = [Records(0, last // 3), Records(last // 3 + 1, last // 2), Records(last // 2 + 1)]
    bodies = ["".join(text("mixed", part).splitlines(keepends=True)[12:]) for part in parts]
    assert all(bodies)
    assert sorted("".join(bodies).splitlines()) == sorted(text("mixed").splitlines()[12:])


def test_an_exit_that_writes_a_register_stands_where_it_happened() -> None:
    shown: list[tuple[int, str]] = []
    lines = FtraceLines(lambda time, line: shown.append((time, line)), None)
    registers = ev.PagingRegisters(0, "efer", 0, 0, 0, 0, [], 40, False)
    for time, event in (
        (1000, ev.Exited(0, 1, "register_write", -1, 0)),
        (2000, ev.Entered(1, 1, False, 0)),
        (3000, registers),
        (4000, ev.Exited(1, 1, "register_write", -1, 0)),
    ):
        lines.event(time, event)
    lines.end()
    assert [
        (time, line.partition("reason ")[2].partition(" rip")[0])
        for time, line in shown
        if "kvm_exit" in line
    ] == [
        (1000, "MSR_WRITE"),
        (4000, "CR_ACCESS"),
    ]
