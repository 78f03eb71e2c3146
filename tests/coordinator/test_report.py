"""Aggregation, coverage, report.json and the tables."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hdrh.histogram import HdrHistogram
from rich.console import Console

from shadowmmu.checker import Checker
from shadowmmu.coordinator import decode_report, encode_report, render_report, write_report
from shadowmmu.coordinator.aggregate import merge_counters, merge_histograms
from shadowmmu.coordinator.coverage import WAIT_POINTS, Frequency, coverage_of
from shadowmmu.coordinator.page_faults import PageFaultReport, page_faults_of
from shadowmmu.coordinator.report import (
    EXIT_STATUS,
    SCHEMA,
    Durations,
    LostMember,
    MemberReport,
    RunReport,
    StreamReport,
    throughput_of,
    violation_report,
)
from shadowmmu.kvm.points import Point
from shadowmmu.machine.coverage import WaitPoint
from shadowmmu.protocol import events as ev
from shadowmmu.protocol import messages as m

DOCUMENT = Path(__file__).parents[2] / "docs" / "REPORT.md"


def histogram(*values: int, highest: int = 60_000_000) -> str:
    one = HdrHistogram(1, highest, 3)
    for value in values:
        one.record_value(value)
    return one.encode().decode()


def make_report(**fields: Any) -> RunReport:
    violation = Checker().feed_all(
        [
            ev.InputConsumed(3),
            ev.FrameRevoked(5, 105),
            ev.Accesses(1, 2, [(1, 0x2000, 5, 105, 8, 9)]),
        ]
    )
    assert violation is not None
    counters = {
        "kvm.pf_fixed": 12,
        "kvm.mmu_unsync.current": 1,
        "kvm.mmu_unsync.highest": 4,
        "tlbs_dirty.raised": 2,
        "exits.page_fault": 7,
        "kicks.sent": 3,
        "lock.taken": 20,
        "host.unmap": 1,
        "vcpu.instructions": 1000,
        "point.WALK_DONE.reached": 10,
        "point.WALK_DONE.operation": 4,
        "outcome.vcpu.page_fault.retry": 7,
        "outcome.vcpu.page_fault.inject": 0,
    }
    histograms, _ = merge_histograms([("mmu", {"kick_latency_us": histogram(10, 20, 30)})])
    values: dict[str, Any] = {
        "verdict": m.Verdict.VIOLATED,
        "exit_status": 1,
        "text": str(violation),
        "version": "0.1.0",
        "started": "2026-01-01T00:00:00.000+00:00",
        "mode": "processes",
        "vcpus": 2,
        "start_rule": "expected",
        "config": m.RunConfig(mutant=m.Mutant.FLUSH_NOT_AWAITED),
        "seconds": Durations(1.0, 2.0, 0.5),
        "violation": violation_report(violation),
        "problems": ["a worker was lost"],
        "notes": ["something to know"],
        "lost": [LostMember(3, m.Role.VCPU, "worker", 1, 1.5, "nothing was heard of it")],
        "stream": StreamReport(100, 50, "ab", "cd"),
        "throughput": throughput_of(counters, 2.0),
        "counters": counters,
        "histograms": histograms,
        "coverage": coverage_of(counters),
        "members": [MemberReport(1, m.Role.MMU, "mmu", None, True, counters, {"events_digest": "ab"})],
    }
    return RunReport(**(values | fields))


def test_counters_are_summed_and_peaks_are_not() -> None:
    merged = merge_counters(
        [{"b": 1, "a": 2, "kvm.mmu_unsync.highest": 5}, {"a": 3, "kvm.mmu_unsync.highest": 4}]
    )
    assert merged == {"a": 5, "b": 1, "kvm.mmu_unsync.highest": 5}
    assert list(merged) == sorted(merged)


def test_histograms_of_all_members_are_merged() -> None:
    merged, complaints = merge_histograms(
        [
            ("one", {"exit_latency_us": histogram(100, 100)}),
            ("two", {"exit_latency_us": histogram(300, highest=1 << 40), "walk_latency_us": histogram()}),
        ]
    )
    assert complaints == []
    summary = merged["exit_latency_us"]
    assert (summary.count, summary.min, summary.p50, summary.max) == (3, 100, 100, 300)
    assert summary.mean == pytest.approx(500 / 3, rel=1e-3)
    assert merged["walk_latency_us"].count == 0
    assert HdrHistogram.decode(summary.encoded).get_total_count() == 3


def test_an_unreadable_histogram_is_a_complaint() -> None:
    merged, complaints = merge_histograms([("one", {"x_us": "AAAA", "y_us": "", "z_us": "é"})])
    assert merged == {}
    assert [complaint.startswith("the histogram ") for complaint in complaints] == [True] * 3


def test_coverage_says_always_sometimes_never() -> None:
    coverage = coverage_of(
        {
            "point.WALK_LEVEL.reached": 5,
            "point.WALK_LEVEL.operation": 5,
            "point.WALK_LEVEL.store": 2,
            "point.GPTE_READ.reached": 3,
            "point.BRAND_NEW.reached": 1,
            "outcome.vcpu.page_fault.retry": 2,
            "outcome.vcpu.page_fault.inject": 1,
            "outcome.vcpu.page_fault.emulated": 0,
            "outcome.host.unmap.done": 9,
        }
    )
    points = {point.name: point for point in coverage.points}
    assert points["WALK_LEVEL"].operation is Frequency.ALWAYS
    assert points["WALK_LEVEL"].store is Frequency.SOMETIMES
    assert points["GPTE_READ"].operation is None
    assert points["GPTE_READ"].store is Frequency.NEVER
    assert points["BRAND_NEW"].reached == 1
    assert set(points) == {point.name for point in Point} | set(WAIT_POINTS) | {"BRAND_NEW"}
    outcomes = {(one.operation, one.outcome): one.frequency for one in coverage.outcomes}
    assert outcomes == {
        ("vcpu.page_fault", "retry"): Frequency.SOMETIMES,
        ("vcpu.page_fault", "inject"): Frequency.SOMETIMES,
        ("vcpu.page_fault", "emulated"): Frequency.NEVER,
        ("host.unmap", "done"): Frequency.ALWAYS,
    }


def test_the_wait_points_are_those_of_the_machine() -> None:
    assert {point.name: point.value for point in WaitPoint} == WAIT_POINTS


def test_a_report_survives_the_round_trip(tmp_path: Path) -> None:
    report = make_report()
    path = write_report(report, tmp_path)
    assert decode_report(path.read_bytes()) == report
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_the_json_says_the_important_things_at_the_top() -> None:
    data = json.loads(encode_report(make_report()))
    assert list(data)[:3] == ["schema", "verdict", "exit_status"]
    assert (data["schema"], data["verdict"], data["vcpus"]) == (SCHEMA, "violated", 2)
    assert data["violation"]["rule"] == 3
    assert data["violation"]["related"][0] == {
        "index": 1,
        "type": "FrameRevoked",
        "fields": {"gfn": 5, "pfn": 105},
        "note": "the notifier call returned: the frame is the host's",
    }


def test_another_schema_is_not_read() -> None:
    data = encode_report(make_report()).replace(SCHEMA.encode(), b"shadowmmu-report/9")
    with pytest.raises(msgspec.ValidationError, match="shadowmmu-report/9"):
        decode_report(data)


def test_every_field_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for field in msgspec.structs.fields(RunReport):
        assert f"`{field.name}`" in text, f"{field.name} is not in {DOCUMENT}"
    assert SCHEMA in text


def test_every_verdict_has_an_exit_status() -> None:
    assert {verdict.value: EXIT_STATUS[verdict] for verdict in m.Verdict} == {
        "pass": 0,
        "violated": 1,
        "unknown": 2,
    }


def test_the_tables_show_what_counts() -> None:
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(render_report(make_report()))
    shown = capture.get()
    for words in (
        "mmu_unsync, highest",
        "tlbs_dirty",
        "page_fault",
        "kick_latency, us",
        "sometimes 4",
        "never",
        "Rule 3: host frame use after revoke",
        "Lost: member 3 (vcpu, vCPU 1, worker) 1.5 s after the start",
        "Verdict: violated",
        "2 vCPUs (start: expected)",
    ):
        assert words in shown


def test_a_run_that_never_began_has_no_tables() -> None:
    report = make_report(
        counters={}, violation=None, coverage=coverage_of({}), histograms={}, lost=[], notes=[]
    )
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(render_report(report))
    assert "Kernel counters" not in capture.get()


BYPASS = m.RunConfig(profile="pre-patch+fixed", bypass_guest_pf=True)
FAULTS = {
    "vcpu.instructions": 2000,
    "vcpu.bypassed": 40,
    "exits.halt": 3,
    "exits.page_fault": 100,
    "outcome.vcpu.page_fault.retry": 90,
    "outcome.vcpu.page_fault.inject": 10,
    "kvm.notrap.prefetched": 700,
    "kvm.notrap.on_sync": 5,
}


def test_page_faults_without_an_exit_are_told_of_kernels_that_have_them() -> None:
    faults = page_faults_of(BYPASS, FAULTS)
    assert faults == PageFaultReport(
        bypass_guest_pf=True,
        instructions=2000,
        bypassed=40,
        exits={
            "external_interrupt": 0,
            "halt": 3,
            "invlpg": 0,
            "page_fault": 100,
            "register_write": 0,
            "send_ipi": 0,
        },
        handled={"inject": 10, "retry": 90},
        notrap={"on_sync": 5, "prefetched": 700},
    )
    assert faults.guest_faults == 50
    assert page_faults_of(m.RunConfig(), FAULTS) is None


def test_the_table_of_page_faults_has_its_lines_also_if_nothing_happened() -> None:
    off = m.RunConfig(profile="pre-patch")
    shown = {}
    for config, counters in ((BYPASS, FAULTS), (off, {"kvm.notrap.prefetched": 0})):
        report = make_report(config=config, counters=counters, page_faults=page_faults_of(config, counters))
        assert decode_report(encode_report(report)) == report
        console = Console(width=140, force_terminal=False)
        with console.capture() as capture:
            console.print(render_report(report))
        shown[config.bypass_guest_pf] = " ".join(capture.get().split())
    assert "Page faults without an exit (bypass_guest_pf on)" in shown[True]
    assert "delivered without an exit 40 20.00" in shown[True]
    assert "page fault exits 100 50.00" in shown[True]
    assert "notrap entries, on sync 5 2.50" in shown[True]
    assert "halt exits 3 1.50" in shown[True]
    assert "Page faults without an exit (bypass_guest_pf off)" in shown[False]
    assert "delivered without an exit 0 0.00" in shown[False]
    assert "page fault exits 0 0.00" in shown[False]


def test_the_verdict_names_another_paging_mode() -> None:
    config = m.RunConfig(workload=m.Workload.MODES, mode=m.GuestMode.NONPAGING, tdp=m.Tdp.EPT)
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(render_report(make_report(config=config)))
    assert "workload modes (nonpaging), ept, profile fixed" in capture.get()


def test_throughput_needs_time() -> None:
    assert throughput_of({"vcpu.instructions": 10}, 0.0) == {}
    assert throughput_of({"vcpu.instructions": 10}, 2.0) == {"guest_instructions_per_second": 5.0}
