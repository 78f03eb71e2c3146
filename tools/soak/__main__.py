"""`make soak`: long stress runs with real processes, per kernel profile, divided over the workloads.

Each run has another seed. Results go to `results.jsonl` as they come, with commit and date; a soak that was stopped
goes on where it stood. What a run violates is reproduced and attributed (`shadowmmu stress --reproduce`); its folder is
kept. docs/SOAK.md is written from the results. Ends with status 1 if `fixed` was violated.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.protocol.messages import Workload
from tools.ledger import Ledger
from tools.revision import revision

ROOT: Final = Path(__file__).parents[2]
LEDGER: Final = Path(__file__).with_name("results.jsonl")
PAGE: Final = ROOT / "docs" / "SOAK.md"
PROFILES: Final = ("fixed", "linux-3.1")
FIRST_SEED: Final = 1000


class Run(msgspec.Struct, frozen=True):
    """One stress run. `status`: its exit status; `explained`: the lines that attribute its violation."""

    profile: str
    workload: str
    seed: int
    seconds: float
    status: int
    rule: str
    violation: str
    explained: list[str]
    revision: str


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="per profile")
    parser.add_argument("--vcpus", type=int, default=8)
    parser.add_argument("--ops", type=int, default=100_000, help="instructions per run")
    parser.add_argument(
        "--reproduce", type=float, default=45.0, help="seconds spent on each violation; not counted"
    )
    parser.add_argument("--out", type=Path, default=Path("soak-runs"), help="for folders of violated runs")
    parser.add_argument("--fresh", action="store_true", help="forget what was run")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    ledger = Ledger(LEDGER, Run, fresh=arguments.fresh)
    runs = ledger.results
    if not arguments.page:
        _run_all(arguments, ledger)
    PAGE.write_text(page(runs), encoding="utf-8")
    bad = [run for run in runs if run.profile == "fixed" and run.status != 0]
    print(f"{len(runs)} runs, {len(bad)} of fixed not clean; {PAGE}")
    sys.exit(1 if bad else 0)


def _run_all(arguments: argparse.Namespace, ledger: Ledger[Run]) -> None:
    of = revision(ROOT)
    share = arguments.seconds / len(Workload)
    for workload in Workload:
        for profile in PROFILES:
            while True:
                mine = [
                    run for run in ledger.results if (run.profile, run.workload) == (profile, workload.value)
                ]
                if sum(run.seconds for run in mine) >= share:
                    break
                run = _run(arguments, profile, workload.value, FIRST_SEED + len(mine), of)
                ledger.add(run)
                print(
                    f"{profile} {workload.value} seed {run.seed}: status {run.status} {run.rule}", flush=True
                )


def _run(arguments: argparse.Namespace, profile: str, workload: str, seed: int, of: str) -> Run:
    folder = arguments.out / f"{profile}-{workload}-{seed}"
    command = [
        sys.executable, "-m", "shadowmmu.cli", "stress", "--vcpus", str(arguments.vcpus), "--ops", str(arguments.ops),
        "--workload", workload, "--profile", profile, "--seed", str(seed), "--out", str(folder),
        "--reproduce", str(arguments.reproduce),
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    violation = _violation(folder)
    if violation is not None:
        seconds = max(0.0, seconds - arguments.reproduce)
    lines = done.stdout.splitlines()
    start = next(
        (i for i, line in enumerate(lines) if re.match(r"(Explained|Not attributed):", line)), len(lines)
    )
    explained = lines[start:] or [line for line in lines if line.startswith("No short reproduction")]
    if done.returncode == 0:
        _remove(folder)
    return Run(
        profile=profile,
        workload=workload,
        seed=seed,
        seconds=seconds,
        status=done.returncode,
        rule="" if violation is None else f"rule {violation['rule']}",
        violation="" if violation is None else str(violation["text"]),
        explained=explained,
        revision=of,
    )


def _violation(folder: Path) -> dict[str, object] | None:
    report = folder / "report.json"
    if not report.exists():
        return None
    violation: dict[str, object] | None = msgspec.json.decode(report.read_bytes())["violation"]
    return violation


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def page(runs: list[Run]) -> str:
    """docs/SOAK.md."""
    lines = [
        "# Soak",
        "",
        "Generated by `make soak`: stress runs with real processes, 8 vCPUs, each with another seed; a run ends at its",
        "first violation, which is then reproduced in small and attributed. Seconds are those of the runs alone.",
        "",
        f"Measured: {'; '.join(sorted({run.revision for run in runs}))}.",
        "",
        "| profile | workload | runs | seconds | violated | unknown |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for profile in PROFILES:
        for workload in Workload:
            mine = [run for run in runs if (run.profile, run.workload) == (profile, workload.value)]
            if mine:
                violated = sum(run.status == 1 for run in mine)
                unknown = sum(run.status not in {0, 1} for run in mine)
                seconds = sum(run.seconds for run in mine)
                lines.append(
                    f"| {profile} | {workload.value} | {len(mine)} | {seconds:.0f} | {violated} | {unknown} |"
                )
    for profile in PROFILES:
        lines += ["", f"## What was found in {profile}", ""]
        found = Counter(
            (run.rule, " ".join(run.explained)) for run in runs if run.profile == profile and run.status == 1
        )
        if not found:
            lines.append("Nothing.")
        for (rule, explained), count in found.most_common():
            lines.append(f"- {count} times {rule}: {explained or 'no short reproduction was found'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
