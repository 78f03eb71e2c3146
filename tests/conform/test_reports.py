"""Mismatches are found where they are; files that are no recordings are said to be none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shadowmmu.conform import TraceReport, conform_files, render, run_trace

DATA = Path(__file__).parents[1] / "data" / "conformance"


def lines(name: str = "paging64-basic-01") -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def replay(changed: list[dict[str, Any]]) -> TraceReport:
    return run_trace([json.dumps(line) for line in changed])


def test_unchanged_lines_pass() -> None:
    report = replay(lines())
    assert report.passed
    assert render(report) == "paging64-basic-01: 9 operations, 0 mismatches"


@pytest.mark.parametrize(
    "field, change",
    [
        ("result", lambda line: line["result"].update(pfn=7)),
        ("stats", lambda line: line["stats"].update(pf_fixed=2)),
        ("gmem", lambda line: line["gmem"].pop()),
        ("used", lambda line: line.update(used=line["used"] + 1)),
        ("tlbs_dirty", lambda line: line.update(tlbs_dirty=1)),
        ("requests", lambda line: line.update(requests=[["tlb_flush"]])),
        ("state", lambda line: line["state"]["sps"][0].update(root_count=2)),
        ("sha", lambda line: line.update(sha="0" * 64)),
        ("lru", lambda line: line["lru"].reverse()),
        ("lru_sha", lambda line: line.update(lru_sha="0" * 64)),
    ],
)
def test_a_change_is_reported_at_its_operation_and_field(
    field: str, change: Callable[[dict[str, Any]], object]
) -> None:
    changed = lines()
    change(changed[4])  # operation 3, an access
    report = replay(changed)
    assert report.mismatch is not None
    assert (report.operations, report.mismatch.seq, report.mismatch.field) == (3, 3, field)
    text = render(report)
    assert f"mismatch in operation 3, member '{field}'" in text
    assert '"op":"access"' in text


def test_a_missing_field_is_a_mismatch() -> None:
    changed = lines()
    del changed[2]["requests"]
    report = replay(changed)
    assert report.mismatch is not None
    assert (report.mismatch.seq, report.mismatch.field) == (1, "requests")


def test_a_state_is_shown_as_a_diff() -> None:
    changed = lines()
    changed[4]["state"]["sps"][3]["spt"][2][3] = "u"
    text = render(replay(changed))
    assert '-sps: 19:1:0:0:7:1:1:1:0:0 spt [2,"l",1048834,"u",258]' in text
    assert '+sps: 19:1:0:0:7:1:1:1:0:0 spt [2,"l",1048834,"wuxh",258]' in text
    assert len([line for line in text.splitlines() if line.startswith(("  -", "  +"))]) == 4


def test_a_hash_without_its_state_shows_the_models_state() -> None:
    changed = lines()
    del changed[4]["state"]
    changed[4]["sha"] = "0" * 64
    text = render(replay(changed))
    assert "the recording has only the hash here" in text
    assert "sps: 19:1:0:0:7:1:1:1:0:0 spt" in text


def test_another_operation_is_an_error_that_names_it() -> None:
    changed = lines()
    changed[3] = {"op": "explode", "seq": 2}
    report = replay(changed)
    assert report.error is not None
    assert "operation 2" in report.error
    assert "explode" in report.error


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kernel": "v3.1-rc1"}, "kernel 'v3.1-rc1'"),
        ({"kernel": ""}, "kernel ''"),
    ],
)
def test_what_the_model_lacks_is_unsupported(changes: dict[str, object], reason: str) -> None:
    changed = lines()
    changed[0].update(changes)
    report = replay(changed)
    assert report.unsupported is not None
    assert reason in report.unsupported
    assert not report.passed
    assert ": unsupported: " in render(report)


def header(**changes: object) -> str:
    return json.dumps(lines()[0] | changes)


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "empty"),
        (["not json"], "line 1: not JSON"),
        (['{"format":"something/2"}'], "format 'something/2', expected 'shadow-mmu-conformance/1'"),
        (["[]"], "format None"),
        (['{"format":"shadow-mmu-conformance/1"}'], "bad header"),
        ([header(memslots=[])], "bad header"),
        ([header(memslots=[{"id": 0, "base_gfn": 0, "npages": 1, "backing": "8k"}])], "bad header"),
        ([header(max_mmu_pages=3)], "bad header: n_max_mmu_pages is 3"),
        ([header(), "{"], "line 2: not JSON"),
        ([header(), "{}"], "line 2: not an operation"),
        ([header(), '{"op":"enter","seq":5}'], "line 2: operation number 5, expected 0"),
        ([header()], "0 operations, its header says 9"),
    ],
)
def test_what_is_wrong_with_bad_lines_is_said(texts: list[str], message: str) -> None:
    report = run_trace(texts)
    assert report.error is not None
    assert message in report.error
    assert not report.passed
    assert "error" in render(report)


def test_bad_files_are_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(header())
    truncated = tmp_path / "truncated.jsonl.gz"
    truncated.write_bytes((DATA / "unsync-01.jsonl.gz").read_bytes()[:500])
    binary = tmp_path / "binary.jsonl.gz"
    binary.write_bytes(gzip.compress(b"\xff\xfe\x00"))
    reports = list(conform_files([plain, truncated, binary, tmp_path / "missing.gz", tmp_path]))
    for report, name, message in zip(
        reports,
        ("plain.jsonl.gz", "truncated.jsonl.gz", "binary.jsonl.gz", "missing.gz", ""),
        ("gzip", "gzip", "UTF-8", "No such file", "cannot be read"),
        strict=True,
    ):
        assert report.error is not None
        assert name in report.error
        assert message in report.error
