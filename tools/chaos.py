"""`make chaos`: short runs with real processes and faults put in, each with another seed.

Every run kills, stops and cuts off processes by its seed's plan (`shadowmmu.coordinator.chaos`), and has to end with
verdict pass, a replay of its journal to the same digest, and programs that lost nothing and did nothing twice. Results
go to `tools/chaos.jsonl` as they come, with commit and date; a campaign that was stopped goes on where it stood. The
folders of failed runs are kept. docs/CHAOS.md is written from the results. Ends with status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.coordinator.chaos_report import CHAOS_NAME, ChaosReport
from shadowmmu.protocol.messages import Workload
from tools.ledger import Ledger, run_all
from tools.revision import revision

ROOT: Final = Path(__file__).parents[1]
LEDGER: Final = Path(__file__).with_name("chaos.jsonl")
PAGE: Final = ROOT / "docs" / "CHAOS.md"
WORKLOADS: Final = [workload for workload in Workload if workload is not Workload.MODES]
TAIL: Final = 800
"""Characters of what a failed run said that are kept."""


class Settings(msgspec.Struct, frozen=True):
    """What all runs of a campaign have in common."""

    vcpus: int
    ops: int
    faults: int
    out: str
    revision: str


class Run(msgspec.Struct, frozen=True):
    """One run. `faults`: how often which kind happened; `said`: the end of what it wrote, if it failed."""

    seed: int
    workload: str
    vcpus: int
    ops: int
    status: int
    seconds: float
    faults: dict[str, int]
    not_due: int
    restarts: int
    lost: int
    duplicated: int
    hung: bool
    failures: list[str]
    said: str
    revision: str


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="how many there are to be in the end")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--ops", type=int, default=20_000, help="instructions per run")
    parser.add_argument("--faults", type=int, default=5, help="per run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "chaos-runs", help="for folders of failed runs")
    parser.add_argument("--fresh", action="store_true", help="forget what was run")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    ledger = Ledger(LEDGER, Run, fresh=arguments.fresh)
    if not arguments.page:
        settings = Settings(
            arguments.vcpus, arguments.ops, arguments.faults, str(arguments.out), revision(ROOT)
        )
        done = {run.seed for run in ledger.results}
        seeds = range(arguments.first, arguments.first + arguments.runs)
        missing = [seed for seed in seeds if seed not in done]
        run_all(missing, partial(_run, settings), arguments.jobs, ledger, _name)
    PAGE.write_text(page(ledger.results), encoding="utf-8")
    bad = [run for run in ledger.results if run.status != 0]
    print(f"{len(ledger.results)} runs, {len(bad)} failed; {PAGE}")
    sys.exit(1 if bad else 0)


def _name(run: Run) -> str:
    return f"seed {run.seed}: status {run.status}"


def _run(settings: Settings, seed: int) -> Run:
    folder = Path(settings.out) / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    workload = WORKLOADS[seed % len(WORKLOADS)].value
    command = [
        sys.executable, "-m", "shadowmmu.cli", "stress", "--chaos", str(seed), "--chaos-rate", str(settings.faults),
        "--vcpus", str(settings.vcpus), "--ops", str(settings.ops), "--workload", workload, "--seed", str(seed),
        "--reproduce", "0", "--out", str(folder),
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = round(time.monotonic() - begin, 1)
    chaos = _chaos(folder)
    happened = Counter(fault.kind for fault in chaos.faults if fault.seconds is not None)
    if done.returncode == 0:
        shutil.rmtree(folder)
    return Run(
        seed=seed,
        workload=workload,
        vcpus=settings.vcpus,
        ops=settings.ops,
        status=done.returncode,
        seconds=seconds,
        faults=dict(happened),
        not_due=sum(fault.seconds is None for fault in chaos.faults),
        restarts=chaos.restarts,
        lost=chaos.lost,
        duplicated=chaos.duplicated,
        hung=chaos.hung,
        failures=chaos.failures,
        said="" if done.returncode == 0 else done.stderr[-TAIL:],
        revision=settings.revision,
    )


def _chaos(folder: Path) -> ChaosReport:
    """What the run wrote of its faults."""
    path = folder / CHAOS_NAME
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=ChaosReport)
    return ChaosReport(
        seed=0, seconds=0.0, hung=False, restarts=0, instructions=0, faults=[], lost=0, duplicated=0,
        failures=[f"there is no {CHAOS_NAME}"],
    )  # fmt: skip


def page(runs: list[Run]) -> str:
    """docs/CHAOS.md."""
    faults: Counter[str] = Counter()
    for run in runs:
        faults.update(run.faults)
    bad = [run for run in runs if run.status != 0]
    lines = [
        "# Chaos runs",
        "",
        "Written by `make chaos` from `tools/chaos.jsonl`; docs/RELIABILITY.md says what is promised. In each run",
        "processes are killed, stopped and cut off from one another by a seeded plan; it has to end with verdict pass,",
        "its journal has to replay to the digest of the events that the coordinator has, and the guests' programs,",
        "executed once more along the journal, must have lost nothing and done nothing twice.",
        "",
        "| | |",
        "| --- | --- |",
        f"| runs | {len(runs)} |",
        f"| failed | {len(bad)} |",
        f"| instructions lost | {sum(run.lost for run in runs)} |",
        f"| instructions executed twice | {sum(run.duplicated for run in runs)} |",
        f"| hangs | {sum(run.hung for run in runs)} |",
        f"| faults | {sum(faults.values())} |",
        *(f"| {kind} | {count} |" for kind, count in sorted(faults.items())),
        f"| faults that were not due before the run was over | {sum(run.not_due for run in runs)} |",
        f"| processes started again | {sum(run.restarts for run in runs)} |",
        f"| instructions | {sum(run.ops for run in runs):,} |",
        f"| seconds, all together | {sum(run.seconds for run in runs):,.0f} |",
        f"| seconds, longest run | {max((run.seconds for run in runs), default=0.0):,.0f} |",
        "",
        *(f"- {of}: {count} runs" for of, count in sorted(Counter(run.revision for run in runs).items())),
    ]
    if bad:
        lines += ["", "## Failed", "", "| seed | status | why |", "| --- | --- | --- |"]
        lines += [f"| {run.seed} | {run.status} | {'; '.join(run.failures)} |" for run in bad]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
