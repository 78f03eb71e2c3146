"""Reports of conformance checks as text for people, as TAP 14, and as JUnit XML. Pure: they return strings.

TAP: https://testanything.org/tap-version-14-specification.html. JUnit: the form that CI systems read.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from typing import Final
from xml.etree import ElementTree as ET

from shadowmmu.protocol_check.checks import Outcome, Report, Result

__all__ = ["ReportFormat", "render"]


class ReportFormat(enum.Enum):
    """How a report is written."""

    TEXT = "text"
    TAP = "tap"
    JUNIT = "junit"


_MARKS: Final = {Outcome.PASSED: "ok", Outcome.FAILED: "FAILED", Outcome.SKIPPED: "skipped"}


def _text(report: Report) -> str:
    width = max((len(result.check.id) for result in report.results), default=0)
    lines = [f"{report.subject}", ""]
    for result in report.results:
        lines.append(f"{_MARKS[result.outcome]:<8}{result.check.id:<{width}}  {result.check.title}")
        if result.text:
            lines += [f"{'':8}{'':<{width}}  -> {line}" for line in result.text.splitlines()]
        if result.outcome is Outcome.FAILED:
            lines.append(f"{'':8}{'':<{width}}  see docs/PROTOCOL.md, {result.check.section}")
    lines += ["", *report.notes]
    counts = ", ".join(f"{report.count(outcome)} {outcome.value}" for outcome in Outcome)
    return "\n".join([*lines, counts, ""])


def _tap_line(number: int, result: Result) -> list[str]:
    title = result.check.title.replace("\\", "\\\\").replace("#", "\\#")
    state = "not ok" if result.outcome is Outcome.FAILED else "ok"
    line = f"{state} {number} - {result.check.id}: {title}"
    if result.outcome is Outcome.SKIPPED:
        line += f" # SKIP {' '.join(result.text.split())}"
    lines = [line]
    if result.outcome is Outcome.FAILED:
        # A JSON string is a YAML string.
        lines += [
            "  ---",
            f"  message: {json.dumps(result.text)}",
            f"  section: {json.dumps(result.check.section)}",
            "  ...",
        ]
    return lines


def _tap(report: Report) -> str:
    lines = ["TAP version 14", f"1..{len(report.results)}"]
    for number, result in enumerate(report.results, 1):
        lines += _tap_line(number, result)
    return "\n".join([*lines, *(f"# {note}" for note in report.notes), ""])


def _printable(text: str) -> str:
    """XML 1.0 has no control characters but these, not even escaped ones."""
    return "".join(
        c if c in "\n\t" or 0x20 <= ord(c) < 0xD800 or 0xE000 <= ord(c) < 0xFFFE else "?" for c in text
    )


def _junit(report: Report) -> str:
    suite = ET.Element(
        "testsuite",
        name=_printable(report.subject),
        tests=str(len(report.results)),
        failures=str(report.count(Outcome.FAILED)),
        skipped=str(report.count(Outcome.SKIPPED)),
        errors="0",
        time=f"{sum(result.seconds for result in report.results):.3f}",
    )
    for result in report.results:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=result.check.id.partition(".")[0],
            name=f"{result.check.id}: {result.check.title}",
            time=f"{result.seconds:.3f}",
        )
        if result.outcome is Outcome.FAILED:
            failure = ET.SubElement(case, "failure", message=_printable(result.text))
            failure.text = f"docs/PROTOCOL.md, {result.check.section}"
        elif result.outcome is Outcome.SKIPPED:
            ET.SubElement(case, "skipped", message=_printable(result.text))
    if report.notes:
        ET.SubElement(suite, "system-out").text = _printable("\n".join(report.notes))
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


_RENDERERS: Final[Mapping[ReportFormat, Callable[[Report], str]]] = {
    ReportFormat.TEXT: _text,
    ReportFormat.TAP: _tap,
    ReportFormat.JUNIT: _junit,
}


def render(report: Report, form: ReportFormat) -> str:
    """The report in that form, with a line feed at its end."""
    return _RENDERERS[form](report)
