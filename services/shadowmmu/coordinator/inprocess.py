"""A whole run in this process, without sockets: the same report, repeatable to the digest."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from hdrh.histogram import HdrHistogram

from shadowmmu.checker import Checker, Violation
from shadowmmu.coordinator.aggregate import merge_counters, merge_histograms
from shadowmmu.coordinator.coverage import coverage_of
from shadowmmu.coordinator.page_faults import page_faults_of
from shadowmmu.coordinator.progress import Snapshot
from shadowmmu.coordinator.report import (
    EXIT_STATUS,
    Durations,
    RunReport,
    StreamReport,
    throughput_of,
    violation_report,
)
from shadowmmu.coordinator.series import Series, sampled_counters
from shadowmmu.machine import JOURNAL_NAME, InProcessResult, run_in_process
from shadowmmu.protocol.events import Event
from shadowmmu.protocol.messages import RunConfig, Verdict

__all__ = ["run_in_this_process"]

LONGEST_WAIT_STEPS = 1 << 30
SAMPLE_SECONDS = 0.05
"""Between the first samples of `RunReport.series`."""


class _Watcher:
    """The checker as a listener of the machine, and the progress of the run."""

    def __init__(self, config: RunConfig, on_progress: Callable[[Snapshot], None] | None) -> None:
        self._checker = Checker() if config.check else None
        self._config = config
        self._on_progress = on_progress
        self._began = time.monotonic()
        self._events = 0
        self.series = Series(SAMPLE_SECONDS)
        self.violation: Violation | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def listen(self, _first: int, events: list[Event], _data: bytes) -> None:
        self._events += len(events)
        if self._checker is not None and self.violation is None:
            self.violation = self._checker.feed_all(events)

    def progress(self, counters: dict[str, int]) -> bool:
        """False: the run is to stop."""
        seconds = self.seconds
        if self.series.due(seconds):
            self.series.add(seconds, sampled_counters(counters | {"events": self._events}))
        if self._on_progress is not None:
            self._on_progress(
                Snapshot(
                    phase="running",
                    detail="",
                    instructions=counters.get("vcpu.instructions", 0),
                    ops=self._config.ops,
                    accesses=counters.get("accesses.applied", 0),
                    page_faults=counters.get("exits.page_fault", 0),
                    flushes=counters.get("kvm.remote_tlb_flush", 0),
                    events=self._events,
                    seconds=seconds,
                )
            )
        return self.violation is None


def run_in_this_process(
    config: RunConfig, vcpus: int, directory: Path, on_progress: Callable[[Snapshot], None] | None = None
) -> RunReport:
    """Runs `config` with `vcpus` vCPUs; the journal goes to `directory`. Raises OSError if it cannot be written."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    watcher = _Watcher(config, on_progress)
    digest = hashlib.blake2b(digest_size=16)
    with (directory / JOURNAL_NAME).open("wb") as journal:

        def write(data: bytes) -> None:
            digest.update(data)
            journal.write(data)

        result = run_in_process(config, vcpus, write, watcher.listen, progress=watcher.progress)
    return _report(config, vcpus, watcher, result, started=started, journal_digest=digest.hexdigest())


def _report(
    config: RunConfig,
    vcpus: int,
    watcher: _Watcher,
    result: InProcessResult,
    *,
    started: str,
    journal_digest: str,
) -> RunReport:
    counters = merge_counters([result.counters])
    executed = counters.get("vcpu.instructions", 0)
    problems = []
    if result.stuck:
        problems.append(f"nothing could go on after {executed} of {config.ops} instructions")
    if watcher.violation is not None:
        verdict, text = Verdict.VIOLATED, str(watcher.violation)
    elif problems:
        verdict, text = Verdict.UNKNOWN, problems[0]
    else:
        checked = f"in {result.events} events" if config.check else "(nothing was checked)"
        verdict, text = (
            Verdict.PASS,
            f"{vcpus} vCPUs executed {executed} instructions: no violation {checked}",
        )
    histograms, _ = merge_histograms([("the machine", {"lock_wait_steps": _encode(result.lock_wait_steps)})])
    seconds = Durations(running=round(watcher.seconds, 3))
    watcher.series.add(watcher.seconds, sampled_counters(counters))
    return RunReport(
        verdict=verdict,
        exit_status=EXIT_STATUS[verdict],
        text=text,
        version=version("shadowmmu"),
        started=started,
        mode="in-process",
        vcpus=vcpus,
        start_rule=None,
        config=config,
        seconds=seconds,
        violation=None if watcher.violation is None else violation_report(watcher.violation),
        problems=problems,
        notes=[],
        lost=[],
        stream=StreamReport(result.events, result.records, result.digest, journal_digest),
        throughput=throughput_of(counters, seconds.running),
        counters=counters,
        histograms=histograms,
        coverage=coverage_of(counters),
        page_faults=page_faults_of(config, counters),
        series=watcher.series.samples,
        members=[],
    )


def _encode(counts: Mapping[int, int]) -> str:
    histogram = HdrHistogram(1, LONGEST_WAIT_STEPS, 3)
    for steps, count in counts.items():
        histogram.record_value(max(1, steps), count)
    return histogram.encode().decode("ascii")
