"""Two runs side by side: verdicts, digests, configurations, counters, coverage. Pure."""

from __future__ import annotations

import msgspec

from shadowmmu.coordinator.report import RunReport
from shadowmmu.reports.comparison import Names, counters_side_by_side, differences
from shadowmmu.reports.page import Cell, Column, Paragraph, Part, Section, Table, Tone, code, number, text
from shadowmmu.reports.run_folder import RunFolder

__all__ = ["comparison_section"]


def comparison_section(run: RunFolder, against: RunFolder, names: Names) -> Section:
    """What differs between a run and another one."""
    this, other = run.report, against.report
    parts: list[Part] = [
        Table(
            caption="The runs",
            columns=[Column(""), Column(names.this), Column(names.other)],
            rows=_runs(this, other),
        ),
        _same_or_not(this, other),
        *differences(msgspec.to_builtins(this.config), msgspec.to_builtins(other.config), names),
        *counters_side_by_side(this.counters, other.counters, names),
        *_points(this, other, names),
    ]
    return Section("against", f"Against {names.other}", parts)


def _runs(this: RunReport, other: RunReport) -> list[list[Cell]]:
    both = (this, other)
    return [
        [text("verdict"), *(text(one.verdict.value) for one in both)],
        [text("mode"), *(text(one.mode) for one in both)],
        [text("version"), *(text(one.version) for one in both)],
        [text("started"), *(text(one.started) for one in both)],
        [text("virtual CPUs"), *(number(one.vcpus) for one in both)],
        [text("guest instructions"), *(number(one.counters.get("vcpu.instructions")) for one in both)],
        [text("running, s"), *(number(one.seconds.running, 1) for one in both)],
        [text("events"), *(number(one.stream.events) for one in both)],
        [text("digest of the events"), *(code(one.stream.events_digest or "not told") for one in both)],
        [text("digest of the journal"), *(code(one.stream.journal_digest or "not told") for one in both)],
    ]


def _same_or_not(this: RunReport, other: RunReport) -> Paragraph:
    digests = this.stream.events_digest, other.stream.events_digest
    if not all(digests):
        return Paragraph("Whether both had the same events is not known: a digest is missing.", Tone.WARN)
    if digests[0] == digests[1]:
        return Paragraph("Both had the same events, byte for byte.", Tone.GOOD)
    return Paragraph("They had different events.")


def _points(this: RunReport, other: RunReport, names: Names) -> list[Part]:
    """What one covered and the other did not."""
    rows = []
    others = {point.name: point for point in other.coverage.points}
    for point in this.coverage.points:
        second = others.get(point.name)
        if second is None:
            continue
        for what, a, b in (
            ("reached", point.reached, second.reached),
            ("another operation fell there", point.operations, second.operations),
            ("a store fell there", point.stores, second.stores),
        ):
            if bool(a) != bool(b):
                rows.append([code(point.name), text(what), number(a), number(b)])
    if not rows:
        return [Paragraph("Both covered the same points.")]
    columns = [
        Column("point"),
        Column("what"),
        Column(names.this, number=True),
        Column(names.other, number=True),
    ]
    return [Table(caption="Coverage that only one of them has", columns=columns, rows=rows)]
