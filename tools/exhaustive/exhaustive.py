"""`make exhaustive`: every litmus test's exhaustive search under `fixed`, with and without the reductions.

Each ends when all has been seen, or at a limit of time. Where both end, their outcomes must be the same: the
reductions lose nothing. Results go to `results.jsonl` as they come, with commit and date; a campaign that was stopped
goes on where it stood. docs/EXHAUSTIVE.md is written from them. Ends with status 1 if outcomes differ, or something was
found.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import Progress

from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.library import library_files
from shadowmmu.explorer.litmus import load_litmus
from shadowmmu.explorer.outcome import format_outcome
from tools.revision import revision

ROOT: Final = Path(__file__).parents[2]
LEDGER: Final = Path(__file__).with_name("results.jsonl")
PAGE: Final = ROOT / "docs" / "EXHAUSTIVE.md"
PROFILE: Final = "fixed"


class Cell(msgspec.Struct, frozen=True):
    """One search: a test by name, with reductions or without."""

    test: str
    reduced: bool


class Result(msgspec.Struct, frozen=True):
    """What came of it. `outcomes`: the final states, with the failures among them in brackets."""

    cell: Cell
    executions: int
    states: int
    complete: bool
    seconds: float
    outcomes: list[str]
    revision: str


def search(cell: Cell, limit: float, of: str) -> Result:
    """Runs one search, for `limit` seconds at most."""
    path = next(path for path in library_files() if path.stem == cell.test)
    depth_first = DepthFirst(load_litmus(path), PROFILE, reduce=cell.reduced)
    outcomes: set[str] = set()
    begin = time.monotonic()
    while not depth_first.complete and time.monotonic() - begin < limit:
        ending = depth_first.next()
        if ending is not None:
            kind = "" if ending.failure is None else f" [{ending.failure.kind}]"
            outcomes.add(format_outcome(ending.outcome) + kind)
    return Result(
        cell,
        depth_first.executions,
        depth_first.states,
        depth_first.complete,
        time.monotonic() - begin,
        sorted(outcomes),
        of,
    )


def read_ledger() -> dict[Cell, Result]:
    """The results so far."""
    if not LEDGER.exists():
        return {}
    lines = LEDGER.read_bytes().splitlines()
    return {result.cell: result for result in (msgspec.json.decode(line, type=Result) for line in lines)}


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(prog="make exhaustive", description=__doc__)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per search with reductions")
    parser.add_argument("--plain-limit", type=float, default=30.0, help="seconds per search without")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what was searched")
    parser.add_argument("--again", action="store_true", help="those that were cut off, once more")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    if arguments.fresh:
        LEDGER.unlink(missing_ok=True)
    results = read_ledger()
    if not arguments.page:
        _run_all(arguments, results)
    PAGE.write_text(page(results), encoding="utf-8")
    wrong = [test for test in sorted({cell.test for cell in results}) if _wrong(results, test)]
    cut = [cell.test for cell, result in results.items() if cell.reduced and not result.complete]
    print(
        f"{len(results)} searches; cut off: {', '.join(cut) or 'none'}; wrong: {', '.join(wrong) or 'none'}; {PAGE}"
    )
    sys.exit(1 if wrong else 0)


def _run_all(arguments: argparse.Namespace, results: dict[Cell, Result]) -> None:
    of = revision(ROOT)
    cells = [Cell(path.stem, reduced) for reduced in (True, False) for path in library_files()]
    missing = [
        cell for cell in cells if cell not in results or (arguments.again and not results[cell].complete)
    ]
    with (
        Progress(console=Console(stderr=True)) as progress,
        LEDGER.open("ab", buffering=0) as ledger,
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task("searches", total=len(missing))
        futures = [
            pool.submit(search, cell, arguments.limit if cell.reduced else arguments.plain_limit, of)
            for cell in missing
        ]
        for future in as_completed(futures):
            result = future.result()
            results[result.cell] = result
            ledger.write(msgspec.json.encode(result) + b"\n")
            progress.update(task, advance=1, description=result.cell.test)


def _wrong(results: dict[Cell, Result], test: str) -> bool:
    reduced, plain = results.get(Cell(test, reduced=True)), results.get(Cell(test, reduced=False))
    found = any(
        "[" in outcome for result in (reduced, plain) if result is not None for outcome in result.outcomes
    )
    if reduced is None or plain is None or not (reduced.complete and plain.complete):
        return found
    return found or reduced.outcomes != plain.outcomes


def page(results: dict[Cell, Result]) -> str:
    """docs/EXHAUSTIVE.md."""
    lines = [
        "# Exhaustive searches",
        "",
        "Generated by `make exhaustive`: all interleavings of each litmus test under `fixed`. *Executions* with sleep",
        "sets and state hashing, and without; `>` where the search was cut off at its limit of time. Where both ended,",
        "the sets of outcomes were compared.",
        "",
        f"Searched: {'; '.join(sorted({result.revision for result in results.values()}))}.",
        "",
        "| test | states | executions | seconds | without reductions | outcomes | the same |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for test in [path.stem for path in library_files()]:
        reduced, plain = results.get(Cell(test, reduced=True)), results.get(Cell(test, reduced=False))
        if reduced is None:
            continue
        both = plain is not None and reduced.complete and plain.complete
        same = "" if not both else "no" if _wrong(results, test) else "yes"
        lines.append(
            f"| {test} | {reduced.states} | {_executions(reduced)} | {reduced.seconds:.1f} | "
            f"{'' if plain is None else _executions(plain)} | {len(reduced.outcomes)} | {same} |"
        )
    return "\n".join(lines) + "\n"


def _executions(result: Result) -> str:
    return f"{'' if result.complete else '> '}{result.executions}"
