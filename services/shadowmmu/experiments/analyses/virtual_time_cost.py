"""How the simulator's own work for a run in virtual time grows: with the guest's operations, and with the vCPUs.

Expects points of one number of vCPUs with different numbers of iterations, and points at which the same total of
iterations is divided over different numbers of vCPUs. The power with which something grows is the slope of a line
through the logarithms, for each replicate.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Final

import altair as alt
import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.comparison import failures_said, paragraphs, succeeded
from shadowmmu.experiments.findings import Findings, FindingsError
from shadowmmu.experiments.statistics import Interval, mean_interval, summary

__all__ = ["analyse"]

LINEAR: Final = 1.1
"""Growth with a power up to this is called linear: a measurement of time has its errors."""
_MEASURES: Final = {
    "steps": "steps",
    "processor_seconds": "seconds of processor time",
    "wall_seconds": "seconds by the wall clock",
    "vcpu.instructions": "guest instructions",
}


class _Axis(msgspec.Struct, frozen=True):
    """What was varied: the column of x, what x is called, the rows, and the power of each measure."""

    column: str
    title: str
    rows: pl.DataFrame
    powers: dict[str, Interval]


def analyse(table: pl.DataFrame) -> Findings:
    """The powers of both axes. Raises FindingsError if one of them has fewer than two points."""
    good = succeeded(table, ["vcpus", "iterations", "steps", "processor_seconds", "cores"])
    good = good.with_columns(total=pl.col("vcpus") * pl.col("iterations"))
    points = set(good.select("vcpus", "iterations", "total").iter_rows())
    vcpus = Counter(point[0] for point in points).most_common(1)[0][0]
    total = Counter(point[2] for point in points).most_common(1)[0][0]
    axes = (
        _axis(good.filter(pl.col("vcpus") == vcpus), "total", f"forks in all, on {vcpus} vCPUs"),
        _axis(good.filter(pl.col("total") == total), "vcpus", f"vCPUs, {total} forks in all"),
    )
    tables = [
        (
            axis.title.capitalize(),
            summary(axis.rows, [axis.column], [name for name in _MEASURES if name in good.columns]),
        )
        for axis in axes
    ]
    charts: list[tuple[str, ChartType]] = [
        (f"Steps and seconds over {axis.title}", _chart(axis)) for axis in axes
    ]
    return Findings(paragraphs(_answer(axes, good, total), failures_said(table)), tables, charts)


def _axis(rows: pl.DataFrame, column: str, title: str) -> _Axis:
    replicates = [
        of for of in rows.partition_by("replicate", maintain_order=True) if of[column].n_unique() > 1
    ]
    if not replicates:
        raise FindingsError(f"growth with {title} needs two points")
    powers = {}
    for measure in _MEASURES:
        if measure in rows.columns:
            slopes = [
                _slope([(float(x), float(y)) for x, y in of.select(column, measure).iter_rows()])
                for of in replicates
            ]
            powers[measure] = mean_interval(slopes)
    return _Axis(column, title, rows.sort(column), powers)


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the line through the logarithms, by least squares."""
    xs, ys = ([math.log(point[place]) for point in points] for place in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def _answer(axes: tuple[_Axis, ...], good: pl.DataFrame, total: int) -> str:
    operations, vcpus = axes
    worst = max(
        power.mean for axis in axes for power in (axis.powers["steps"], axis.powers["processor_seconds"])
    )
    verdict = (
        "Yes: neither grows faster than linearly"
        if worst <= LINEAR
        else f"**No: something grows with the power {worst:z.2f}**"
    )
    first = (
        f"{verdict}: with the guest's operations steps grow with the power {_power(operations.powers['steps'])} and "
        f"seconds with {_power(operations.powers['processor_seconds'])}; with the number of vCPUs that {total} forks "
        f"are divided over, {_power(vcpus.powers['steps'])} and {_power(vcpus.powers['processor_seconds'])} (1 is "
        "linear, 0 no growth)."
    )
    rates = (good["steps"] / good["processor_seconds"]).to_list()
    several: list[int] = vcpus.rows["vcpus"].to_list()
    few, many = min(several), max(several)

    def mean(measure: str, at: int) -> float:
        return statistics.fmean(vcpus.rows.filter(pl.col("vcpus") == at)[measure].to_list())

    second = (
        f"The same {total} forks take {mean('steps', many) / mean('steps', few):z.2f} times the steps and "
        f"{mean('processor_seconds', many) / mean('processor_seconds', few):z.2f} times the seconds on {many} vCPUs, "
        f"as on {few}. A part of that is not the simulator's: vCPUs that are done go on until the last one is, each "
        "begins with cold shadow pages, and has a guest of its own to boot."
    )
    third = (
        f"The simulator executed {min(rates):,.0f} to {max(rates):,.0f} steps per second here (median "
        f"{statistics.median(rates):,.0f}), in one process, on {good['cores'][0]} cores of which it uses one. Seconds "
        "in this answer are the processor's, which other programs on the machine disturb little; those by the wall "
        "clock are in the tables. A step is a run of at most 64 TLB hits, a walk, or a segment of an operation of the "
        "MMU. Steps and instructions are the same on every machine; the seconds are this one's."
    )
    return paragraphs(first, second, third)


def _power(power: Interval) -> str:
    if power.low is None or power.high is None or power.high - power.low < 0.005:
        return f"{power.mean:z.2f}"
    return f"{power.mean:z.2f} ({power.low:z.2f} to {power.high:z.2f})"


def _chart(axis: _Axis) -> ChartType:
    """A panel each for steps and seconds, with the fitted line and one that is linear through the first point."""
    values: list[dict[str, object]] = []
    panels: list[str] = []
    places = sorted(set(axis.rows[axis.column]))
    for measure in ("steps", "processor_seconds"):
        points = [(float(x), float(y)) for x, y in axis.rows.select(axis.column, measure).iter_rows()]
        slope = axis.powers[measure].mean
        x_mean = statistics.fmean(math.log(x) for x, _ in points)
        y_mean = statistics.fmean(math.log(y) for _, y in points)
        begin = math.exp(y_mean + slope * (math.log(places[0]) - x_mean))
        panel = f"{_MEASURES[measure]}: power {slope:z.2f}"
        panels.append(panel)
        values += [{"panel": panel, "x": x, "y": y, "line": "measured"} for x, y in points]
        for x in places:
            fitted = math.exp(y_mean + slope * (math.log(x) - x_mean))
            values.append({"panel": panel, "x": x, "y": fitted, "line": "fitted"})
            values.append({"panel": panel, "x": x, "y": begin * x / places[0], "line": "linear growth"})
    x = alt.X(
        "x:Q",
        title=axis.title,
        scale=alt.Scale(type="log", base=2, nice=False, padding=10),
        axis=alt.Axis(grid=False, values=places, format="~s"),
    )
    y = alt.Y(
        "y:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~s", tickCount=5)
    )
    color = alt.Color("line:N", title=None, sort=["measured", "fitted", "linear growth"])
    base = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=y, color=color)
    layers = alt.layer(
        base.transform_filter("datum.line == 'measured'").mark_point(),
        base.transform_filter("datum.line == 'fitted'").mark_line(),
        base.transform_filter("datum.line == 'linear growth'").mark_line(strokeDash=[3, 4]),
    )
    chart: ChartType = layers.facet(
        facet=alt.Facet("panel:N", title=None, sort=panels), columns=2
    ).resolve_scale(y="independent")
    return chart
