"""Means and confidence intervals over replicates: Student's t, since replicates are few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import polars as pl
from scipy.special import stdtrit

__all__ = ["CONFIDENCE", "Interval", "mean_interval", "means_by", "renamed", "summary", "values_by"]

CONFIDENCE: Final = 0.95


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
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2))  # of NumPy's own type before
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def values_by(table: pl.DataFrame, by: Sequence[str], column: str) -> dict[tuple[object, ...], list[float]]:
    """The values of a column for each combination of the columns `by`, in the order in which these come."""
    return {
        key: [float(value) for value in group[column]]
        for key, group in table.group_by(by, maintain_order=True)
    }


def means_by(table: pl.DataFrame, by: Sequence[str], column: str) -> dict[tuple[object, ...], float]:
    """The mean of a column for each combination of the columns `by`, in the order in which these come."""
    return {key: statistics.fmean(values) for key, values in values_by(table, by, column).items()}


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
            found = (None, None, None) if interval is None else interval[1:]
            row |= zip(_columns(name), found, strict=True)
        rows.append(row)
    schema: dict[str, pl.DataType | type[pl.DataType]] = {name: table.schema[name] for name in by}
    schema["runs"] = pl.Int64
    for name in names:
        schema |= dict.fromkeys(_columns(name), pl.Float64)
    return pl.DataFrame(rows, schema=schema, orient="row")


def renamed(means: pl.DataFrame, names: Mapping[str, str]) -> pl.DataFrame:
    """A summary whose columns are called as people read them, with the ends of their intervals.

    `names`: from old to new; of columns that the summary does not have too.
    """
    pairs = [pair for old, new in names.items() for pair in zip(_columns(old), _columns(new), strict=True)]
    return means.rename(dict(pairs), strict=False)


def _columns(metric: str) -> tuple[str, str, str]:
    return metric, f"{metric}.low", f"{metric}.high"
