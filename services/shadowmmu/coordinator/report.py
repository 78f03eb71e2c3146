"""report.json: what a run was and what came of it, as typed structs. docs/REPORT.md explains each field.

The structs are the schema: what `encode_report` writes, `decode_report` reads and checks. `SCHEMA` changes when a
field changes its meaning or goes away; fields may be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shadowmmu.checker import Violation
from shadowmmu.coordinator.aggregate import HistogramSummary
from shadowmmu.coordinator.coverage import Coverage
from shadowmmu.coordinator.page_faults import PageFaultReport
from shadowmmu.coordinator.series import Sample
from shadowmmu.protocol.messages import Role, RunConfig, Verdict

__all__ = [
    "EXIT_STATUS",
    "REPORT_NAME",
    "SCHEMA",
    "AccessReport",
    "Durations",
    "EventReport",
    "LostMember",
    "MemberReport",
    "RecoveryReport",
    "RunReport",
    "StreamReport",
    "ViolationReport",
    "decode_report",
    "encode_report",
    "throughput_of",
    "violation_report",
    "write_report",
]

SCHEMA = "shadowmmu-report/1"
REPORT_NAME = "report.json"
"""The report's file in a run's folder."""

EXIT_STATUS = {Verdict.PASS: 0, Verdict.VIOLATED: 1, Verdict.UNKNOWN: 2}
"""The exit status of a program that ends with a verdict."""


class AccessReport(msgspec.Struct, frozen=True):
    """The access that broke a rule. Addresses in bytes, `gfn` (-1: none) and `pfn` in frames, `size` in bytes."""

    vcpu: int
    entry: int
    flags: int
    gva: int
    gfn: int
    pfn: int
    size: int
    value: int


class EventReport(msgspec.Struct, frozen=True):
    """An event of the stream: its number (from 0), its type, its fields, and why it matters."""

    index: int
    type: str
    fields: dict[str, Any]
    note: str


class ViolationReport(msgspec.Struct, frozen=True):
    """The first violation. `rule`: its number in docs/COHERENCE.md; `vcpu` is -1 where no vCPU is at fault."""

    rule: int
    name: str
    text: str
    journal_record: int
    event_index: int
    vcpu: int
    access: AccessReport | None
    blame: str
    related: list[EventReport]


class LostMember(msgspec.Struct, frozen=True):
    """A member that was given up. `seconds`: after the start of the run; None: before it."""

    member: int
    role: Role
    name: str
    vcpu: int | None
    seconds: float | None
    reason: str


class RecoveryReport(msgspec.Struct, frozen=True):
    """A member was absent for a time. `lost`, `back`: seconds after the start of the run (negative: before it).

    `back` is None if it did not come back; `replaced_by` names the process that took its place, None if it was itself.
    """

    member: int
    role: Role
    name: str
    vcpu: int | None
    reason: str
    lost: float
    back: float | None
    replaced_by: str | None


class MemberReport(msgspec.Struct, frozen=True):
    """What one process of the run reported. `reported`: its final word was received (else: the last progress)."""

    member: int
    role: Role
    name: str
    vcpu: int | None
    reported: bool
    counters: dict[str, int]
    info: dict[str, str]


class Durations(msgspec.Struct, frozen=True):
    """Wall-clock seconds of the simulator: until the start, from there to the drain, from there to the end."""

    waiting: float = 0.0
    running: float = 0.0
    draining: float = 0.0


class StreamReport(msgspec.Struct, frozen=True):
    """The event stream and the journal. `events` as received by the coordinator; digests as the MMU service said."""

    events: int
    records: int
    events_digest: str = ""
    journal_digest: str = ""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a run."""

    schema: str = SCHEMA
    verdict: Verdict
    exit_status: int
    text: str
    version: str
    started: str
    mode: str
    vcpus: int
    start_rule: str | None
    config: RunConfig
    seconds: Durations
    violation: ViolationReport | None
    problems: list[str]
    notes: list[str]
    lost: list[LostMember]
    recoveries: list[RecoveryReport] = []
    stream: StreamReport
    throughput: dict[str, float]
    counters: dict[str, int]
    histograms: dict[str, HistogramSummary]
    coverage: Coverage
    page_faults: PageFaultReport | None = None
    series: list[Sample] = []
    members: list[MemberReport]


_decoder = msgspec.json.Decoder(RunReport)


def encode_report(report: RunReport) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def decode_report(data: bytes) -> RunReport:
    """A report back from JSON. Raises msgspec.DecodeError or msgspec.ValidationError."""
    report = _decoder.decode(data)
    if report.schema != SCHEMA:
        raise msgspec.ValidationError(f"the schema is {report.schema}; {SCHEMA} is known here")
    return report


def write_report(report: RunReport, directory: Path) -> Path:
    """Writes report.json into the folder, whole or not at all."""
    target = directory / REPORT_NAME
    scratch = directory / f".{REPORT_NAME}.new"
    scratch.write_bytes(encode_report(report))
    return scratch.replace(target)


def violation_report(violation: Violation) -> ViolationReport:
    """The report's form of a violation."""
    access = violation.access
    return ViolationReport(
        rule=violation.rule.value,
        name=violation.name,
        text=violation.text,
        journal_record=violation.journal_record,
        event_index=violation.event_index,
        vcpu=violation.vcpu,
        access=None if access is None else AccessReport(**msgspec.structs.asdict(access)),
        blame=violation.blame,
        related=[
            EventReport(
                related.index,
                type(related.event).__name__,
                msgspec.to_builtins(msgspec.structs.asdict(related.event)),
                related.note,
            )
            for related in violation.related
        ],
    )


_RATES = {
    "guest_instructions_per_second": "vcpu.instructions",
    "guest_accesses_per_second": "accesses.applied",
    "page_fault_exits_per_second": "exits.page_fault",
    "events_per_second": "events",
}


def throughput_of(counters: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Rates of the simulator by the wall clock; they say nothing about a kernel's speed."""
    if seconds <= 0:
        return {}
    return {rate: round(counters[name] / seconds, 1) for rate, name in _RATES.items() if name in counters}
