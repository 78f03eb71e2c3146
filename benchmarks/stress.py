"""Guest accesses per second of a whole stress run with 4 vCPUs as processes, journal on, checks on and off."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.figures import Figure

__all__ = ["accesses_per_second"]

OPS = 200_000
ARGUMENTS = ["--vcpus", "4", "--ops", str(OPS), "--seed", "7", "--json"]


def _run(*arguments: str) -> float:
    """Guest accesses per second of one run, from its report."""
    command = [sys.executable, "-m", "shadowmmu.cli", "stress", *ARGUMENTS, *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    report = json.loads(done.stdout)
    return float(report["throughput"]["guest_accesses_per_second"])


def accesses_per_second(runs: int) -> list[Figure]:
    """`anon` (mostly TLB hits) and `mixed`, each with checks on and off."""
    figures = []
    for workload in ("anon", "mixed"):
        for checks, options in (("on", ()), ("off", ("--no-check", "--audit", "never"))):
            values = [_run("--workload", workload, *options) for _ in range(runs)]
            figures.append(
                Figure(
                    f"guest accesses of a stress run, {workload}, checks {checks}", "1/s", values, aim=100_000
                )
            )
    return figures
