"""Reports, the lists of checks, and their page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from shadowmmu.protocol_check import (
    Check,
    ClientCheck,
    Outcome,
    Report,
    ReportFormat,
    Result,
    docgen,
    render,
    server_checks,
)

ROOT = Path(__file__).parents[2]
CHECKS = [*(check.check for check in server_checks()), *(check.check for check in ClientCheck)]

REPORT = Report(
    "Somebody",
    [
        Result(Check("x.good", "All is well", "Framing"), Outcome.PASSED, seconds=0.5),
        Result(
            Check("x.bad", "No # hash, no \\ stroke", "Kicks"), Outcome.FAILED, 'it said "\x00"\nand left'
        ),
        Result(Check("x.none", "Nobody there", "Kicks"), Outcome.SKIPPED, "one vCPU\nonly"),
    ],
    ["a note"],
)


def test_the_report_for_people() -> None:
    lines = render(REPORT, ReportFormat.TEXT).splitlines()
    assert lines[0] == "Somebody"
    assert "FAILED  x.bad   No # hash, no \\ stroke" in lines
    assert "                see docs/PROTOCOL.md, Kicks" in lines
    assert lines[-2:] == ["a note", "1 passed, 1 failed, 1 skipped"]


def test_the_report_as_tap() -> None:
    lines = render(REPORT, ReportFormat.TAP).splitlines()
    assert lines[:3] == ["TAP version 14", "1..3", "ok 1 - x.good: All is well"]
    assert lines[3:5] == ["not ok 2 - x.bad: No \\# hash, no \\\\ stroke", "  ---"]
    assert json.loads(lines[5].removeprefix("  message: ")) == REPORT.results[1].text
    assert lines[-2:] == ["ok 3 - x.none: Nobody there # SKIP one vCPU only", "# a note"]


def test_the_report_as_junit() -> None:
    suite = ET.fromstring(render(REPORT, ReportFormat.JUNIT))
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    good, bad, none = suite.findall("testcase")
    assert (good.get("name"), good.get("time")) == ("x.good: All is well", "0.500")
    failure = bad.find("failure")
    assert failure is not None and failure.get("message") == 'it said "?"\nand left'
    assert none.find("skipped") is not None


@pytest.mark.parametrize(
    "outcomes, passed",
    [
        ([Outcome.PASSED, Outcome.SKIPPED], True),
        ([Outcome.PASSED, Outcome.FAILED], False),
        ([Outcome.SKIPPED], False),
        ([], False),
    ],
)
def test_a_report_passes_if_something_did_and_nothing_failed(outcomes: list[Outcome], passed: bool) -> None:
    check = Check("x", "", "")
    assert Report("", [Result(check, outcome) for outcome in outcomes]).passed is passed


def test_every_check_names_a_heading_of_the_specification() -> None:
    headings = set(re.findall(r"^#+ (.*)$", (ROOT / "docs/PROTOCOL.md").read_text(), re.MULTILINE))
    assert {check.section for check in CHECKS} <= headings


def test_ids_are_unique() -> None:
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)


def test_the_page_has_all_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docgen.main(["--check", str(ROOT / "docs")]) == 0
    page = (ROOT / "docs" / docgen.PAGE).read_text()
    assert all(f"| `{check.id}` |" in page for check in CHECKS)
    (tmp_path / docgen.PAGE).write_text(page.replace("| `client.kick.stale`", "| `client.kick.old`"))
    assert docgen.main(["--check", str(tmp_path)]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert docgen.main([str(tmp_path)]) == 0
    assert (tmp_path / docgen.PAGE).read_text() == page
