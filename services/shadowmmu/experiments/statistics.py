"""Means and confidence intervals over replicates: Student's t, since replicates are few.

The quantile of the t distribution is found by bisection of its distribution function, an incomplete beta function by
its continued fraction (Abramowitz and Stegun, 26.5.8 and 26.7.1; evaluated by Lentz's method).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import polars as pl

__all__ = ["CONFIDENCE", "Interval", "mean_interval", "summary", "t_quantile"]

CONFIDENCE: Final = 0.95
_TERMS: Final = 500
_TINY: Final = 1e-300


class Interval(NamedTuple):
    """A mean of `n` values with its confidence interval; None where one value says nothing of the spread."""

    n: int
    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean, and the interval that covers the true one with that probability if values are independent and normal.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values have no mean")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(n, mean, None, None)
    half = t_quantile(0.5 + confidence / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Where Student's t distribution of `freedom` degrees of freedom reaches a probability between 1/2 and 1."""
    if not (0.5 <= probability < 1.0 and freedom >= 1):
        raise ValueError(f"no quantile {probability} of t with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < probability:
        high *= 2.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _t_distribution(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_distribution(t: float, freedom: int) -> float:
    """The probability of a value up to t >= 0."""
    return 1.0 - 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), regularised."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    scale = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The fraction converges quickly on this side of the mean only.
    if x < (a + 1.0) / (a + b + 2.0):
        return scale * _beta_fraction(x, a, b) / a
    return 1.0 - scale * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, _TERMS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / _away_from_zero(1.0 + numerator * d)
            c = _away_from_zero(1.0 + numerator / c)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return fraction


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def summary(table: pl.DataFrame, by: Sequence[str], metrics: Iterable[str]) -> pl.DataFrame:
    """A row for each combination of the columns `by`: how many runs, and of each metric mean, low and high.

    Columns are called `METRIC`, `METRIC.low` and `METRIC.high`; combinations stand in the order in which they come.
    """
    rows: list[dict[str, object]] = []
    names = list(metrics)
    groups = table.group_by(list(by), maintain_order=True) if by else [((), table)]
    for key, group in groups:
        row: dict[str, object] = dict(zip(by, key, strict=True)) | {"runs": group.height}
        for name in names:
            values = [float(value) for value in group[name] if value is not None]
            interval = mean_interval(values) if values else None
            row[name] = None if interval is None else interval.mean
            row[f"{name}.low"] = None if interval is None else interval.low
            row[f"{name}.high"] = None if interval is None else interval.high
        rows.append(row)
    schema: dict[str, pl.DataType | type[pl.DataType]] = {name: table.schema[name] for name in by}
    schema["runs"] = pl.Int64
    for name in names:
        schema |= {name: pl.Float64, f"{name}.low": pl.Float64, f"{name}.high": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")
