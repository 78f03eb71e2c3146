"""Counters and histograms of all members, put together.

Counters are summed, except peaks (`….highest`, `….max`), of which the largest counts. Histograms arrive as
HdrHistogram V2 encodings (base64) and are merged, so that percentiles are those of all values of all members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from hdrh.histogram import HdrHistogram

__all__ = ["HistogramSummary", "merge_counters", "merge_histograms"]

_PEAKS = (".highest", ".max")


class HistogramSummary(msgspec.Struct, frozen=True):
    """A distribution of whole numbers; `encoded` is the HdrHistogram V2 encoding (base64) of all of it.

    The unit is at the end of the histogram's name (`_us`: microseconds, `_steps`: scheduler steps).
    """

    count: int
    min: int
    mean: float
    p50: int
    p90: int
    p99: int
    p999: int
    max: int
    encoded: str


def merge_counters(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """One set of counters from several, sorted by name."""
    merged: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith(_PEAKS):
                merged[name] = max(merged[name], value)
            else:
                merged[name] += value
    return dict(sorted(merged.items()))


def merge_histograms(
    parts: Iterable[tuple[str, Mapping[str, str]]],
) -> tuple[dict[str, HistogramSummary], list[str]]:
    """Summaries by histogram name, of (member, its histograms) pairs; and complaints about unreadable ones."""
    decoded: dict[str, list[HdrHistogram]] = {}
    complaints = []
    for member, histograms in parts:
        for name, encoded in histograms.items():
            try:
                decoded.setdefault(name, []).append(HdrHistogram.decode(encoded))
            except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions too
                complaints.append(f"the histogram {name} of {member} is not readable: {error}")
    return {name: _summary(_merge(all_)) for name, all_ in sorted(decoded.items()) if all_}, complaints


def _merge(histograms: list[HdrHistogram]) -> HdrHistogram:
    merged = HdrHistogram(
        1,
        max(one.highest_trackable_value for one in histograms),
        max(one.significant_figures for one in histograms),
    )
    for one in histograms:
        merged.add(one)
    return merged


def _summary(histogram: HdrHistogram) -> HistogramSummary:
    count = histogram.get_total_count()
    at = histogram.get_value_at_percentile
    return HistogramSummary(
        count=count,
        min=histogram.get_min_value() if count else 0,
        mean=round(histogram.get_mean_value(), 3) if count else 0.0,
        p50=at(50.0),
        p90=at(90.0),
        p99=at(99.0),
        p999=at(99.9),
        max=histogram.get_max_value() if count else 0,
        encoded=histogram.encode().decode("ascii"),
    )
