"""`python -m tools.mutation`: apply mutants to a copy of `shadowmmu.kvm`, and see which ones recordings and tests kill.

Goes on where it was stopped. Ends with docs/MUTATION.md, and with status 1 if too many survive or a survivor is not
explained.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec

from tools.mutation.bench import Baseline, Bench
from tools.mutation.curated import StaleMutantsError, curated
from tools.mutation.ledger import Ledger
from tools.mutation.mutant import ROOT, Mutant
from tools.mutation.report import complaints, explanations, render
from tools.mutation.sample import sample

SEED: Final = 31
SIZE: Final = 150
PAGE: Final = ROOT / "docs" / "MUTATION.md"
CACHE: Final = ROOT / "build" / "mutation"


def _baseline(ledger: Ledger, bench: Bench) -> Baseline:
    """What the unchanged model does, measured once per state of model, recordings and tests."""
    file = CACHE / f"{ledger.model}-{ledger.evidence}.json"
    if file.exists():
        return msgspec.json.decode(file.read_bytes(), type=Baseline)
    print("measuring the unchanged model", flush=True)
    baseline = bench.measure()
    bench.try_unchanged(baseline)
    CACHE.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.encode(baseline))
    return baseline


def _try_all(mutants: list[Mutant], ledger: Ledger, jobs: int) -> None:
    """Try mutants, `jobs` at a time, each with a copy of its own."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory, ExitStack() as stack:
        benches: queue.SimpleQueue[Bench] = queue.SimpleQueue()
        for number in range(jobs):
            folder = Path(directory) / str(number)
            folder.mkdir()
            benches.put(stack.enter_context(Bench(folder)))
        first = benches.get()
        baseline = _baseline(ledger, first)
        benches.put(first)

        def attempt(mutant: Mutant) -> float:
            began = time.monotonic()
            bench = benches.get()
            try:
                verdict = bench.try_mutant(mutant, baseline)
            finally:
                benches.put(bench)
            ledger.add(mutant, verdict)
            seconds = time.monotonic() - began
            print(
                f"{mutant.id:<40} {verdict.outcome:<10} {verdict.killer.split('/')[-1][:60]} ({seconds:.1f} s)",
                flush=True,
            )
            return seconds

        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        try:
            seconds = list(pool.map(attempt, mutants))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        print(f"{len(mutants)} mutants tried in {sum(seconds):.0f} s of {jobs} at a time", flush=True)


def main() -> int:
    """Tries what is not known yet and writes the page; 1: not good enough, 2: nothing could be tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="trials at a time")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--only", nargs="+", metavar="ID", help="try only these, and write no page")
    arguments = parser.parse_args()
    try:
        chosen = curated(ROOT)
    except StaleMutantsError as error:
        print(f"curated.toml does not fit the model any more:\n{error}", file=sys.stderr)
        return 2
    sampled = sample(ROOT, SIZE, SEED)
    mutants = [*chosen, *sampled]
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.id:<40} {mutant.module}.py:{mutant.number}: {mutant.kind}")
            print(f"    - {mutant.line.strip()}\n    + {mutant.becomes.strip()}")
        return 0
    ledger = Ledger()
    if arguments.only:
        _try_all([mutant for mutant in mutants if mutant.id in arguments.only], ledger, arguments.jobs)
        return 0
    rest = [mutant for mutant in mutants if ledger.find(mutant) is None]
    print(f"{len(mutants)} mutants, {len(mutants) - len(rest)} of them tried before", flush=True)
    if rest:
        _try_all(rest, ledger, arguments.jobs)
    ledger.tidy(mutants)
    page = render(ledger, sampled, chosen, SEED)
    PAGE.write_text(page)
    print(page.split("## Survivors")[0])
    wrong = complaints([result for m in mutants if (result := ledger.find(m)) is not None], explanations())
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
