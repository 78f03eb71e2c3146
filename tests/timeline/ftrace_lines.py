"""The lines of runs, as a parser for the kernel's formats reads them."""

from __future__ import annotations

import functools
import io

from shadowmmu.timeline import ALL, Records, write_ftrace
from tests.timeline.print_formats import DATA, Line, Parser
from tests.timeline.recorded import recorded

WITHOUT_FORMAT = {
    "kvm_inj_exception": r"#PF \(0x[0-9a-f]+\)",
    "kvm_mmio": r"mmio (?:unsatisfied-read|write) len \d+ gpa 0x[0-9a-f]+ val 0x[0-9a-f]+",
    "kvm_mmu_audit": r"vcpu:(?P<cpu>\d+) (?P<point>(?:pre|post) (?:page fault|pte write|sync))",
    "kvm_age_page": r"hva (?P<hva>[0-9a-f]+) gfn (?P<gfn>[0-9a-f]+) (?P<referenced>YOUNG|OLD)",
    "tracing_mark_write": r"\S.*",
}
"""Tracepoints of 3.1 whose formats the file does not have (trace.h, mmutrace.h, include/trace/events/kvm.h)."""


def parser() -> Parser:
    """For every event that is ours."""
    return Parser((DATA / "print-formats.txt").read_text(), WITHOUT_FORMAT)


@functools.cache
def text(name: str, records: Records = ALL) -> str:
    out = io.BytesIO()
    write_ftrace(recorded(name).execution, out, records)
    return out.getvalue().decode()


@functools.cache
def lines(name: str, records: Records = ALL) -> list[Line]:
    """Every line, as a parser for the kernel's formats reads it."""
    parse = parser().parse
    return [parse(line) for line in text(name, records).splitlines() if not line.startswith("#")]
