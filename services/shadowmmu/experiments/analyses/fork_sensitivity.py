"""Which constants of the cost model the degradation of fork depends on, one at a time.

Expects points at two numbers of vCPUs that differ from the model in one constant (column `cost.NAME`), the unchanged
model, and at most one point at which several constants are changed, which the load should never have to pay.
"""

from __future__ import annotations

import math
import statistics
from typing import Final, TypeAlias

import altair as alt
import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.comparison import failures_said, paragraphs, succeeded
from shadowmmu.experiments.cost_model import load_cost_model
from shadowmmu.experiments.findings import Findings, FindingsError

__all__ = ["analyse"]

FACTOR: Final = "cost."
MATTERS: Final = 1.1
"""A constant matters if it changes the degradation by so much, either way."""
SHOWN: Final = 16
SAME: Final = 1.001

_Changed: TypeAlias = tuple[tuple[str, float], ...]
"""The constants that a point changes, with their factors."""


class _Effect(msgspec.Struct, frozen=True):
    """What becomes of the degradation when a constant is multiplied by `factor`."""

    constant: str
    factor: float
    alone: float
    together: float
    degradation: float
    ratio: float

    @property
    def size(self) -> float:
        """How far from no change."""
        return abs(math.log(self.ratio))


def analyse(table: pl.DataFrame) -> Findings:
    """The ranking. Raises FindingsError if the unchanged model or one number of vCPUs is missing."""
    good = succeeded(table, ["vcpus", "iteration_us"])
    few, many = _vcpus(good)
    runs = _runs(good)
    times = {key: {n: statistics.fmean(us) for n, us in by.items()} for key, by in runs.items()}
    base = times.get(())
    if base is None or few not in base or many not in base:
        raise FindingsError("the unchanged cost model is not among the points")
    degradation = base[many] / base[few]
    effects, unpaid = _effects(times, few, many, degradation)
    if not effects:
        raise FindingsError("no point has one changed constant")
    model = load_cost_model(str(table["cost_model"][0])) if "cost_model" in table.columns else None
    ranked = sorted({effect.constant for effect in effects}, key=lambda name: (-_most(effects, name), name))
    answer = paragraphs(
        _answer(effects, ranked, few, many, degradation),
        _unpaid(unpaid, degradation),
        _precision(_noise(runs, many), many),
        failures_said(table),
    )
    rows = []
    for rank, name in enumerate(ranked, 1):
        row: dict[str, object] = {"rank": rank, "constant": name}
        if model is not None:
            constant = model.constants[name]
            row |= {
                "cycles": constant.cycles,
                "range": f"{constant.low} to {constant.high}",
                "label": constant.label.value,
            }
        for effect in sorted((one for one in effects if one.constant == name), key=lambda one: one.factor):
            row[f"us at {few}, x {effect.factor:g}"] = effect.alone
            row[f"us at {many}, x {effect.factor:g}"] = effect.together
            row[f"degradation, x {effect.factor:g}"] = effect.degradation
        rows.append(row)
    title = f"Degradation of fork from {few} to {many} processes: {degradation:.2f} with the model as it is"
    return Findings(
        answer,
        [(title, pl.DataFrame(rows, infer_schema_length=None))],
        [("Change of the degradation, the constants that matter most", _tornado(effects, ranked[:SHOWN]))],
    )


def _vcpus(table: pl.DataFrame) -> tuple[int, int]:
    numbers = sorted(set(table["vcpus"]))
    if len(numbers) < 2:
        raise FindingsError("a degradation needs two numbers of vCPUs")
    return numbers[0], numbers[-1]


def _runs(table: pl.DataFrame) -> dict[_Changed, dict[int, list[float]]]:
    """Microseconds per fork of each replicate, by the changed constants and the number of vCPUs."""
    columns = [name for name in table.columns if name.startswith(FACTOR)]
    runs: dict[_Changed, dict[int, list[float]]] = {}
    for row in table.iter_rows(named=True):
        changed = tuple((name.removeprefix(FACTOR), row[name]) for name in columns if row[name] != 1.0)
        runs.setdefault(changed, {}).setdefault(row["vcpus"], []).append(row["iteration_us"])
    return runs


def _noise(runs: dict[_Changed, dict[int, list[float]]], many: int) -> float | None:
    """The standard deviation between replicates with `many` vCPUs, as a share of their mean, over all points."""
    spreads = [
        statistics.variance(by[many]) / statistics.fmean(by[many]) ** 2
        for by in runs.values()
        if len(by.get(many, [])) > 1
    ]
    return math.sqrt(statistics.fmean(spreads)) if spreads else None


def _effects(
    times: dict[_Changed, dict[int, float]], few: int, many: int, degradation: float
) -> tuple[list[_Effect], _Effect | None]:
    effects, unpaid = [], None
    for changed, by in times.items():
        if not changed or few not in by or many not in by:
            continue
        now = by[many] / by[few]
        name = ", ".join(constant for constant, _ in changed)
        effect = _Effect(name, changed[0][1], by[few], by[many], now, now / degradation)
        if len(changed) == 1:
            effects.append(effect)
        else:
            unpaid = effect
    return effects, unpaid


def _most(effects: list[_Effect], name: str) -> float:
    return max(effect.size for effect in effects if effect.constant == name)


def _answer(effects: list[_Effect], ranked: list[str], few: int, many: int, degradation: float) -> str:
    important = [name for name in ranked if _most(effects, name) > math.log(MATTERS)]
    up = max(effects, key=lambda effect: effect.ratio)
    down = min(effects, key=lambda effect: effect.ratio)
    first = (
        f"Fork is {degradation:.1f} times slower with {many} processes than with {few}, and {len(important)} of "
        f"{len(ranked)} constants change that by more than {MATTERS - 1:.0%} when they are ten times as large or a "
        "tenth."
        if important
        else f"No constant changes the degradation ({degradation:.1f}) by more than {MATTERS - 1:.0%}."
    )
    listed = "; ".join(_described(effects, name) for name in important)
    limit = (
        f"None gives more than {many}, which is what one lock can do by itself if everything happens under it."
        if up.degradation <= many
        else f"More than {many}, which is what one lock can do by itself, takes costs that there are only when "
        "processors meet."
    )
    return paragraphs(
        first,
        f"In the order of their effect: {listed}." if important else "",
        f"The most that one constant gives is {up.degradation:.1f} ({up.constant} x {up.factor:g}), the least "
        f"{down.degradation:.1f} ({down.constant} x {down.factor:g}). {limit}",
        "What is paid under the lock raises the degradation when it is dearer, what is paid outside it lowers it. "
        "A constant's real range is narrower than a factor of ten either way, for most of them: the table has it. "
        "A constant of 0 (lock_waiter) cannot be multiplied; [fork-scaling](fork-scaling.md) has a model where it is "
        "not 0.",
    )


def _described(effects: list[_Effect], name: str) -> str:
    mine = sorted((effect for effect in effects if effect.constant == name), key=lambda effect: effect.factor)
    return f"`{name}` " + ", ".join(f"{effect.degradation:.1f} at x {effect.factor:g}" for effect in mine)


def _unpaid(unpaid: _Effect | None, degradation: float) -> str:
    if unpaid is None:
        return ""
    if max(unpaid.ratio, 1 / unpaid.ratio) < SAME:
        return (
            f"Not in the ranking, since a fork does not pay them: {unpaid.constant}. All of them ten times as large"
            f" at once leave the degradation at {unpaid.degradation:.2f}."
        )
    return (
        f"These were thought to play no part: {unpaid.constant}. That is wrong: all of them ten times as large "
        f"change the degradation from {degradation:.2f} to {unpaid.degradation:.2f}."
    )


def _precision(noise: float | None, many: int) -> str:
    if noise is None:
        return ""
    return (
        f"Replicates differ in when vCPUs start; with {many} processes the standard deviation between them is "
        f"{noise:.1%} of the mean. Effects of that size are not told from chance."
    )


def _tornado(effects: list[_Effect], names: list[str]) -> ChartType:
    data = alt.InlineData(
        values=[
            {
                "constant": effect.constant,
                "ratio": effect.ratio,
                "one": 1,
                "factor": f"times {effect.factor:g}",
            }
            for effect in effects
            if effect.constant in names
        ]
    )
    chart: ChartType = (
        alt.Chart(data)
        .mark_bar(height=7)
        .encode(
            y=alt.Y("constant:N", sort=names, title=None),
            yOffset=alt.YOffset("factor:N"),
            x=alt.X(
                "ratio:Q",
                title="degradation, as a multiple of that with the model as it is",
                scale=alt.Scale(type="log", nice=False, padding=8),
                axis=alt.Axis(format="~g", values=[0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10]),
            ),
            x2="one:Q",
            color=alt.Color("factor:N", title=None),
            tooltip=[
                alt.Tooltip("constant:N", title="constant"),
                alt.Tooltip("factor:N", title="multiplied"),
                alt.Tooltip("ratio:Q", title="degradation against the model's", format=".3~g"),
            ],
        )
        .properties(height=22 * max(2, len(names)))
    )
    return chart
