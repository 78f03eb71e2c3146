"""What a flush of all vCPUs costs its sender and its targets, against how many there are; and published curves.

Expects runs in which a host thread flushes again and again, and the guest has hardly any other exits; variants by cost
model, and by `kick_send`, the constant that published models of a shootdown differ in.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any, Final

import altair as alt
import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.comparison import failures_said, join_words, paragraphs, succeeded
from shadowmmu.experiments.cost_model import load_cost_model
from shadowmmu.experiments.findings import Findings, FindingsError
from shadowmmu.experiments.statistics import Interval, mean_interval

__all__ = ["analyse"]

FACTOR: Final = "cost."
VARIED: Final = "cost.kick_send"
TAKEN: Final = ("cause.exit", "cause.interrupted", "cause.tlb_miss")
"""What a kick takes from its target."""
DEFAULT: Final = "cascadelake-2019"
NEAR: Final = 2.0


class _Published(msgspec.Struct, frozen=True):
    """A whole shootdown: processors and microseconds."""

    processors: int
    low: float
    high: float


LATR: Final = (_Published(16, 6.0, 8.0), _Published(120, 80.0, 80.0))
"""LATR (ASPLOS 2018), whole shootdowns, on machines with 2 and 8 sockets. From memory, not verified."""
SOCKETS: Final = {16: 2, 120: 8}


class _Point(msgspec.Struct, frozen=True):
    """Microseconds; `targets`: kicked by a flush, on average. `taken`: cycles that a kick takes from its target."""

    vcpus: int
    targets: float
    time: Interval
    longest: float
    taken: float
    taken_us: float


class _Line(msgspec.Struct, frozen=True):
    """A variant: its points, and microseconds = `fixed` + `each` per target (least squares)."""

    name: str
    points: list[_Point]
    fixed: float
    each: float

    def at(self, targets: float) -> float:
        return self.fixed + self.each * targets


def analyse(table: pl.DataFrame) -> Findings:
    """The cost per target, and where published figures lie. Raises FindingsError if there were no flushes."""
    lines = _lines(succeeded(table, ["vcpus", "timed.exits", *TAKEN], ["timed.flushes"]))
    if not lines:
        raise FindingsError("no variant has flushes at two numbers of vCPUs")
    plain = next((line for line in lines if line.name == DEFAULT), lines[0])
    answer = paragraphs(
        _cost(plain), _against(lines, plain), _targets(lines), _limits(table), failures_said(table)
    )
    return Findings(
        answer,
        [("Flushes", _table(lines)), ("Cost of a flush, fitted", _fits(lines))],
        [("Time of a flush", _chart(lines))],
    )


def _lines(table: pl.DataFrame) -> list[_Line]:
    rows: dict[tuple[str, float], dict[int, list[dict[str, float]]]] = {}
    for row in table.iter_rows(named=True):
        if row["timed.flushes"]:
            key = (str(row.get("cost_model", DEFAULT)), float(row.get(VARIED, 1.0)))
            rows.setdefault(key, {}).setdefault(row["vcpus"], []).append(row)
    lines = []
    for (model, factor), by in rows.items():
        if len(by) < 2:
            continue
        ghz = load_cost_model(model).ghz
        points = [_point(vcpus, several, ghz) for vcpus, several in sorted(by.items())]
        fixed, each = _fitted([(point.targets, point.time.mean) for point in points])
        lines.append(
            _Line(model if factor == 1.0 else f"{model}, kick_send x {factor:g}", points, fixed, each)
        )
    return lines


def _point(vcpus: int, rows: list[dict[str, float]], ghz: float) -> _Point:
    taken = fmean(sum(row[cause] for cause in TAKEN) / row["timed.exits"] for row in rows)
    return _Point(
        vcpus=vcpus,
        targets=fmean(row["timed.flush_targets"] / row["timed.flushes"] for row in rows),
        time=mean_interval([row["latency.flush_cycles.mean"] / (ghz * 1e3) for row in rows]),
        longest=fmean(row["latency.flush_cycles.max"] / (ghz * 1e3) for row in rows),
        taken=taken,
        taken_us=taken / (ghz * 1e3),
    )


def _fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, with squares of relative errors: the points span two orders of magnitude."""
    weights = [1.0 / (y * y) for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return y_mean - slope * x_mean, slope


# --- the answer ------------------------------------------------------------------------------------------------------


def _cost(plain: _Line) -> str:
    first, last = plain.points[0], plain.points[-1]
    error = max(abs(plain.at(point.targets) / point.time.mean - 1.0) for point in plain.points)
    grows = last.time.mean / first.time.mean
    shape = (
        "and it grows linearly with the number of vCPUs in guest mode"
        if error < 0.15
        else f"and it is not linear in the number of vCPUs in guest mode (a line is off by up to {error:.0%})"
    )
    return (
        f"A flush takes {plain.fixed:.1f} us and {plain.each:.2f} us more for each vCPU that it kicks ({plain.name}), "
        f"{shape}: {first.time.mean:.1f} us for {first.targets:.0f}, {last.time.mean:.0f} us for {last.targets:.0f} "
        f"({grows:.0f} times as much). The sender pays for that: it writes the interrupts one after the other and "
        "reads the answers one after the other, while the targets handle theirs at the same time."
    )


def _against(lines: list[_Line], plain: _Line) -> str:
    parts = []
    for figure in LATR:
        value = plain.at(figure.processors)
        low, high = figure.low / NEAR, figure.high * NEAR
        published = f"{figure.low:g}" if figure.low == figure.high else f"{figure.low:g} to {figure.high:g}"
        if low <= value <= high:
            verdict = f"within a factor of {NEAR:g}"
        elif value < low:
            verdict = f"{figure.low / value:.1f} times less"
        else:
            verdict = f"{value / figure.high:.1f} times more"
        parts.append(
            f"{value:.0f} us at {figure.processors} processors, where LATR has about {published} on "
            f"{SOCKETS[figure.processors]} sockets ({verdict})"
        )
    text = f"By the line, {join_words(parts)}."
    other = next(
        (line for line in lines if line is not plain and line.name.startswith(f"{plain.name},")), None
    )
    if other is not None:
        text += (
            f" The two published models of a shootdown, 1 us + 0.2 us for each receiver and 1.5 us for each, differ "
            f"{1.5 * 64 / (1.0 + 0.2 * 64):.0f}-fold at 64; with the constant of the second ({other.name}) the model "
            f"gives {other.each:.2f} us per target, {other.at(64):.0f} us at 64 instead of {plain.at(64):.0f}. "
            "The cost model's constant is that of the first, so that it agrees with that one is no evidence for it."
        )
    return text


def _targets(lines: list[_Line]) -> str:
    ranges = []
    for line in lines:
        if "kick_send" not in line.name:
            values = [point.taken for point in line.points]
            ranges.append(f"{min(values):,.0f} to {max(values):,.0f} cycles ({line.name})")
    return (
        f"A kick takes its target {', '.join(ranges)}: exit, interrupt, entry, and the misses in the TLB that it "
        "flushes (8 pages here; a guest with a larger working set pays more), whatever the number of vCPUs."
    )


def _limits(table: pl.DataFrame) -> str:
    hit = table["cost.tlb_hit"][0] if "cost.tlb_hit" in table.columns else 1.0
    run = 64 * 4 * hit
    return (
        "What the model cannot say: all processors are equally far from each other, so the steps that machines of "
        "more than one socket show are not there, and interrupts do not get in each other's way. Targets take a kick "
        f"at the end of a run of at most 64 accesses, up to {run:,.0f} cycles here: that is in the times, and a real "
        "processor is faster."
    )


# --- tables and charts -----------------------------------------------------------------------------------------------


def _table(lines: list[_Line]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "model": line.name,
                "vCPUs": point.vcpus,
                "kicked by a flush": point.targets,
                "us": point.time.mean,
                "us.low": point.time.low,
                "us.high": point.time.high,
                "longest, us": point.longest,
                "taken from a target, cycles": point.taken,
                "taken from a target, us": point.taken_us,
            }
            for line in lines
            for point in line.points
        ]
    )


def _fits(lines: list[_Line]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"model": line.name, "us": line.fixed, "us per target": line.each}
            | {f"at {n}": line.at(n) for n in (16, 64, 120)}
            for line in lines
        ]
    )


def _chart(lines: list[_Line]) -> ChartType:
    values: list[dict[str, Any]] = [
        {"line": line.name, "x": point.targets, "y": point.time.mean}
        for line in lines
        for point in line.points
    ]
    most = max(value["x"] for value in values)
    steps = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= most * 1.1]
    models = [
        {"line": name, "x": n, "y": fixed + each * n}
        for name, fixed, each in (
            ("1 us + 0.2 us each, published", 1.0, 0.2),
            ("1.5 us each, published", 0.0, 1.5),
        )
        for n in steps
    ]
    latr = [
        {"line": "LATR, measured", "x": figure.processors, "y": (figure.low + figure.high) / 2}
        for figure in LATR
    ]
    names = list(dict.fromkeys(str(value["line"]) for value in [*values, *models, *latr]))
    x = alt.X(
        "x:Q",
        title="vCPUs kicked by a flush",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(grid=False, values=steps, format="~s"),
    )
    y = alt.Y(
        "y:Q",
        title="microseconds",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(values=[1, 2, 5, 10, 20, 50, 100, 200, 500], format="~g"),
    )
    color = alt.Color("line:N", title=None, sort=names)
    tooltip = [
        alt.Tooltip("line:N", title="of"),
        alt.Tooltip("x:Q", title="kicked", format=".3~g"),
        alt.Tooltip("y:Q", title="us", format=".3~g"),
    ]
    return alt.layer(
        alt.Chart(alt.InlineData(values=models)).mark_line(strokeDash=[3, 4]).encode(x=x, y=y, color=color),
        alt.Chart(alt.InlineData(values=values))
        .mark_line(point=True)
        .encode(x=x, y=y, color=color, tooltip=tooltip),
        alt.Chart(alt.InlineData(values=latr))
        .mark_point(shape="diamond", size=100)
        .encode(x=x, y=y, color=color, tooltip=tooltip),
    )
