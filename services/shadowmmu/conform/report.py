"""Comparing what the model did with what was recorded, field by field, and saying where they part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

import msgspec

from shadowmmu.conform.recording import PROFILES, BadRecordingError, Line, canonical_json, read_recording
from shadowmmu.conform.runner import Runner
from shadowmmu.conform.state import lru, state
from shadowmmu.kvm import Kvm, Profile

__all__ = ["Mismatch", "TraceReport", "conform_files", "render", "run_trace"]

_ANSWER_FIELDS = frozenset(
    ("result", "stats", "gmem", "used", "tlbs_dirty", "requests", "sha", "lru_sha", "state", "lru")
)


class Mismatch(msgspec.Struct, frozen=True):
    """The first difference: operation `seq` (its arguments in `operation`), the member, what was recorded and done.

    For a hash, `expected_detail` and `actual_detail` are what was hashed; the former is None where the recording has
    only the hash.
    """

    seq: int
    operation: dict[str, Any]
    field: str
    expected: Any
    actual: Any
    expected_detail: Any = None
    actual_detail: Any = None


class TraceReport(msgspec.Struct, frozen=True):
    """What came of one recording: `operations` that agree, and the first mismatch, or why it was not replayed.

    `operations` counts those done before the mismatch. `unsupported`: the recording needs what the model does not
    have. `error`: the file is no proper recording, or the model broke down in the operation.
    """

    name: str
    operations: int
    mismatch: Mismatch | None = None
    unsupported: str | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every field of every operation agrees."""
        return self.mismatch is None and self.unsupported is None and self.error is None


def _sha(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _arguments(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _ANSWER_FIELDS and name != "seq"}


def _compare(line: Line, answer: Line) -> Mismatch | None:
    """The first member that differs; members with details before hashes of them."""
    for field in (
        "result",
        "stats",
        "gmem",
        "used",
        "tlbs_dirty",
        "requests",
        "state",
        "sha",
        "lru",
        "lru_sha",
    ):
        if field in ("state", "lru") and field not in line:
            continue
        expected, actual = line.get(field), answer[field]
        if expected != actual:
            detail = {"sha": "state", "lru_sha": "lru"}.get(field, field)
            hashed = field in ("sha", "lru_sha")
            return Mismatch(
                seq=line["seq"],
                operation=_arguments(line),
                field=field,
                expected=expected,
                actual=actual,
                expected_detail=line.get(detail) if hashed else None,
                actual_detail=answer[detail] if hashed else None,
            )
    return None


def _perform(runner: Runner, line: Line) -> Line:
    kvm = runner.kvm
    before = kvm.stat.counters()
    result = runner.perform(line)
    after = kvm.stat.counters()
    now = state(kvm)
    order = lru(kvm)
    return {
        "result": result,
        "stats": {name: value - before[name] for name, value in after.items() if value != before[name]},
        "gmem": [list(change) for change in kvm.memory.take_changes()],
        "used": kvm.n_used_mmu_pages,
        "tlbs_dirty": kvm.tlbs_dirty,
        "requests": [vcpu.request_names() for vcpu in kvm.vcpus],
        "state": now,
        "sha": _sha(now),
        "lru": order,
        "lru_sha": _sha(order),
    }


def run_trace(
    source: str | Path | Iterable[str],
    profile: Profile | None = None,
    after_operation: Callable[[Line, Kvm], None] | None = None,
) -> TraceReport:
    """Replay one recording (a path, or its lines), up to the first mismatch.

    `after_operation` is called with each operation's line and the machine, before they are compared. Never raises for
    a bad recording: the report says what is wrong. `profile` is the kernel that was recorded, unless given.
    """
    name = str(source) if isinstance(source, str | Path) else "<lines>"
    done = 0
    try:
        recording = read_recording(source)
        name = recording.header.name
        recorded = recording.header.profile()
        if recorded is None:
            known = ", ".join(PROFILES)
            return TraceReport(
                name, 0, unsupported=f"recorded from kernel {recording.header.kernel!r}, not {known}"
            )
        runner = Runner(recording.header, profile or recorded)
        for line in recording.lines:
            try:
                answer = _perform(runner, line)
            except Exception as error:  # noqa: BLE001 - whatever the model raises is a finding
                return TraceReport(name, done, error=_breakdown(line, error))
            if after_operation is not None:
                after_operation(line, runner.kvm)
            mismatch = _compare(line, answer)
            if mismatch is not None:
                return TraceReport(name, done, mismatch=mismatch)
            done += 1
    except BadRecordingError as error:
        return TraceReport(name, done, error=str(error))
    return TraceReport(name, done)


def _breakdown(line: Line, error: Exception) -> str:
    what = (
        f"no operation or argument {error}"
        if isinstance(error, KeyError)
        else f"{type(error).__name__}: {error}"
    )
    return f"operation {line['seq']} ({canonical_json(_arguments(line))[:300]}): {what}"


def conform_files(paths: Iterable[str | Path]) -> Iterator[TraceReport]:
    """Replay recordings one after another."""
    for path in paths:
        yield run_trace(path)


def _lines(value: object) -> list[str]:
    """A value as lines to be compared: one per list element or member, two levels deep."""
    if isinstance(value, dict):
        out = []
        for name in sorted(value):
            member = value[name]
            if isinstance(member, list) and member:
                for element in member:
                    out += [f"{name}: {text}" for text in _element_lines(element)]
            else:
                out.append(f"{name}: {canonical_json(member)}")
        return out
    if isinstance(value, list):
        return [canonical_json(element) for element in value]
    return [canonical_json(value)]


def _element_lines(element: object) -> list[str]:
    """One shadow page or vCPU, spread over lines that each name it."""
    if not isinstance(element, dict):
        return [canonical_json(element)]
    label = element.get("id", "")
    out = []
    for name in sorted(element):
        member = element[name]
        if name == "spt":
            out += [f"{label} {name} {canonical_json(entry)}" for entry in member]
        elif name != "id":
            out.append(f"{label} {name} {canonical_json(member)}")
    return out or [canonical_json(element)]


def render(report: TraceReport) -> str:
    """The report as text: one line, and for a mismatch what was done, expected and found."""
    if report.unsupported is not None:
        return f"{report.name}: unsupported: {report.unsupported}"
    if report.error is not None:
        return f"{report.name}: error after {report.operations} operations: {report.error}"
    mismatch = report.mismatch
    if mismatch is None:
        return f"{report.name}: {report.operations} operations, 0 mismatches"
    out = [
        f"{report.name}: mismatch in operation {mismatch.seq}, member {mismatch.field!r}",
        f"  operation: {canonical_json(mismatch.operation)}",
    ]
    expected, actual = mismatch.expected, mismatch.actual
    if mismatch.field in ("sha", "lru_sha"):
        out += [f"  expected: {expected}", f"  actual:   {actual}"]
        expected, actual = mismatch.expected_detail, mismatch.actual_detail
        if expected is None:
            out.append("  the recording has only the hash here; the model's:")
            out += [f"    {text}" for text in _lines(actual)]
            return "\n".join(out)
        if expected == actual:
            out.append("  what was hashed agrees: the recording's own hash is wrong")
            return "\n".join(out)
    elif mismatch.field not in ("state", "lru"):
        out += [f"  expected: {canonical_json(expected)}", f"  actual:   {canonical_json(actual)}"]
        return "\n".join(out)
    out += [
        f"  {text}"
        for text in unified_diff(_lines(expected), _lines(actual), "expected", "actual", lineterm="", n=0)
        if not text.startswith("@@")
    ]
    return "\n".join(out)
