"""Experiment `strategies`: executions to the first failure, by bug and strategy.

A search that ends without a failure is *censored*: it would have needed more executions than it was given. Where half
of the seeds or more found nothing, the median is above that limit, and is written as missing.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Final

import polars as pl

from shadowmmu.experiments.charts import declared_charts
from shadowmmu.experiments.comparison import failures_said, join_words, paragraphs, succeeded
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot

__all__ = ["analyse"]

FIRST: Final = "first_execution"
MADE: Final = "executions_made"
LIMITS: Final = (
    "What this cannot say: three bugs are few, each test was written for its bug, and executions of different "
    "strategies take different times (docs/STUDY.md has seconds, and all bugs). Bounded and exhaustive search draw "
    "nothing at random: all their seeds do the same."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(table, ["test", "strategy", "executions", "found", MADE, FIRST])
    medians = _medians(runs)
    answer = paragraphs(_verdict(medians), LIMITS, failures_said(table))
    needed = runs.with_columns(needed=pl.when("found").then(pl.col(FIRST)).otherwise(pl.col("executions")))
    plot = Plot(
        title="Executions to the first failure (the limit, where none was found)",
        x="strategy",
        y="needed",
        facet="test",
        log_y=True,
        y_title="executions, mean over seeds",
    )
    shown = needed.with_columns(pl.col("needed").clip(lower_bound=1))
    return Findings(answer, [("Executions to the first failure", medians)], declared_charts([(plot, shown)]))


def _medians(runs: pl.DataFrame) -> pl.DataFrame:
    """By test and strategy: how many seeds found it, and the median of executions, None if that is censored."""
    schema = {
        "test": pl.String,
        "strategy": pl.String,
        "seeds": pl.Int64,
        "found": pl.Int64,
        "median": pl.Float64,
        "limit": pl.Int64,
    }
    rows = []
    for key, group in runs.group_by("test", "strategy", maintain_order=True):
        needed = [
            float(first) if found else math.inf
            for first, found in zip(group[FIRST], group["found"], strict=True)
        ]
        middle = median(needed)
        shown = None if math.isinf(middle) else middle
        rows.append((*key, group.height, group["found"].sum(), shown, group["executions"].max()))
    return pl.DataFrame(rows, schema=schema, orient="row")


def _verdict(medians: pl.DataFrame) -> str:
    everywhere = [
        str(strategy)
        for (strategy,), group in medians.group_by(["strategy"], maintain_order=True)
        if group["found"].sum() == group["seeds"].sum()
    ]
    parts = []
    for group in medians.partition_by("test", maintain_order=True):
        test = group["test"].to_list()[0]
        known = [row for row in group.to_dicts() if row["median"] is not None]
        if known:
            best = min(known, key=lambda row: row["median"])
            parts.append(f"`{test}` {best['strategy']} ({best['median']:g})")
        else:
            parts.append(f"`{test}` none within {max(group['limit'].to_list())}")
    whole = (
        f"{join_words(everywhere)} found each bug from every seed"
        if everywhere
        else "No strategy found every bug from every seed"
    )
    return f"{whole}; in the fewest executions (median): {join_words(parts)}."
