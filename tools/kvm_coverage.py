"""`python -m tools.kvm_coverage`: which lines and branches of `shadowmmu.kvm` do the recordings reach?

The recordings of the real code are replayed under coverage.py, and the tests of the model (`tests/kvm`) are run under
it, each in a process of its own. The report says what the recordings alone reach, and for everything else whether the
tests reach it. It is written to docs/kvm_coverage.txt.

Fails if something is reached by neither, and if the list in docs/FAITHFULNESS.md of what the recordings do not reach
differs from what was found: a function with lines or branches that no recording reaches is named there, in backquotes
at the beginning of a list entry, with the reason.

Relies on coverage.py's JSON report for lines, branches and the functions that they belong to.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final

import coverage
import msgspec

from tools.revision import revision

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "services" / "shadowmmu" / "kvm"
RECORDINGS: Final = ROOT / "tests" / "data" / "conformance"
REPORT: Final = ROOT / "docs" / "kvm_coverage.txt"
LIST: Final = ROOT / "docs" / "FAITHFULNESS.md"

SOURCES: Final = ("recordings", "tests")
"""What is measured, in this order."""

Branch = tuple[int, int]
"""From line to line; the second is negative for leaving a function."""


class Summary(msgspec.Struct, frozen=True):
    """coverage.py's figures for a file."""

    num_statements: int
    missing_lines: int
    num_branches: int
    missing_branches: int


class Region(msgspec.Struct, frozen=True):
    """A function, with what was not reached in it."""

    missing_lines: list[int]
    missing_branches: list[Branch]


class FileReport(msgspec.Struct, frozen=True):
    """A module: its figures and its functions by qualified name ("" is what is outside functions)."""

    summary: Summary
    functions: dict[str, Region]


class CoverageReport(msgspec.Struct, frozen=True):
    """What is read of coverage.py's JSON report."""

    files: dict[str, FileReport]


class Gap(msgspec.Struct, frozen=True):
    """What the recordings do not reach in one function (`name`: module.function), and what of it no test reaches."""

    name: str
    lines: list[int]
    branches: list[Branch]
    unreached_lines: list[int]
    unreached_branches: list[Branch]

    @property
    def unreached(self) -> bool:
        """Whether something is reached neither by recordings nor by tests."""
        return bool(self.unreached_lines or self.unreached_branches)


def measure(source: str, data_file: Path) -> int:
    """Replay all recordings, or run the tests, in this process under coverage; 0 if they pass."""
    # The file of settings is pyproject.toml, for what is excluded; the rest is given here.
    cov = coverage.Coverage(
        data_file=str(data_file),
        data_suffix=False,
        branch=True,
        config_file=str(ROOT / "pyproject.toml"),
        source=[str(MODEL)],
        source_pkgs=[],
    )
    cov.start()
    status = _replay() if source == "recordings" else _run_tests()
    cov.stop()
    cov.save()
    return status


def _replay() -> int:
    from shadowmmu.conform import render, run_trace  # noqa: PLC0415 - imported under coverage

    failed = 0
    for path in sorted(RECORDINGS.rglob("*.jsonl.gz")):
        report = run_trace(path)
        if not report.passed:
            print(render(report), file=sys.stderr)
            failed = 1
    return failed


def _run_tests() -> int:
    import pytest  # noqa: PLC0415 - as above

    # A fixed seed: what the tests reach is to be the same each time.
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "tests/kvm"]))


def _json_report(data_files: Iterable[Path], scratch: Path) -> CoverageReport:
    cov = coverage.Coverage(data_file=None, branch=True, config_file=str(ROOT / "pyproject.toml"))
    cov.combine([str(file) for file in data_files], strict=True, keep=True)
    out = scratch / "report.json"
    cov.json_report(outfile=str(out))
    return msgspec.json.decode(out.read_bytes(), type=CoverageReport)


def gaps(recordings: CoverageReport, both: CoverageReport) -> list[Gap]:
    """What recordings do not reach, by function, in the order of modules and lines."""
    found = []
    for path, file in sorted(recordings.files.items()):
        for function, region in file.functions.items():
            if region.missing_lines or region.missing_branches:
                rest = both.files[path].functions[function]
                found.append(
                    Gap(
                        # Of functions with the same name (a property's), coverage.py numbers the second: @152.
                        f"{Path(path).stem}.{re.sub('@[0-9]+', '', function) or '(module)'}",
                        region.missing_lines,
                        region.missing_branches,
                        rest.missing_lines,
                        rest.missing_branches,
                    )
                )
    return found


def _ranges(lines: list[int]) -> str:
    """Line numbers, with neighbours joined: 3-5, 9."""
    if not lines:
        return ""
    breaks = [i for i, (a, b) in enumerate(pairwise(lines), start=1) if b != a + 1]
    runs = [lines[a:b] for a, b in pairwise([0, *breaks, len(lines)])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _places(lines: list[int], branches: list[Branch]) -> str:
    parts = []
    if lines:
        parts.append(f"lines {_ranges(lines)}")
    # A branch to or from a line that is missing itself says nothing new.
    rest = [(a, b) for a, b in branches if a not in lines and b not in lines]
    if rest:
        parts.append("branches " + ", ".join(f"{a}->{'exit' if b < 0 else b}" for a, b in rest))
    return "; ".join(parts) or f"branches into these lines: {len(branches)}"


def render(recordings: CoverageReport, both: CoverageReport, found: list[Gap]) -> str:
    """The report as text."""
    out = [
        "Coverage of shadowmmu.kvm by the recordings of the real code alone",
        f"made by `make coverage`, {revision(MODEL)}, {len(list(RECORDINGS.rglob('*.jsonl.gz')))} recordings",
        "",
        f"{'':<20} {'statements':>10} {'missed':>7} {'branches':>9} {'missed':>7} {'reached':>8}  with tests/kvm",
    ]
    totals = [0] * 6
    for path, file in sorted(recordings.files.items()):
        s, rest = file.summary, both.files[path].summary
        row = [
            s.num_statements,
            s.missing_lines,
            s.num_branches,
            s.missing_branches,
            rest.missing_lines,
            rest.missing_branches,
        ]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        out.append(_row(Path(path).stem, row))
    out += [
        _row("all", totals),
        "",
        "Not reached by any recording; the tests in tests/kvm reach it, except where said",
        "",
    ]
    for gap in found:
        out.append(f"{gap.name}: {_places(gap.lines, gap.branches)}")
        if gap.unreached:
            out.append(f"    REACHED BY NEITHER: {_places(gap.unreached_lines, gap.unreached_branches)}")
    return "\n".join(out) + "\n"


def _row(name: str, figures: list[int]) -> str:
    statements, missed, branches, missed_branches, rest, rest_branches = figures
    size = statements + branches

    def share(missing: int) -> str:
        return f"{100 * (size - missing) / size if size else 100:.1f} %"

    return (
        f"{name:<20} {statements:>10} {missed:>7} {branches:>9} {missed_branches:>7} "
        f"{share(missed + missed_branches):>8}  {share(rest + rest_branches):>8}"
    )


def listed(text: str) -> set[str]:
    """The functions that the page's list names: all code in backquotes at the beginning of an entry."""
    names: set[str] = set()
    for head in re.findall(r"^- ((?:`[^`]+`(?:, )?)+)", text, flags=re.MULTILINE):
        names |= set(re.findall(r"`([^`]+)`", head))
    return names


def complaints(found: list[Gap], names: set[str]) -> list[str]:
    """What is wrong: code that nothing reaches, functions that the page does not name, or names in vain."""
    missing = {gap.name for gap in found}
    return [
        *(f"{gap.name}: reached by neither recordings nor tests" for gap in found if gap.unreached),
        *(
            f"{name}: not all reached by recordings, but not in {LIST.name}"
            for name in sorted(missing - names)
        ),
        *(f"{name}: in {LIST.name}, but recordings reach all of it" for name in sorted(names - missing)),
    ]


def main() -> int:
    """Measures, prints and writes the report; 1 if there is something to complain of."""
    parser = argparse.ArgumentParser(description="What the recordings reach of shadowmmu.kvm.")
    parser.add_argument("--measure", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.data)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for source in SOURCES:
            print(f"measuring what the {source} reach", file=sys.stderr, flush=True)
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--measure",
                source,
                "--data",
                str(scratch / source),
            ]
            done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{done.stdout}the {source} do not pass", file=sys.stderr)
                return 1
        recordings = _json_report([scratch / "recordings"], scratch)
        both = _json_report([scratch / source for source in SOURCES], scratch)
    found = gaps(recordings, both)
    text = render(recordings, both, found)
    REPORT.write_text(text)
    print(text, end="")
    wrong = complaints(found, listed(LIST.read_text()) if LIST.exists() else set())
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
