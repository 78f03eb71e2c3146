"""The sections about a run's processes: who took part, who was missed, and the faults that were put in. Pure."""

from __future__ import annotations

from shadowmmu.coordinator.chaos_report import ChaosReport
from shadowmmu.coordinator.report import RecoveryReport, RunReport
from shadowmmu.reports.page import Absent, Cell, Facts, Paragraph, Part, Tone, code, number, table, text

__all__ = ["chaos_parts", "member_parts"]


def member_parts(report: RunReport) -> list[Part]:
    """The processes; those that were absent or given up."""
    parts: list[Part] = []
    if report.members:
        rows = [
            [
                number(one.member),
                text(one.role.value),
                text(one.name),
                number(one.vcpu),
                text(
                    "yes" if one.reported else "no: last progress only", None if one.reported else Tone.WARN
                ),
                number(one.counters.get("vcpu.instructions")),
                code(", ".join(f"{name}={value}" for name, value in sorted(one.info.items()))),
            ]
            for one in report.members
        ]
        columns = ["member", "role", "name", "vCPU", "reported", "instructions", "said of itself"]
        parts.append(table("Processes of the run", columns, rows, numbers=(0, 3, 5)))
    else:
        why = "it was one process" if report.mode == "in-process" else "nobody had joined"
        parts.append(Absent(f"The run has no members: {why}."))
    if report.recoveries:
        columns = ["member", "role", "name", "vCPU", "missed at, s", "for, s", "came back", "why"]
        rows = [_recovery_row(one) for one in report.recoveries]
        parts.append(table("Members that were absent for a time", columns, rows, numbers=(0, 3, 4, 5)))
    if report.lost:
        rows = [
            [
                number(one.member),
                text(one.role.value),
                text(one.name),
                number(one.vcpu),
                text("before the start") if one.seconds is None else number(one.seconds, 1),
                text(one.reason, Tone.WARN),
            ]
            for one in report.lost
        ]
        columns = ["member", "role", "name", "vCPU", "given up at, s", "why"]
        parts.append(table("Members that were given up", columns, rows, numbers=(0, 3, 4)))
    if report.members and not report.recoveries and not report.lost:
        parts.append(Paragraph("Nobody was missed."))
    return parts


def _recovery_row(one: RecoveryReport) -> list[Cell]:
    if one.back is None:
        back = text("no", Tone.WARN)
    else:
        back = text("as itself" if one.replaced_by is None else f"replaced by {one.replaced_by}")
    return [
        number(one.member),
        text(one.role.value),
        text(one.name),
        number(one.vcpu),
        number(one.lost, 1),
        number(None if one.back is None else one.back - one.lost, 1),
        back,
        text(one.reason),
    ]


def chaos_parts(chaos: ChaosReport | str) -> list[Part]:
    """The faults and what came of them, or why chaos.json says nothing."""
    if isinstance(chaos, str):
        return [Absent(chaos)]
    parts: list[Part] = [Paragraph(f"Failed: {failure}", Tone.BAD) for failure in chaos.failures]
    if not chaos.failures:
        parts.append(Paragraph("Nothing was lost, nothing was executed twice.", Tone.GOOD))
    parts.append(
        Facts(
            [
                ("seed of the faults", number(chaos.seed)),
                ("restarts", number(chaos.restarts)),
                ("instructions lost", number(chaos.lost)),
                ("executed twice", number(chaos.duplicated)),
                ("hung", text("yes" if chaos.hung else "no")),
            ]
        )
    )
    rows = [
        [
            number(fault.at),
            text(fault.target),
            text(fault.kind + (f" for {fault.stopped_seconds:g} s" if fault.stopped_seconds else "")),
            number(fault.seconds, 1),
            text(fault.outcome),
        ]
        for fault in chaos.faults
    ]
    columns = ["due at instruction", "process", "fault", "happened at, s", "what came of it"]
    parts.append(table("Faults", columns, rows, numbers=(0, 3)))
    return parts
