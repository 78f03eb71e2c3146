"""The kernel's tracepoints that are no events: as a real kernel prints them, among the events where they were hit."""

from __future__ import annotations

import functools
import io
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from shadowmmu.explorer.repro import load_repro
from shadowmmu.kvm import ShadowPage
from shadowmmu.kvm.role import (
    ROLE_ACCESS_SHIFT,
    ROLE_CR4_PAE,
    ROLE_DIRECT,
    ROLE_INVALID,
    ROLE_NXE,
    ROLE_QUADRANT_SHIFT,
)
from shadowmmu.machine import JOURNAL_NAME, Header, Replayer, read_journal
from shadowmmu.protocol import events as ev
from shadowmmu.timeline import Ending, ReproExecution, write_ftrace
from shadowmmu.timeline.tracepoints import Traced, TracepointTexts
from tests.timeline.ftrace_lines import lines, parser
from tests.timeline.print_formats import DATA, Line
from tests.timeline.recorded import ALL_RUNS, TIMED, execution, folder, watched

EVERYTHING = {
    *(
        "kvm_mmu_pagetable_walk",
        "kvm_mmu_paging_element",
        "kvm_mmu_set_accessed_bit",
        "kvm_mmu_set_dirty_bit",
    ),
    *("kvm_mmu_walker_error", "kvm_mmu_get_page", "mark_mmio_spte", "handle_mmio_page_fault"),
    *("kvm_mmu_audit", "kvm_age_page"),
}
WHOLE = [name for name in ALL_RUNS if name not in ("lost-workers", "stopped")]
"""Runs in which no operation ends unfinished."""
REPRO = Path(__file__).parents[2] / "docs" / "bugs" / "stale-mmio-cache.repro"

every_run = pytest.mark.parametrize("name", ALL_RUNS)


ACCESS = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")


def only(name: str, *events: str) -> list[Line]:
    return [line for line in lines(name) if line.event in events]


def number(line: Line, field: str) -> int:
    return int(line.fields[field], 16)


def shadow_page(line: Line) -> ShadowPage:
    """The page that a real kernel's line shows."""
    words = line.text.split()
    (access,) = (ACCESS.index(word) for word in words if word in ACCESS)
    (quadrant,) = (int(word[1]) for word in words if word in ("q0", "q1", "q2", "q3"))
    role = int(line.fields["level"]) | access << ROLE_ACCESS_SHIFT | quadrant << ROLE_QUADRANT_SHIFT
    for word, flag in (("nxe", ROLE_NXE), ("direct", ROLE_DIRECT), ("invalid", ROLE_INVALID)):
        role |= flag * (word in words)
    role |= ROLE_CR4_PAE * ("8-byte" in words and "direct" not in words)
    page = ShadowPage(0, number(line, "gfn"), role)
    page.root_count = int(line.fields["root_count"])
    page.unsync = line.fields["unsync"] == "unsync"
    return page


def shown_by(line: Line) -> Traced:
    """What we show where a real kernel has shown this."""
    shown: list[Traced] = []
    texts = TracepointTexts(shown.append)
    match line.event:
        case "kvm_mmu_pagetable_walk":
            texts.kvm_mmu_pagetable_walk(0, number(line, "addr"), int(line.text.split()[3], 16))
        case "kvm_mmu_paging_element":
            texts.kvm_mmu_paging_element(0, number(line, "pte"), int(line.fields["level"]))
        case "kvm_mmu_set_accessed_bit":
            texts.kvm_mmu_set_accessed_bit(0, number(line, "gpa"))
        case "kvm_mmu_set_dirty_bit":
            texts.kvm_mmu_set_dirty_bit(0, number(line, "gpa"))
        case "kvm_mmu_walker_error":
            texts.kvm_mmu_walker_error(0, int(line.text.split()[1], 16))
        case "kvm_mmu_get_page":
            texts.kvm_mmu_get_page(shadow_page(line), created=line.fields["created"] == "new")
        case _:
            texts.mark_mmio_spte(number(line, "sptep"), number(line, "gfn"), number(line, "access"))
    return shown[0]


def test_what_a_real_kernel_prints_is_printed_without_what_3_1_does_not_have() -> None:
    parse = parser().parse
    seen = Counter[str]()
    for text in (DATA / "kernel-6.1.txt").read_text().splitlines():
        if not any(f": {event}: " in text for event in EVERYTHING):
            continue
        line = parse(text)
        expected = line.text.replace("sp gen 0 ", "sp ").replace(" ad root", " root").partition(" gen ")[0]
        hit = shown_by(line)
        assert hit.text == f"{line.event}: {expected}"
        assert (hit.vcpu is None) == line.flags.endswith("1.")
        seen[line.event] += 1
    assert set(seen) == EVERYTHING - {"handle_mmio_page_fault", "kvm_mmu_audit", "kvm_age_page"}


def test_a_run_with_devices_hits_every_tracepoint() -> None:
    assert {line.event for line in lines("devices")} >= EVERYTHING


@every_run
def test_under_mmu_lock_preemption_is_off(name: str) -> None:
    locked = {"kvm_mmu_get_page", "mark_mmio_spte", "kvm_mmu_audit", "kvm_age_page"}
    for line in only(name, *EVERYTHING):
        assert line.flags == ("...1." if line.event in locked else ".....")


@pytest.mark.parametrize("name", ["few-pages", "devices", "lost-workers", TIMED])
def test_watching_them_changes_nothing(name: str) -> None:
    class Events:
        def __init__(self) -> None:
            self.seen: list[tuple[int, ev.Event]] = []

        def event(self, time: int, event: ev.Event) -> None:
            self.seen.append((time, event))

        def violation(self, time: int, text: str) -> None:
            pass

    plain = Events()
    ending = execution(name).play(plain)
    assert not ending.divergence
    assert plain.seen == watched(name).events


class Walk:
    """A walk as the lines show it: the level of each entry read, how often it started again, and its last line."""

    def __init__(self) -> None:
        self.levels: list[int] = []
        self.bits: list[Line] = []
        self.error: Line | None = None
        self.last = 0

    @property
    def restarts(self) -> int:
        return sum(level >= before for before, level in zip(self.levels, self.levels[1:], strict=False))


@functools.cache
def walks(name: str) -> list[Walk]:
    """Every walk; a vCPU does one at a time."""
    done: list[Walk] = []
    current: dict[str, Walk] = {}
    for line in only(name, *EVERYTHING):
        match line.event:
            case "kvm_mmu_pagetable_walk":
                current[line.comm] = walk = Walk()
                done.append(walk)
            case "kvm_mmu_paging_element":
                current[line.comm].levels.append(int(line.fields["level"]))
                current[line.comm].last = number(line, "pte")
            case "kvm_mmu_set_accessed_bit" | "kvm_mmu_set_dirty_bit":
                current[line.comm].bits.append(line)
            case "kvm_mmu_walker_error":
                current[line.comm].error = line
            case _:
                pass
    return done


@pytest.mark.parametrize("name", WHOLE)
def test_a_walk_reads_level_by_level_to_a_leaf_or_to_an_error(name: str) -> None:
    top = {"devices": (3, 2)}.get(name, (4, 3, 2))
    for walk in walks(name):
        if walk.levels:
            assert walk.levels[0] in top
        for before, level in zip(walk.levels, walk.levels[1:], strict=False):
            assert level in (before - 1, walk.levels[0])
        is_leaf = bool(walk.levels) and (walk.levels[-1] == 1 or walk.last >> 7 & 1 == 1)
        assert walk.error is not None or is_leaf


@pytest.mark.parametrize("name", ["mixed", "fork", "few-pages", "linux-3.1"])
def test_there_is_a_line_for_every_entry_that_was_read(name: str) -> None:
    with (folder(name)[0] / JOURNAL_NAME).open("rb") as source:
        records = iter(read_journal(source))
        header = next(records)
        assert isinstance(header, Header)
        run = Replayer(header)
        for position, record in enumerate(records, start=1):
            assert run.consume(position, record) is None
    assert len(only(name, "kvm_mmu_paging_element")) == run.machine.kvm.work.guest_walk_levels


@pytest.mark.parametrize("name", WHOLE)
def test_a_bit_is_shown_for_every_one_that_is_set_and_for_those_that_came_too_late(name: str) -> None:
    updates = Counter(
        (f"vcpu-{event.vcpu}", event.gpa)
        for _, event in watched(name).events
        if isinstance(event, ev.GpteUpdate)
    )
    shown = Counter((line.comm, number(line, "gpa")) for walk in walks(name) for line in walk.bits)
    assert updates <= shown
    assert (shown - updates).total() == sum(walk.restarts for walk in walks(name))


@pytest.mark.parametrize("name", WHOLE)
def test_accessed_comes_before_dirty_and_dirty_last(name: str) -> None:
    for walk in walks(name):
        if not walk.restarts:
            kinds = [line.event for line in walk.bits]
            assert "kvm_mmu_set_dirty_bit" not in kinds[:-1]


@every_run
def test_a_fault_that_goes_to_the_guest_is_the_vcpus_last_walker_error(name: str) -> None:
    last: dict[str, int] = {}
    for line in only(name, "kvm_mmu_walker_error", "kvm_inj_exception"):
        if line.event == "kvm_inj_exception":
            assert line.text == f"#PF (0x{last[line.comm]:x})"
        else:
            last[line.comm] = int(line.text.split()[1], 16)


@every_run
def test_a_page_that_is_found_again_was_made_before(name: str) -> None:
    made: set[tuple[str, str]] = set()
    for line in only(name, "kvm_mmu_get_page"):
        page = line.fields["gfn"], line.fields["level"]
        if line.fields["created"] == "new":
            made.add(page)
        assert page in made


@pytest.mark.parametrize("name", WHOLE)
def test_audits_come_before_and_after(name: str) -> None:
    open_at: dict[str, str] = {}
    for line in only(name, "kvm_mmu_audit"):
        when, _, what = line.fields["point"].partition(" ")
        if when == "pre":
            assert line.comm not in open_at
            open_at[line.comm] = what
        else:
            assert open_at.pop(line.comm) == what
    assert not open_at


def test_a_fault_on_a_device_is_known_by_an_entry_that_was_marked() -> None:
    marked: set[str] = set()
    for line in only("devices", "mark_mmio_spte", "handle_mmio_page_fault"):
        if line.event == "mark_mmio_spte":
            marked.add(line.fields["gfn"])
        else:
            assert line.fields["gfn"] in marked


@pytest.mark.parametrize("name", ["mixed", TIMED])
def test_notifiers_are_the_hosts_and_tell_whether_a_page_was_used(name: str) -> None:
    shown: defaultdict[str, set[str]] = defaultdict(set)
    for line in only(name, "kvm_age_page"):
        shown[line.fields["referenced"]].add(line.comm)
        assert number(line, "hva") >> 12 == number(line, "gfn")  # no slot of these runs is moved
    assert set(shown) == {"YOUNG", "OLD"}
    assert any(comm.startswith("host-") for comm in shown["YOUNG"])


@pytest.mark.parametrize("name", [TIMED, "mixed"])
def test_a_walk_stands_between_its_fault_and_the_next_entry(name: str) -> None:
    in_guest: set[str] = set()
    for line in lines(name):
        match line.event:
            case "kvm_entry":
                in_guest.add(line.comm)
            case "kvm_exit":
                in_guest.discard(line.comm)
            case "kvm_mmu_pagetable_walk" | "kvm_mmu_paging_element" | "kvm_mmu_audit" | "kvm_mmu_get_page":
                assert line.comm not in in_guest
            case _:
                pass


def test_a_failing_execution_has_them_too() -> None:
    out = io.BytesIO()
    ending = write_ftrace(ReproExecution(load_repro(REPRO)), out)
    assert ending == Ending()
    parse = parser().parse
    shown = [parse(text) for text in out.getvalue().decode().splitlines() if not text.startswith("#")]
    assert {"kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "mark_mmio_spte"} <= {
        line.event for line in shown
    }
