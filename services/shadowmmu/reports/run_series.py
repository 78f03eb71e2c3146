"""The plots over time of a run, from the samples in its report. Pure; the live page has the same plots.

Times are wall-clock seconds of the simulator. Rates are differences of neighbouring samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from shadowmmu.coordinator.report import RunReport
from shadowmmu.coordinator.series import POINTS_INTERRUPTED, POINTS_REACHED, Sample
from shadowmmu.reports.charts import LinePoint, lines, to_spec
from shadowmmu.reports.page import Absent, Figure, Paragraph, Part

__all__ = ["series_parts"]

_X: Final = "seconds after the start"
_MOST_REASONS: Final = 6
"""Exits that have a line: more lines could not be told apart."""
_Count = Callable[[Mapping[str, int]], int]


def series_parts(report: RunReport) -> list[Part]:
    """The figures; if there are none, why."""
    samples = _in_order(report.series)
    if len(samples) < 2:
        return [
            Absent(
                "The report has no samples over time: it is of an earlier version, or the run was over before the "
                "second one."
            )
        ]
    exits = _most_frequent(samples[-1].counters, "exits.", _MOST_REASONS)
    parts: list[Part] = [
        Paragraph(
            "By the wall clock of the simulator, which also does other things: it says nothing about a kernel's speed."
        )
    ]
    parts += [
        _figure(
            "Guest instructions", "per second", _rates(samples, {"instructions": _sum("vcpu.instructions")})
        ),
        _figure(
            "Guest exits by reason",
            "per second",
            _rates(samples, {one: _sum(f"exits.{one}") for one in exits}),
        ),
        _figure(
            "Remote flushes and kicks",
            "per second",
            _rates(samples, {"remote flushes": _sum("kvm.remote_tlb_flush"), "kicks": _sum("kicks.sent")}),
        ),
        _figure(
            "mmu_lock",
            "per second",
            _rates(samples, {"taken": _sum("lock.taken"), "had to wait": _sum("lock.waited")}),
        ),
        _figure(
            "Unsync pages and deferred flushes",
            "at that moment",
            _values(samples, {"unsync pages": _sum("kvm.mmu_unsync.current"), "tlbs_dirty": _tlbs_dirty}),
        ),
        _figure(
            "Coverage",
            "named points",
            _values(samples, {"reached": _sum(POINTS_REACHED), "interrupted": _sum(POINTS_INTERRUPTED)}),
        ),
    ]
    return parts


def _in_order(samples: Sequence[Sample]) -> list[Sample]:
    """Without those whose time does not go on: a rate would have no divisor."""
    kept: list[Sample] = []
    for sample in samples:
        if not kept or sample.seconds > kept[-1].seconds:
            kept.append(sample)
    return kept


def _figure(title: str, unit: str, points: Sequence[LinePoint]) -> Figure:
    return Figure(title=title, spec=to_spec(lines(points, _X, unit), title))


def _sum(name: str) -> _Count:
    return lambda counters: counters.get(name, 0)


def _tlbs_dirty(counters: Mapping[str, int]) -> int:
    return counters.get("tlbs_dirty.raised", 0) - counters.get("tlbs_dirty.cleared", 0)


def _most_frequent(counters: Mapping[str, int], prefix: str, limit: int) -> list[str]:
    found = [
        (value, name.removeprefix(prefix)) for name, value in counters.items() if name.startswith(prefix)
    ]
    return [name for _, name in sorted(found, key=lambda one: (-one[0], one[1]))[:limit]]


def _rates(samples: Sequence[Sample], counts: Mapping[str, _Count]) -> list[LinePoint]:
    if len(samples) > 2 and _length(samples, -1) < _length(samples, -2) / 2:
        # The run ended soon after a sample: the rate of a moment would stand out among those of intervals.
        samples = [*samples[:-2], samples[-1]]
    return [
        LinePoint(
            later.seconds,
            (count(later.counters) - count(earlier.counters)) / (later.seconds - earlier.seconds),
            name,
        )
        for name, count in counts.items()
        for earlier, later in pairwise(samples)
    ]


def _length(samples: Sequence[Sample], place: int) -> float:
    return samples[place].seconds - samples[place - 1].seconds


def _values(samples: Sequence[Sample], counts: Mapping[str, _Count]) -> list[LinePoint]:
    return [
        LinePoint(sample.seconds, count(sample.counters), name)
        for name, count in counts.items()
        for sample in samples
    ]
