"""The plots that an experiment's file declares, as Altair charts: means over replicates with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import altair as alt
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import summary

__all__ = ["declared_chart", "declared_charts", "in_percent"]

MOST_TICKS: Final = 12
"""Values on an axis that all have a tick."""
NUMBERS: Final = "format(datum.value, abs(datum.value) < 1000 ? '.4~g' : '.4~s')"
"""Numbers on axes, a Vega expression: 1.2M for 1,200,000, and 0.02 (not 20m) for 0.02."""
PRECISE: Final = ",.5~g"
_X: Final = "x"
_Y: Final = "y"


def declared_charts(plots: Iterable[tuple[Plot, pl.DataFrame]]) -> list[tuple[str, ChartType]]:
    """Plots of tables of runs that succeeded, with their titles; none of a table without rows."""
    return [(plot.title, declared_chart(plot, table)) for plot, table in plots if table.height]


def in_percent(table: pl.DataFrame, *shares: str) -> pl.DataFrame:
    """The table with these columns, which are shares, in per cent."""
    return table.with_columns(pl.col(shares) * 100.0)


def declared_chart(plot: Plot, table: pl.DataFrame) -> ChartType:
    """The plot of a table of runs that succeeded.

    A point is the mean of the runs with the same x, colour and panel, with a bar for its interval; where x is a number
    (of a parameter, or measured) points are joined by lines.
    """
    by = list(dict.fromkeys(name for name in (plot.x, plot.color, plot.facet) if name is not None))
    means = summary(table, by, [plot.y])
    # Vega takes dots and brackets in names for paths into objects; so columns are called otherwise here.
    renamed = {plot.y: _Y, f"{plot.y}.low": "low", f"{plot.y}.high": "high"}
    columns = [
        pl.col(plot.x).alias(_X),
        *(pl.col(old).alias(new) for old, new in renamed.items()),
        pl.col("runs"),
    ]
    if plot.color is not None:
        columns.append(pl.col(plot.color).cast(pl.String).alias("color"))
    if plot.facet is not None:
        columns.append(pl.col(plot.facet).cast(pl.String).alias("facet"))
    data = means.select(columns)
    numeric = data.schema[_X].is_numeric()
    encodings: dict[str, Any] = {
        "x": _x(plot, data) if numeric else alt.X(f"{_X}:N", title=plot.x_title or plot.x)
    }
    if plot.color is not None:
        encodings["color"] = alt.Color("color:N", title=plot.color, sort=list(dict.fromkeys(data["color"])))
    y_title = plot.y_title or plot.y
    scale, axis = _scale(logarithmic=plot.log_y), alt.Axis(labelExpr=NUMBERS)
    base = alt.Chart(data).encode(**encodings)
    marks = base.mark_line(point=True) if numeric else base.mark_point(filled=True, size=60)
    tooltip = [
        alt.Tooltip(f"{_X}:{'Q' if numeric else 'N'}", title=plot.x_title or plot.x),
        alt.Tooltip(f"{_Y}:Q", title=y_title, format=PRECISE),
        alt.Tooltip("low:Q", title="from", format=PRECISE),
        alt.Tooltip("high:Q", title="to", format=PRECISE),
        alt.Tooltip("runs:Q", title="runs"),
    ]
    layers = [marks.encode(y=alt.Y(f"{_Y}:Q", title=y_title, scale=scale, axis=axis), tooltip=tooltip)]
    if data["low"].null_count() < data.height:
        bars = base.transform_filter("datum.low !== null").mark_rule()
        layers.append(bars.encode(y=alt.Y("low:Q", title=y_title, scale=scale, axis=axis), y2="high:Q"))
    layered = alt.layer(*layers)
    if plot.facet is not None:
        return layered.facet(alt.Facet("facet:N", title=plot.facet, sort=list(dict.fromkeys(data["facet"]))))
    return layered


def _x(plot: Plot, data: pl.DataFrame) -> alt.X:
    """An axis of numbers; a tick at each of them if they are few."""
    places = sorted(set(data[_X].drop_nulls()))
    few = 0 < len(places) <= MOST_TICKS
    axis = alt.Axis(values=places, grid=False, labelExpr=NUMBERS) if few else alt.Axis(labelExpr=NUMBERS)
    return alt.X(f"{_X}:Q", title=plot.x_title or plot.x, scale=_scale(logarithmic=plot.log_x), axis=axis)


def _scale(*, logarithmic: bool) -> alt.Scale:
    return alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(zero=False)
