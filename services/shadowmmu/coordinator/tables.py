"""A run's report as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shadowmmu.coordinator.coverage import Frequency, PointCoverage
from shadowmmu.coordinator.page_faults import PageFaultReport
from shadowmmu.coordinator.report import RecoveryReport, RunReport, ViolationReport
from shadowmmu.protocol.messages import GuestMode, MemoryModel, Verdict

__all__ = ["render_report"]

_VERDICT_STYLES = {Verdict.PASS: "green", Verdict.VIOLATED: "red", Verdict.UNKNOWN: "yellow"}
_FREQUENCY_STYLES = {Frequency.ALWAYS: "green", Frequency.SOMETIMES: "green", Frequency.NEVER: "yellow"}

KERNEL_COUNTERS = (
    "mmu_shadow_zapped",
    "mmu_pte_write",
    "mmu_pte_updated",
    "mmu_pde_zapped",
    "mmu_flooded",
    "mmu_recycled",
    "mmu_cache_miss",
    "mmu_unsync.current",
    "mmu_unsync.highest",
    "remote_tlb_flush",
    "lpages.current",
    "lpages.highest",
    "pf_fixed",
    "pf_guest",
    "tlb_flush",
    "invlpg",
    "mmio_exits",
    "hw_flush",
)
"""KVM's counters in the order of struct kvm_vm_stat and kvm_vcpu_stat."""


def render_report(report: RunReport) -> RenderableType:
    """Everything that a person wants to see at the end of a run."""
    parts: list[RenderableType] = []
    if report.counters:
        parts += [_counter_tables(report), _points_table(report.coverage.points)]
        if report.page_faults is not None:
            parts.append(_page_faults_table(report.page_faults))
    if report.coverage.outcomes:
        parts.append(_outcomes_table(report))
    if report.violation is not None:
        parts.append(_violation_panel(report.violation))
    if report.lost or report.notes or report.recoveries:
        parts.append(_notes(report))
    parts.append(_verdict_panel(report))
    return Group(*parts)


def _counter_tables(report: RunReport) -> Table:
    counters = report.counters
    left = [
        _kernel_table(counters),
        _plain_table("tlbs_dirty", counters, "tlbs_dirty."),
        _plain_table("Exits by reason", counters, "exits."),
    ]
    right = [
        _plain_table("Kicks", counters, "kicks."),
        _plain_table("mmu_lock", counters, "lock."),
        _plain_table("Host agent", counters, "host."),
        _latency_table(report),
        _throughput_table(report),
    ]
    grid = Table.grid(padding=(0, 4))
    grid.add_row(_stack(left), _stack(right))
    return grid


def _stack(tables: Iterable[Table | None]) -> Group:
    return Group(*(table for table in tables if table is not None))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _kernel_table(counters: Mapping[str, int]) -> Table:
    table = _table("Kernel counters (KVM's names)", "counter", "value")
    extra = sorted(
        name.removeprefix("kvm.")
        for name in counters
        if name.startswith("kvm.") and name.removeprefix("kvm.") not in KERNEL_COUNTERS
    )
    for name in (*KERNEL_COUNTERS, *extra):
        if f"kvm.{name}" in counters:
            table.add_row(name.replace(".", ", "), f"{counters[f'kvm.{name}']:,}")
    return table


def _plain_table(title: str, counters: Mapping[str, int], prefix: str) -> Table | None:
    rows = [(name.removeprefix(prefix), value) for name, value in counters.items() if name.startswith(prefix)]
    if not rows:
        return None
    table = _table(title, "", "count")
    for name, value in sorted(rows):
        table.add_row(name, f"{value:,}")
    return table


def _latency_table(report: RunReport) -> Table | None:
    if not report.histograms:
        return None
    table = _table("Latencies (of the simulator)", "", "count", "p50", "p90", "p99", "p99.9", "max")
    for name, one in report.histograms.items():
        label, _, unit = name.rpartition("_")
        values = (one.p50, one.p90, one.p99, one.p999, one.max)
        table.add_row(f"{label}, {unit}", f"{one.count:,}", *(f"{value:,}" for value in values))
    return table


def _throughput_table(report: RunReport) -> Table:
    table = _table("Throughput of the simulator (wall clock)", "", "per second")
    for name, value in report.throughput.items():
        table.add_row(name.removesuffix("_per_second").replace("_", " "), f"{value:,.0f}")
    table.caption = f"{report.seconds.running:.1f} s running"
    table.caption_justify = "left"
    return table


def _frequency(frequency: Frequency | None, count: int) -> Text:
    if frequency is None:
        return Text("-", style="dim")
    detail = f" {count:,}" if frequency is Frequency.SOMETIMES else ""
    return Text(frequency.value + detail, style=_FREQUENCY_STYLES[frequency])


def _points_table(points: Iterable[PointCoverage]) -> Table:
    table = _table(
        "Coverage: named points",
        "point",
        "kind",
        "reached",
        "parked",
        "another operation fell there",
        "a store fell",
    )
    for point in points:
        table.add_row(
            point.name,
            point.kind,
            Text("never", style="yellow") if point.reached == 0 else f"{point.reached:,}",
            f"{point.parked:,}",
            _frequency(point.operation if point.reached else None, point.operations),
            _frequency(point.store if point.reached else None, point.stores),
        )
    return table


def _outcomes_table(report: RunReport) -> Table:
    table = _table("Coverage: outcomes of operations", "operation", "outcome", "count", "")
    for one in report.coverage.outcomes:
        table.add_row(
            one.operation,
            one.outcome,
            f"{one.count:,}",
            Text(one.frequency.value, _FREQUENCY_STYLES[one.frequency]),
        )
    return table


def _page_faults_table(faults: PageFaultReport) -> Table:
    """The same lines in every run, so that two can be laid side by side."""
    setting = "on" if faults.bypass_guest_pf else "off"
    table = _table(
        f"Page faults without an exit (bypass_guest_pf {setting})", "", "count", "per 1,000 instructions"
    )
    rows = [
        ("guest page faults", faults.guest_faults),
        ("  delivered without an exit", faults.bypassed),
        ("page fault exits", faults.exits["page_fault"]),
        *((f"  {outcome}", count) for outcome, count in faults.handled.items()),
        *((f"{reason} exits", n) for reason, n in faults.exits.items() if reason != "page_fault"),
        *((f"notrap entries, {name.replace('_', ' ')}", count) for name, count in faults.notrap.items()),
    ]
    for name, count in rows:
        rate = 1000 * count / faults.instructions if faults.instructions else 0.0
        table.add_row(name, f"{count:,}", f"{rate:,.2f}")
    return table


def _violation_panel(violation: ViolationReport) -> Panel:
    body = Text()
    body.append(f"{violation.text}\n")
    body.append(f"Journal record {violation.journal_record}, event {violation.event_index}.\n")
    body.append(f"Who should have acted: {violation.blame}\n")
    for related in violation.related:
        fields = ", ".join(f"{name}={value}" for name, value in related.fields.items())
        body.append(f"  event {related.index}: {related.type}({fields}): {related.note}\n")
    return Panel(
        body, title=f"Rule {violation.rule}: {violation.name}", border_style="red", title_align="left"
    )


def _recovery(one: RecoveryReport) -> str:
    vcpu = "" if one.vcpu is None else f", vCPU {one.vcpu}"
    who = f"member {one.member} ({one.role.value}{vcpu}, {one.name})"
    if one.back is None:
        return f"Missed: {who} from {one.lost:.1f} s on: {one.reason}"
    how = "was replaced" if one.replaced_by is not None else "was back"
    return f"Missed: {who} from {one.lost:.1f} s; it {how} after {one.back - one.lost:.1f} s: {one.reason}"


def _notes(report: RunReport) -> Text:
    lines = [_recovery(one) for one in report.recoveries]
    for lost in report.lost:
        when = "before the start" if lost.seconds is None else f"{lost.seconds:.1f} s after the start"
        vcpu = "" if lost.vcpu is None else f", vCPU {lost.vcpu}"
        lines.append(
            f"Lost: member {lost.member} ({lost.role.value}{vcpu}, {lost.name}) {when}: {lost.reason}"
        )
    lines += [f"Note: {note}" for note in report.notes]
    return Text("\n".join(lines), style="yellow")


def _verdict_panel(report: RunReport) -> Panel:
    style = _VERDICT_STYLES[report.verdict]
    how = "" if report.start_rule is None else f" (start: {report.start_rule})"
    config = report.config
    mode = "" if config.mode is GuestMode.PAGING64 else f" ({config.mode.value})"
    tdp = "" if config.tdp is None else f", {config.tdp.value}"
    order = "" if config.memory_model is MemoryModel.SC else f", {config.memory_model.value}"
    what = (
        f"{report.vcpus} vCPUs{how}; seed {config.seed}, workload {config.workload.value}{mode}{tdp}{order}, "
        f"profile {config.profile}; {report.stream.records:,} journal records, "
        f"{report.stream.events:,} events"
    )
    lines = [report.text, what]
    if report.stream.events_digest:
        lines.append(f"events digest {report.stream.events_digest}")
    return Panel(
        Text("\n".join(lines)),
        title=f"Verdict: {report.verdict.value}",
        border_style=style,
        title_align="left",
    )
