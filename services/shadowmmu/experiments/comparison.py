"""What analyses have in common: the runs that succeeded, each beside its baseline, crossings, and how it is said.

A pair has the same parameters but for what is compared, and the same replicate (with common random numbers: the same
guest). Relies on the table of `shadowmmu.experiments.results` and on Student's intervals of `statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from shadowmmu.experiments.findings import FindingsError
from shadowmmu.experiments.statistics import mean_interval
from shadowmmu.experiments.table import Status

__all__ = [
    "BASE",
    "beside",
    "crossing",
    "failures_said",
    "in_words",
    "join_words",
    "largest_change",
    "paragraphs",
    "percent",
    "ratio",
    "saved",
    "succeeded",
]

BASE = ".base"
"""Ends the name of a metric of the run that another is compared with."""


def succeeded(table: pl.DataFrame, columns: Iterable[str], counters: Iterable[str] = ()) -> pl.DataFrame:
    """The runs that succeeded; counters of what a run has not met are 0.

    Raises FindingsError if there are none, or without a column.
    """
    good = table.filter(pl.col("status") == Status.OK.value)
    if good.is_empty():
        raise FindingsError("no run has succeeded")
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise FindingsError(
            f"the table has no column {missing[0]!r}; this analysis is for another experiment"
        )
    return good.with_columns(
        pl.col(name).fill_null(0) if name in good.columns else pl.lit(0).alias(name) for name in counters
    )


def beside(
    runs: pl.DataFrame, baseline: pl.DataFrame, keys: Sequence[str], metrics: Sequence[str]
) -> pl.DataFrame:
    """Each of `runs` with `metrics` of its baseline as `METRIC.base`; runs without one are left out.

    The baseline of a run is that with the same replicate and the same values of `keys`.
    """
    whole = [*keys, "replicate"]
    return runs.join(
        baseline.select(*whole, *(pl.col(name).alias(name + BASE) for name in metrics)),
        on=whole,
        how="inner",
        maintain_order="left",
    )


def ratio(metric: str) -> pl.Expr:
    """Of runs beside their baselines: the metric, as a multiple of the baseline's."""
    return pl.col(metric) / pl.col(metric + BASE)


def saved(metric: str) -> pl.Expr:
    """Of runs beside their baselines: by which share the metric is less than the baseline's."""
    return 1.0 - ratio(metric)


def largest_change(pairs: pl.DataFrame, metric: str) -> float:
    """By which share runs differ from their baselines at most, up or down. There has to be one."""
    return max(abs(float(value) - 1.0) for value in pairs.select(ratio(metric)).to_series())


def crossing(points: Sequence[tuple[float, float]], level: float = 0.0) -> float | None:
    """Where the values of (x, value) first fall to `level` or below, by straight lines between points.

    The first x if they begin there; None if they never do.
    """
    before: tuple[float, float] | None = None
    for x, value in sorted(points):
        if value <= level:
            if before is None:
                return x
            x0, value0 = before
            return x0 + (x - x0) * (value0 - level) / (value0 - value)
        before = (x, value)
    return None


def percent(share: float, digits: int = 1) -> str:
    """A share as people read it; never "-0.0 %"."""
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def in_words(shares: Sequence[float]) -> str:
    """The mean of shares with its interval, if it has one of some width."""
    interval = mean_interval(shares)
    text = percent(interval.mean)
    if interval.low is None or interval.high is None or interval.high - interval.low < 1e-6:
        return text
    return f"{text} ({percent(interval.low)} to {percent(interval.high)})"


def paragraphs(*parts: str) -> str:
    """Those of the parts that say something, a paragraph each."""
    return "\n\n".join(part.strip() for part in parts if part.strip())


def join_words(words: Sequence[str]) -> str:
    """The words as a sentence has them: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def failures_said(table: pl.DataFrame) -> str:
    """A sentence on the runs that failed; "" if none has."""
    failed = table.filter(pl.col("status") != Status.OK.value).height
    return f"{failed} of {table.height} runs have failed and are left out." if failed else ""
