"""HdrHistograms as curves: values over percentiles, and how the values are spread.

Relies on the `hdrhistogram` package for decoding. Percentiles are drawn over 1 / (1 - percentile), on a logarithmic
axis, so that 90 %, 99 % and 99.9 % lie equally far apart.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, count
from typing import Final

import msgspec
from hdrh.histogram import HdrHistogram

__all__ = ["Bin", "CurvePoint", "Distribution", "DistributionError", "decode_distribution"]

TICKS_PER_HALF: Final = 8
"""Points of a percentile curve between one percentile and the one with half as many values above it."""
BINS_PER_DOUBLING: Final = 3


class DistributionError(ValueError):
    """A histogram that cannot be decoded; the message says why."""


class CurvePoint(msgspec.Struct, frozen=True):
    """`percentile` of the values (0 to 100) are at most `value`; `rarity` is 1 / (1 - percentile / 100)."""

    percentile: float
    rarity: float
    value: int


class Bin(msgspec.Struct, frozen=True):
    """Values from `low` to below `high`: their `share` of all (0 to 1)."""

    low: int
    high: int
    share: float


class Distribution(msgspec.Struct, frozen=True):
    """A histogram, ready to be drawn. Values of 0 are in the first bin and at 1 on the curve: both axes have no 0."""

    count: int
    curve: list[CurvePoint]
    bins: list[Bin]


def decode_distribution(encoded: str) -> Distribution:
    """From an HdrHistogram V2 encoding (base64). Raises DistributionError."""
    try:
        histogram = HdrHistogram.decode(encoded)
        recorded = [
            (max(1, int(step.value_iterated_to)), int(step.count_added_in_this_iter_step))
            for step in histogram.get_recorded_iterator()
        ]
    except Exception as error:  # the library raises bare Exceptions too
        raise DistributionError(f"not a readable HdrHistogram: {error}") from error
    if not recorded:
        return Distribution(0, [], [])
    return Distribution(sum(times for _, times in recorded), _curve(recorded), _bins(recorded))


def _curve(recorded: Sequence[tuple[int, int]]) -> list[CurvePoint]:
    sums = list(accumulate(times for _, times in recorded))
    total = sums[-1]
    points = []
    for step in count(0):
        # Beyond the last value but one there is nothing to be told.
        rarity = min(2.0 ** (step / TICKS_PER_HALF), float(total))
        below = 1.0 - 1.0 / rarity
        value = recorded[min(bisect_left(sums, below * total), len(recorded) - 1)][0]
        points.append(CurvePoint(100.0 * below, rarity, value))
        if rarity >= total:
            break
    # All values are at most the largest one.
    points.append(CurvePoint(100.0, 1.5 * total, recorded[-1][0]))
    return points


def _bins(recorded: Sequence[tuple[int, int]]) -> list[Bin]:
    edges = _edges(recorded[-1][0])
    counts = [0] * (len(edges) - 1)
    for value, times in recorded:
        counts[bisect_right(edges, value) - 1] += times
    total = sum(counts)
    first = next(place for place, times in enumerate(counts) if times)
    return [
        Bin(low, high, times / total)
        for low, high, times in zip(edges[first:-1], edges[first + 1 :], counts[first:], strict=True)
    ]


def _edges(most: int) -> list[int]:
    """Whole numbers that grow by about the same factor, from 1 to beyond `most`."""
    edges = [1]
    step = 0
    while edges[-1] <= most:
        step += 1
        edge = round(2 ** (step / BINS_PER_DOUBLING))
        if edge > edges[-1]:
            edges.append(edge)
    return edges
