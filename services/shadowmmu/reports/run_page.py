"""The page of a run: what it was, its verdict, and everything that report.json says. Pure.

`run_page` puts sections together; some have a module of their own (`run_violation`, `run_comparison`, `run_series`,
`run_members`).
"""

from __future__ import annotations

import shlex
from typing import Final

import msgspec

from shadowmmu.coordinator.coverage import Frequency, OutcomeCoverage, PointCoverage
from shadowmmu.coordinator.report import RunReport
from shadowmmu.protocol.messages import RunConfig, Verdict
from shadowmmu.reports.charts import Bar, bars, to_spec
from shadowmmu.reports.comparison import Names
from shadowmmu.reports.measurements import counter_table, distribution_figures, quantity
from shadowmmu.reports.page import (
    Absent,
    Cell,
    Commands,
    Facts,
    Figure,
    Page,
    Paragraph,
    Part,
    Section,
    Table,
    Tone,
    code,
    number,
    shown,
    table,
    text,
)
from shadowmmu.reports.run_command import stress_command
from shadowmmu.reports.run_comparison import comparison_section
from shadowmmu.reports.run_folder import RunFolder
from shadowmmu.reports.run_members import chaos_parts, member_parts
from shadowmmu.reports.run_series import series_parts
from shadowmmu.reports.run_violation import violation_section

__all__ = ["VERDICT_TONES", "run_page"]

VERDICT_TONES: Final = {Verdict.PASS: Tone.GOOD, Verdict.VIOLATED: Tone.BAD, Verdict.UNKNOWN: Tone.WARN}
_FREQUENCY_ORDER: Final = {Frequency.NEVER: 0, Frequency.SOMETIMES: 1, Frequency.ALWAYS: 2}
_DEFAULTS: Final = msgspec.to_builtins(RunConfig())

_START_RULES: Final = {
    "expected": "(as many as were expected)",
    "stable": "(as many as had come)",
    "deadline": "(as many as had come in time)",
}


def run_page(run: RunFolder, against: RunFolder | None = None) -> Page:
    """The page of a run; with another one, also what differs."""
    report = run.report
    names = None if against is None else Names.of(run.path, against.path)
    sections = [_summary(run)]
    if report.violation is not None or run.reproductions:
        sections.append(violation_section(run))
    if against is not None and names is not None:
        sections.append(comparison_section(run, against, names))
    sections += [
        Section("coverage", "Coverage", _coverage(report)),
        Section("counters", "Counters", _counters(report)),
        Section("page-faults", "Page faults without an exit", _page_faults(report)),
        Section(
            "latencies", "Latencies", _latencies(report, None if against is None else against.report, names)
        ),
        Section("series", "Over time", series_parts(report)),
        Section("members", "Members", member_parts(report)),
    ]
    if run.chaos is not None:
        sections.append(Section("chaos", "Faults put in", chaos_parts(run.chaos)))
    return Page(
        title=f"Run {run.path.resolve().name}" + ("" if names is None else f" against {names.other}"),
        subtitle=_subtitle(report),
        badge=Cell(report.verdict.value, tone=VERDICT_TONES[report.verdict]),
        sections=sections,
        foot=f"From {report.schema} of shadowmmu {report.version}. Seconds are wall-clock time of the simulator; they "
        "say nothing about how fast a kernel is.",
    )


def _subtitle(report: RunReport) -> str:
    config = report.config
    return (
        f"{report.vcpus} vCPUs, workload {config.workload.value}, profile {config.profile}, seed {config.seed}; "
        f"{report.mode}, {report.started}"
    )


# --- summary ---------------------------------------------------------------------------------------------------------


def _summary(run: RunFolder) -> Section:
    report = run.report
    seconds, stream = report.seconds, report.stream
    start = _START_RULES.get(report.start_rule or "", "")
    facts = [
        ("virtual CPUs", text(f"{report.vcpus} {start}".rstrip())),
        ("guest instructions", number(report.counters.get("vcpu.instructions"))),
        ("running", text(f"{seconds.running:,.1f} s")),
        ("waiting before, draining after", text(f"{seconds.waiting:,.1f} s, {seconds.draining:,.1f} s")),
        ("events", number(stream.events)),
        ("journal records", number(stream.records)),
        ("version", text(report.version)),
        ("started", text(report.started)),
        ("digest of the events", code(stream.events_digest or "not told")),
        ("digest of the journal", code(stream.journal_digest or "not told")),
    ]
    parts: list[Part] = [Paragraph(report.text, VERDICT_TONES[report.verdict])]
    others = [problem for problem in report.problems if problem != report.text]
    parts += [Paragraph(f"Problem: {problem}", Tone.WARN) for problem in others]
    parts += [Paragraph(f"Note: {note}") for note in report.notes]
    parts += [Facts(facts), Commands(_commands(run)), _config_table(report.config)]
    if report.throughput:
        rows = [
            (name.removesuffix("_per_second").replace("_", " "), number(float(rate), 0))
            for name, rate in sorted(report.throughput.items())
        ]
        parts.append(
            table(
                "Throughput of the simulator (wall clock)",
                ["", "per second"],
                [[text(a), b] for a, b in rows],
                numbers=(1,),
            )
        )
    return Section("summary", "Summary", parts)


def _commands(run: RunFolder) -> list[tuple[str, str]]:
    report = run.report
    folder = shlex.quote(str(run.path))
    lines = []
    if run.has_journal:
        lines.append((f"shadowmmu replay {folder}", "execute the journal again"))
        if report.violation is not None:
            until = f"shadowmmu replay {folder} --until {report.violation.journal_record}"
            lines.append((until, "the same, up to the violation"))
    lines += [
        (
            f"shadowmmu explain {shlex.quote(str(run.path / one.name))}",
            "which bug it is, and how it comes about",
        )
        for one in run.reproductions
        if not one.problem
    ]
    in_process = report.mode == "in-process"
    again = stress_command(report.config, report.vcpus, in_process=in_process)
    if again is not None:
        what = "the same run again, to the digest" if in_process else "a run of the same configuration"
        lines.append((again, what))
    return lines


def _config_table(config: RunConfig) -> Table:
    rows = [
        [
            code(name),
            shown(value),
            text("" if value == _DEFAULTS[name] else f"default: {shown(_DEFAULTS[name]).text}", Tone.DIM),
        ]
        for name, value in msgspec.to_builtins(config).items()
    ]
    return table("Configuration", ["field", "value", ""], rows, numbers=(), folded=True)


# --- coverage --------------------------------------------------------------------------------------------------------


def _coverage(report: RunReport) -> list[Part]:
    points, outcomes = report.coverage.points, report.coverage.outcomes
    if not points and not outcomes:
        return [Absent("The report has no coverage: the run ended before the MMU service had told any.")]
    reached = [point for point in points if point.reached]
    interrupted = [point for point in reached if point.operations or point.stores]
    parts: list[Part] = [
        Paragraph(
            f"{len(reached)} of {len(points)} named points were reached; at {len(interrupted)} of them something of "
            "another vCPU fell in between. "
            "A point that is reached while nothing ever comes in between has shown nothing."
        ),
        table(
            "Named points, least covered first, and how often something fell there",
            [
                "point",
                "reached",
                "parked",
                "another operation",
                "a store",
                "kind",
                "what it is",
            ],
            [_point_row(point) for point in sorted(points, key=_least_first)],
            numbers=(1, 2),
        ),
    ]
    if outcomes:
        parts.append(
            table(
                "Outcomes of operations",
                ["operation", "outcome", "count", "of the operation's outcomes"],
                [_outcome_row(one) for one in outcomes],
                numbers=(2,),
                search=True,
                folded=True,
            )
        )
    else:
        parts.append(Absent("No operation had an outcome that was counted."))
    return parts


def _least_first(point: PointCoverage) -> tuple[bool, int, int, str]:
    operation = _FREQUENCY_ORDER[point.operation or Frequency.ALWAYS]
    return point.reached > 0, operation, _FREQUENCY_ORDER[point.store], point.name


def _point_row(point: PointCoverage) -> list[Cell]:
    return [
        code(point.name),
        number(point.reached) if point.reached else Cell("never", 0, Tone.WARN),
        number(point.parked),
        _frequency(point.operation, point.operations, point.reached),
        _frequency(point.store, point.stores, point.reached),
        text(point.kind),
        text(point.text),
    ]


def _frequency(frequency: Frequency | None, count: int, chances: int) -> Cell:
    if frequency is None:
        return Cell("cannot", -1, Tone.DIM)
    if not chances:
        return Cell("not reached", -1, Tone.DIM)
    if frequency is Frequency.NEVER:
        return Cell("never", 0, Tone.WARN)
    return Cell(f"{frequency.value} ({count:,})", count / chances, Tone.GOOD)


def _outcome_row(one: OutcomeCoverage) -> list[Cell]:
    tone = Tone.WARN if one.frequency is Frequency.NEVER else None
    return [code(one.operation), code(one.outcome), number(one.count), text(one.frequency.value, tone)]


# --- counters, page faults -------------------------------------------------------------------------------------------


def _counters(report: RunReport) -> list[Part]:
    counters = report.counters
    if not counters:
        return [Absent("The report has no counters: no member had reported when the run ended.")]
    parts: list[Part] = []
    exits = {
        name.removeprefix("exits."): n for name, n in counters.items() if name.startswith("exits.") and n
    }
    if exits:
        title = "Guest exits by reason"
        values = [Bar(name, n) for name, n in sorted(exits.items(), key=lambda item: (-item[1], item[0]))]
        parts.append(Figure(title=title, spec=to_spec(bars(values, "exits"), title), wide=True))
    parts.append(counter_table(counters))
    return parts


def _page_faults(report: RunReport) -> list[Part]:
    faults = report.page_faults
    if faults is None:
        return [
            Absent(
                f"Profile {report.config.profile} has no bypass_guest_pf, so every page fault exits. Profile pre-patch "
                "has the parameter, and this table."
            )
        ]
    lines = [
        ("guest page faults", faults.guest_faults),
        ("delivered without an exit", faults.bypassed),
        *((f"exits: {reason}", count) for reason, count in faults.exits.items()),
        *((f"page fault exits handled: {outcome}", count) for outcome, count in faults.handled.items()),
        *((f"notrap entries: {name.replace('_', ' ')}", count) for name, count in faults.notrap.items()),
    ]
    rows = [
        [
            text(name),
            number(count),
            number(1000 * count / faults.instructions if faults.instructions else None, 3),
        ]
        for name, count in lines
    ]
    setting = "on" if faults.bypass_guest_pf else "off"
    return [
        table(f"bypass_guest_pf {setting}", ["", "count", "per 1,000 instructions"], rows, numbers=(1, 2))
    ]


# --- latencies -------------------------------------------------------------------------------------------------------


def _latencies(report: RunReport, other: RunReport | None, names: Names | None) -> list[Part]:
    if not report.histograms:
        return [Absent("The report has no histograms: no member had reported when the run ended.")]
    rows = []
    for name, one in sorted(report.histograms.items()):
        values = (one.p50, one.p90, one.p99, one.p999, one.max)
        rows.append([text(quantity(name)), number(one.count), number(one.mean, 1), *map(number, values)])
    columns = ["", "count", "mean", "50 %", "90 %", "99 %", "99.9 %", "largest"]
    parts: list[Part] = [table("Latencies", columns, rows, numbers=range(1, 8))]
    if report.mode == "in-process":
        parts.append(
            Absent("A run in one process has no latencies but the waits for mmu_lock: nobody sends messages.")
        )
    for name, one in sorted(report.histograms.items()):
        runs = [("this run" if names is None else names.this, one.encoded)]
        if other is not None and names is not None and name in other.histograms:
            runs.append((names.other, other.histograms[name].encoded))
        parts += distribution_figures(name, runs)
    return parts
