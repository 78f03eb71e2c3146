"""The section about a run's violation: what was broken, by which access, and the sequence diagram. Pure."""

from __future__ import annotations

from typing import Final

from shadowmmu.coordinator.report import ViolationReport
from shadowmmu.reports.page import (
    Absent,
    Drawing,
    Facts,
    Paragraph,
    Part,
    Section,
    Tone,
    code,
    number,
    table,
    text,
)
from shadowmmu.reports.run_folder import Reproduction, RunFolder

__all__ = ["violation_section"]

_MOST_ITEMS: Final = 12
"""Of a list in an event's field."""


def violation_section(run: RunFolder) -> Section:
    """The violation and its reproductions; if one of them is missing, why."""
    parts: list[Part] = []
    violation = run.report.violation
    if violation is None:
        parts.append(
            Absent("The report has no violation; the folder has a reproduction of one all the same.")
        )
    else:
        parts += _violation_parts(violation)
    for one in run.reproductions:
        parts += _reproduction(one)
    if not run.reproductions:
        parts.append(
            Absent(
                "No sequence diagram: the folder has no .repro file, because no short reproduction was found or wanted."
            )
        )
    return Section("violation", "Violation", parts)


def _violation_parts(violation: ViolationReport) -> list[Part]:
    facts = [
        ("rule", text(f"{violation.rule}: {violation.name}", Tone.BAD)),
        ("vCPU", text("nobody's" if violation.vcpu < 0 else str(violation.vcpu))),
        ("journal record", number(violation.journal_record)),
        ("event", number(violation.event_index)),
    ]
    parts: list[Part] = [
        Paragraph(violation.text, Tone.BAD),
        Paragraph(f"Who should have acted: {violation.blame}"),
        Facts(facts),
    ]
    if (access := violation.access) is not None:
        parts.append(
            Facts(
                [
                    ("access by", text(f"vCPU {access.vcpu}, entry {access.entry}")),
                    ("guest virtual address", code(f"{access.gva:#x}")),
                    ("guest frame", code("none" if access.gfn < 0 else f"{access.gfn:#x}")),
                    ("host frame", code(f"{access.pfn:#x}")),
                    ("bytes", number(access.size)),
                    ("value", code(f"{access.value:#x}")),
                    ("flags", code(f"{access.flags:#x}")),
                ]
            )
        )
    if violation.related:
        rows = [
            [
                number(one.index),
                code(one.type),
                text(one.note),
                code(", ".join(f"{name}={_brief(value)}" for name, value in one.fields.items())),
            ]
            for one in violation.related
        ]
        parts.append(
            table(
                "Earlier events that matter, oldest first",
                ["event", "type", "why", "fields"],
                rows,
                numbers=(0,),
            )
        )
    return parts


def _brief(value: object) -> str:
    """A field's value; of a long list, as a dirty log is, the beginning."""
    if isinstance(value, list) and len(value) > _MOST_ITEMS:
        return f"[{', '.join(map(str, value[:_MOST_ITEMS]))}, ... {len(value):,} in all]"
    return str(value)


def _reproduction(one: Reproduction) -> list[Part]:
    if one.problem:
        return [Absent(f"No sequence diagram: {one.name} cannot be used: {one.problem}")]
    said = f"{one.name}: {one.operations} operations; executed again for this page, it {one.sameness}. {one.failure}"
    return [Paragraph(said), Drawing(title=f"Sequence diagram of {one.name}", svg=one.svg, text=one.text)]
