"""Charts: how they look, and the kinds that reports have. Relies on Altair (Vega-Lite) and, for SVG, on vl-convert.

A builder takes plain values and gives an Altair chart without size or colours of the ground. `to_spec` makes of it the
specification that a page draws (as wide as its place, text and lines coloured by the page's style sheet), `to_svg` a
picture for a document. The palette begins with that of Okabe and Ito, which colour-blind people can tell apart, without
its yellow and black; after them come those that are farthest from all before, as they see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt
import msgspec
import vl_convert

from shadowmmu.reports.distributions import Distribution

__all__ = [
    "PALETTE",
    "Bar",
    "Chart",
    "Estimate",
    "LinePoint",
    "bars",
    "density",
    "estimates",
    "has_panels",
    "lines",
    "percentiles",
    "ratios",
    "stacked",
    "to_spec",
    "to_svg",
]

Chart = (
    alt.Chart
    | alt.LayerChart
    | alt.FacetChart
    | alt.RepeatChart
    | alt.ConcatChart
    | alt.HConcatChart
    | alt.VConcatChart
)

PALETTE: Final = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C"),
    *("#9B18F2", "#BF1336", "#4DBF63", "#B861F2", "#4B6373"),
)
"""All can be seen on a light ground and on a dark one."""
_FONT: Final = "Liberation Sans, Arial, Helvetica, sans-serif"
"""vl-convert brings the first with it: so a picture has the same bytes on every machine."""
_SVG_WIDTH: Final = 640
_HEIGHT: Final = 280
_MOST_WHISKERS: Final = 8
"""Of a line; with more points intervals are a band."""
_PANEL_WIDTH: Final = 260
_PANEL_HEIGHT: Final = 200
_BAR_STEP: Final = 22
"""Height of a horizontal bar and the gap after it."""

_INK: Final = "#1f2328"
_DIM: Final = "#57606a"
_LINE: Final = "#d8dee4"
_CONFIG: Final[dict[str, Any]] = {
    "font": _FONT,
    "range": {"category": list(PALETTE)},
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelColor": _DIM,
        "titleColor": _INK,
        "gridColor": _LINE,
        "domainColor": _DIM,
        "tickColor": _DIM,
        "titlePadding": 8,
        "labelLimit": 170,
    },
    "legend": {
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "labelColor": _INK,
        "titleColor": _INK,
        "symbolStrokeWidth": 2.5,
        "labelLimit": 280,
        "columns": 4,
    },
    "header": {"labelColor": _INK, "titleColor": _INK},
    "line": {"strokeWidth": 2},
    "rule": {"color": _DIM},
    "point": {"size": 40, "filled": True},
    "mark": {"color": PALETTE[0]},
}

_ZERO_HAS_NO_UNIT: Final = "replace(datum.label, regexp('^0[a-zA-Zµ]$'), '0')"
"""An axis of thousands begins with 0, and not with 0k."""


class Bar(msgspec.Struct, frozen=True):
    """A named quantity. `part`: which part of the name's bar, in a stacked chart."""

    name: str
    value: float
    part: str = ""


class LinePoint(msgspec.Struct, frozen=True):
    """A point of a line; lines have names."""

    x: float
    y: float
    line: str = ""


class Estimate(msgspec.Struct, frozen=True):
    """A mean with its confidence interval (None: there is none, because there was one replicate)."""

    x: float | str
    y: float
    low: float | None
    high: float | None
    line: str = ""


def to_spec(chart: Chart, title: str) -> dict[str, Any]:
    """The Vega-Lite specification of a chart in a page: as wide as its place there, without a ground.

    `title`: what screen readers say that it is.
    """
    spec = _spec(chart, width="container", background="transparent") | {"description": title}
    axis = _CONFIG["axis"] | {"labelExpr": _ZERO_HAS_NO_UNIT}
    return spec | {"config": _CONFIG | {"axis": axis}}


def has_panels(chart: Chart) -> bool:
    """Whether it is several plots side by side."""
    return not isinstance(chart, alt.Chart | alt.LayerChart)


def to_svg(chart: Chart) -> str:
    """A chart as an SVG document on a white ground; the same bytes for the same chart."""
    spec = _spec(chart, width=_SVG_WIDTH, background="white")
    return vl_convert.vegalite_to_svg(spec, vl_version=_vegalite_version(), allowed_base_urls=[])


def _vegalite_version() -> str:
    """The version that Altair writes for, in the form that vl-convert knows."""
    return ".".join(alt.VEGALITE_VERSION.split(".")[:2])


def _spec(chart: Chart, *, width: int | str, background: str) -> dict[str, Any]:
    spec: dict[str, Any] = _printable(chart.to_dict())
    spec |= {"background": background, "config": _CONFIG}
    if has_panels(chart):  # Vega-Lite cannot fit them into a width
        if "spec" not in spec:
            return spec
        spec["spec"] = {"width": _PANEL_WIDTH, "height": _PANEL_HEIGHT} | spec["spec"]
        return spec
    spec.setdefault("height", _HEIGHT)
    fit = {"type": "fit-x", "contains": "padding"} if width == "container" else {"type": "pad"}
    return spec | {"width": width, "autosize": fit}


def _printable(value: Any) -> Any:
    """Names come from anywhere; Vega's expressions cannot have line ends in them."""
    match value:
        case str():
            return (
                value if value.isprintable() else "".join(one if one.isprintable() else " " for one in value)
            )
        case dict():
            return {_printable(key): _printable(one) for key, one in value.items()}
        case list():
            return [_printable(one) for one in value]
        case _:
            return value


def _data(values: Sequence[msgspec.Struct]) -> alt.InlineData:
    return alt.InlineData(values=[msgspec.structs.asdict(value) for value in values])


def _log_ticks(low: int, high: int) -> list[int]:
    """Round numbers for a logarithmic axis: powers of ten, or 1, 2, 5 of each where there are few of them."""
    steps = (1, 2, 5) if high < 500 * low else (1,)
    return [step * 10**power for power in range(len(str(high)) + 1) for step in steps]


def _ordered(names: Sequence[str]) -> list[str]:
    """Each name once, in the order in which they come."""
    return list(dict.fromkeys(names))


def _colours(field: str, names: Sequence[str]) -> alt.Color:
    """A colour for each name; no legend where there is but one."""
    known = _ordered(names)
    scale = alt.Scale(domain=known, range=[PALETTE[place % len(PALETTE)] for place in range(len(known))])
    return alt.Color(
        f"{field}:N", scale=scale, legend=alt.Legend(symbolOpacity=1) if len(known) > 1 else None
    )


def bars(values: Sequence[Bar], title: str) -> Chart:
    """Horizontal bars in the order given. `title`: of the value's axis, with its unit."""
    names = _ordered([bar.name for bar in values])
    chart: Chart = (
        alt.Chart(_data(values))
        .mark_bar()
        .encode(
            y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(domain=False, ticks=False)),
            x=alt.X("value:Q", title=title, axis=alt.Axis(format="~s", tickCount=5)),
            tooltip=[
                alt.Tooltip("name:N", title="name"),
                alt.Tooltip("value:Q", title=title, format=",.6~g"),
            ],
        )
        .properties(height=_BAR_STEP * max(2, len(names)))
    )
    return chart


def stacked(values: Sequence[Bar], title: str) -> Chart:
    """Horizontal bars of parts that sum up; parts in the order given."""
    names = _ordered([bar.name for bar in values])
    parts = _ordered([bar.part for bar in values])
    data = alt.InlineData(
        values=[msgspec.structs.asdict(bar) | {"order": parts.index(bar.part)} for bar in values]
    )
    chart: Chart = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(domain=False, ticks=False)),
            x=alt.X("sum(value):Q", title=title, axis=alt.Axis(format="~s", tickCount=5)),
            color=_colours("part", parts),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("name:N", title="name"),
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("sum(value):Q", title=title, format=",.6~g"),
            ],
        )
        .properties(height=_BAR_STEP * max(2, len(names)))
    )
    return chart


def lines(values: Sequence[LinePoint], x_title: str, y_title: str) -> Chart:
    """Lines over a common axis."""
    chart: Chart = (
        alt.Chart(_data(values))
        .mark_line(point=len(values) < 60)
        .encode(
            x=alt.X("x:Q", title=x_title, axis=alt.Axis(grid=False, tickCount=6)),
            y=alt.Y("y:Q", title=y_title, axis=alt.Axis(format="~s", tickCount=5)),
            color=_colours("line", [value.line for value in values]),
            tooltip=[
                alt.Tooltip("line:N", title="line"),
                alt.Tooltip("x:Q", title=x_title, format=",.4~g"),
                alt.Tooltip("y:Q", title=y_title, format=",.6~g"),
            ],
        )
        .properties(height=200)
    )
    return chart


def percentiles(curves: Sequence[tuple[str, Distribution]], title: str) -> Chart:
    """Values over percentiles, of named distributions, both axes logarithmic. `title`: of the values, with the unit."""
    values = [msgspec.structs.asdict(point) | {"line": name} for name, one in curves for point in one.curve]
    drawn = [point.value for _, one in curves for point in one.curve] or [1]
    rarest = max((one.count for _, one in curves), default=1)
    ticks = [1, 2, *(10**power for power in range(1, 10) if 10**power <= 2 * rarest)]
    chart: Chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X(
                "rarity:Q",
                title="percentile of all values",
                scale=alt.Scale(type="log", nice=False),
                axis=alt.Axis(
                    values=ticks,
                    labelExpr="format(1 - 1 / datum.value, '~%')",
                    labelOverlap="greedy",
                    labelSeparation=4,
                    grid=False,
                ),
            ),
            y=alt.Y(
                "value:Q",
                title=title,
                scale=alt.Scale(type="log", domain=[min(drawn), max(*drawn, 2 * min(drawn))], nice=False),
                axis=alt.Axis(format="~s", values=_log_ticks(min(drawn), max(drawn))),
            ),
            color=_colours("line", [name for name, _ in curves]),
            tooltip=[
                alt.Tooltip("line:N", title="of"),
                alt.Tooltip("percentile:Q", title="percentile", format=".5~f"),
                alt.Tooltip("value:Q", title=title, format=","),
            ],
        )
    )
    return chart


def density(curves: Sequence[tuple[str, Distribution]], title: str) -> Chart:
    """How values are spread: the share of them in each bin, on a logarithmic axis."""
    values = [
        {"line": name, "low": bin_.low, "high": bin_.high, "share": bin_.share}
        for name, one in curves
        for bin_ in one.bins
    ]
    edges = [edge for _, one in curves for bin_ in one.bins for edge in (bin_.low, bin_.high)] or [1]
    base = alt.Chart(alt.InlineData(values=values)).encode(
        x=alt.X(
            "low:Q",
            title=title,
            scale=alt.Scale(type="log", nice=False),
            axis=alt.Axis(format="~s", values=_log_ticks(min(edges), max(edges)), grid=False),
        ),
        x2="high:Q",
        y=alt.Y(
            "share:Q",
            title="share of values",
            axis=alt.Axis(format="~%", tickCount=5),
            scale=alt.Scale(zero=True),
        ),
        y2=alt.Y2Datum(0),
        color=_colours("line", [name for name, _ in curves]),
        tooltip=[
            alt.Tooltip("line:N", title="of"),
            alt.Tooltip("low:Q", title="from", format=","),
            alt.Tooltip("high:Q", title="to below", format=","),
            alt.Tooltip("share:Q", title="share of values", format=".3~%"),
        ],
    )
    chart: Chart = base.mark_rect(opacity=0.55 if len(curves) > 1 else 0.85)
    return chart


def ratios(values: Sequence[Bar], title: str, more: str, less: str) -> Chart:
    """Quotients around 1 on a logarithmic axis: bars to the right for more, to the left for less, with these names."""
    names = _ordered([bar.name for bar in values])
    data = alt.InlineData(
        values=[
            {"name": bar.name, "value": bar.value, "one": 1, "which": more if bar.value >= 1 else less}
            for bar in values
        ]
    )
    base = alt.Chart(data)
    bar = base.mark_bar().encode(
        y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(domain=False, ticks=False)),
        x=alt.X(
            "value:Q",
            title=title,
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=alt.Axis(format="~g", tickCount=6),
        ),
        x2="one:Q",
        color=_colours("which", [more, less]),
        tooltip=[alt.Tooltip("name:N", title="name"), alt.Tooltip("value:Q", title=title, format=".3~g")],
    )
    chart: Chart = bar.properties(height=_BAR_STEP * max(2, len(names)))
    return chart


def estimates(
    values: Sequence[Estimate],
    x_title: str,
    y_title: str,
    *,
    x_log: bool = False,
    y_log: bool = False,
) -> Chart:
    """Means with confidence intervals, over a parameter: points joined by lines over numbers, bars beside names."""
    by_name = any(isinstance(value.x, str) for value in values)
    names = [value.line for value in values]
    x: alt.X
    if by_name:
        x = alt.X("x:N", title=x_title, sort=_ordered([str(value.x) for value in values]))
    else:
        numbers = sorted({float(value.x) for value in values})
        x = alt.X(
            "x:Q",
            title=x_title,
            scale=alt.Scale(type="log", base=2, nice=False, padding=12) if x_log else alt.Scale(padding=12),
            axis=alt.Axis(grid=False, values=numbers, format="~s")
            if len(numbers) <= 12
            else alt.Axis(grid=False),
        )
    y_scale = alt.Scale(type="log") if y_log else alt.Scale(zero=True)
    tooltip = [
        alt.Tooltip("line:N", title="of"),
        alt.Tooltip("x:N" if by_name else "x:Q", title=x_title),
        alt.Tooltip("y:Q", title=y_title, format=",.4~g"),
        alt.Tooltip("low:Q", title="interval from", format=",.4~g"),
        alt.Tooltip("high:Q", title="to", format=",.4~g"),
    ]
    base = alt.Chart(_data(values)).encode(x=x, color=_colours("line", names))
    y = alt.Y("y:Q", title=y_title, scale=y_scale, axis=alt.Axis(format="~s", tickCount=6))
    whiskers = (
        base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        .mark_rule(strokeWidth=1.5)
        .encode(y=alt.Y("low:Q", title=y_title, scale=y_scale), y2="high:Q")
    )
    if by_name:
        side = alt.XOffset("line:N", sort=_ordered(names))
        column = base.mark_bar(opacity=0.75).encode(y=y, xOffset=side, tooltip=tooltip)
        return alt.layer(column, whiskers.encode(xOffset=side, color=alt.value(_DIM)))
    band = (
        base.transform_filter("isValid(datum.low) && isValid(datum.high)")
        .mark_area(opacity=0.18)
        .encode(y=alt.Y("low:Q", title=y_title, scale=y_scale), y2="high:Q")
    )
    line = base.mark_line(point=True).encode(y=y, tooltip=tooltip)
    many = len({value.x for value in values}) > _MOST_WHISKERS
    return alt.layer(band if many else whiskers, line)
