"""Runs with processes at the points of a sweep: the simulator's own throughput by the wall clock.

A point starts `shadowmmu stress --json` in a process of its own, `machines` of them at once. What it measures says
nothing about a kernel's speed; and it is of this machine, so points run one at a time.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from shadowmmu.experiments.catalogue import CATALOGUE_VARIABLE
from shadowmmu.experiments.parameters import Parameters
from shadowmmu.experiments.values import Metric, Value
from shadowmmu.protocol.messages import Audit, GuestMode, MemoryModel, Tdp, Workload

__all__ = ["StressKind", "StressPoint"]

COMMAND: Final = (sys.executable, "-m", "shadowmmu.cli", "stress", "--json")
STATUS_UNKNOWN: Final = 2
"""Exit statuses up to this one are verdicts, with a report."""
ERROR_TAIL: Final = 1000


class StressPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of `shadowmmu stress` that can be varied, and the number of virtual machines that run at once.

    Those of None are the command's own defaults.
    """

    machines: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    ops: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)] = 100_000
    workload: Workload | None = None
    mode: GuestMode | None = None
    tdp: Tdp | None = None
    profile: str | None = None
    bypass_guest_pf: bool | None = None
    memory_model: MemoryModel | None = None
    vpid: bool | None = None
    audit: Audit | None = None
    check: bool | None = None
    host_rate: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] | None = None
    park_rate: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    memory_pages: Annotated[int, msgspec.Meta(ge=1024, le=1 << 20)] | None = None
    mmu_pages: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] | None = None
    in_process: bool = False

    def options(self, seed: int) -> list[str]:
        """The command line of one of the machines."""
        given = [f"--seed={seed}"]
        for name, value in msgspec.to_builtins(self).items():
            option = name.replace("_", "-")
            if name == "machines" or value is None:
                continue
            if name == "in_process":
                given += ["--in-process"] * value
            elif isinstance(value, bool):
                given.append(f"--{option}" if value else f"--no-{option}")
            else:
                given.append(f"--{option}={value}")
        return given


class _Seconds(msgspec.Struct):
    waiting: float
    running: float


class _Report(msgspec.Struct):
    """What is needed of report.json (docs/REPORT.md)."""

    verdict: str
    text: str
    started: str
    seconds: _Seconds
    counters: dict[str, int]


class StressKind:
    """Runs of the simulator with processes."""

    title = "the simulator's throughput, by the wall clock"
    repeatable = False
    parameters = Parameters(StressPoint)

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises ParameterError if there are no such options."""
        self.parameters.build(values)

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """Rates of all machines together, over the time in which any of them ran; the counters' sums."""
        point = self.parameters.build(values)
        with tempfile.TemporaryDirectory(prefix="shadowmmu-stress-") as folder:
            reports = _run_all(point, seed, Path(folder))
        for report in reports:
            if report.verdict != "pass":
                raise RuntimeError(f"a run ended with verdict {report.verdict}: {report.text}")
        begins = [
            datetime.fromisoformat(report.started).timestamp() + report.seconds.waiting for report in reports
        ]
        ends = [begin + report.seconds.running for begin, report in zip(begins, reports, strict=True)]
        seconds = max(ends) - min(begins)
        counters: dict[str, int] = {}
        for report in reports:
            for name, count in report.counters.items():
                counters[name] = counters.get(name, 0) + count
        metrics: dict[str, Metric] = {
            "cores": _usable_cores(),
            "python": platform.python_version(),
            "seconds": seconds,
            "instructions_per_second": counters.get("vcpu.instructions", 0) / seconds
            if seconds > 0
            else None,
            "events_per_second": counters.get("events", 0) / seconds if seconds > 0 else None,
        }
        return metrics | dict(counters)


def _run_all(point: StressPoint, seed: int, folder: Path) -> list[_Report]:
    processes: list[subprocess.Popen[bytes]] = []
    # The sweep is entered in the catalogue, not each of its runs.
    environment = {name: value for name, value in os.environ.items() if name != CATALOGUE_VARIABLE}
    try:
        for number in range(point.machines):
            command = [*COMMAND, *point.options((seed + number) % (1 << 64)), f"--out={folder / str(number)}"]
            with (
                (folder / f"{number}.json").open("wb") as out,
                (folder / f"{number}.err").open("wb") as errors,
            ):
                processes.append(subprocess.Popen(command, stdout=out, stderr=errors, env=environment))  # noqa: S603 - ours
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [_report(folder, number, status) for number, status in enumerate(statuses)]


def _report(folder: Path, number: int, status: int) -> _Report:
    if not 0 <= status <= STATUS_UNKNOWN:
        text = (folder / f"{number}.err").read_text(errors="replace")
        raise RuntimeError(f"'shadowmmu stress' ended with status {status}: {text.strip()[-ERROR_TAIL:]}")
    return msgspec.json.decode((folder / f"{number}.json").read_bytes(), type=_Report)


def _usable_cores() -> int:
    affinity: Any = getattr(os, "sched_getaffinity", None)
    cores: Sequence[int] | None = None if affinity is None else affinity(0)
    return (os.cpu_count() or 1) if cores is None else len(cores)
