"""What the MMU service reports of a run."""

from __future__ import annotations

from hdrh.histogram import HdrHistogram

from shadowmmu.machine.version import code_version
from shadowmmu.mmu.service import MmuService

__all__ = ["mmu_counters", "mmu_report"]

LONGEST_WAIT = 1 << 30


def mmu_counters(service: MmuService) -> dict[str, int]:
    """All counters so far, under the names of docs/REPORT.md. None is below 0, as KVM's own `lpages` may be: the wire
    has no such numbers.
    """
    runner = service.runner
    counters = runner.machine.all_counters() | service.counters
    counters["records"] = runner.records
    counters["events"] = runner.events.count
    return {name: max(value, 0) for name, value in counters.items()}


def mmu_report(service: MmuService, digest: str) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """Counters, histograms (HdrHistogram, base64) and texts, under the names of docs/REPORT.md."""
    waits = HdrHistogram(1, LONGEST_WAIT, 3)
    for steps, count in service.runner.machine.lock_wait_steps.items():
        waits.record_value(max(1, steps), count)
    histograms = {
        "kick_latency_us": service.kick_latency.encode().decode("ascii"),
        "lock_wait_steps": waits.encode().decode("ascii"),
    }
    info = {"events_digest": digest, "code_version": code_version()}
    return mmu_counters(service), histograms, info
