"""Experiment `bypass-guest-pf`: what the parameter saves as the share of unsync tables grows, and where that ends.

Relies on the load remap: `load.table_share` of the tables are out of sync when the guest's faults come, each table has
`load.edits` faults between two CR3 writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final, NamedTuple

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_charts, in_percent
from shadowmmu.experiments.comparison import (
    BASE,
    beside,
    crossing,
    failures_said,
    largest_change,
    paragraphs,
    percent,
    saved,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot

__all__ = ["Kernels", "analyse", "kernels", "linux_3_1_said"]

SHARE: Final = "load.table_share"
EDITS: Final = "load.edits"
MODEL: Final = "cost_model"
SCAN: Final = "cost.page_unsynced"
PLAIN: Final = pl.col(SCAN) == 1.0
KEYS: Final = (MODEL, EDITS, SHARE)
WORTH: Final = 0.01
"""Of an iteration's time: what saves less is called not worth it."""
COUNTERS: Final = (
    "kvm.notrap.converted",
    "kvm.notrap.on_sync",
    "kvm.pf_guest",
    "timed.exits",
    "vcpu.bypassed",
)
LIMITS: Final = (
    "What the model cannot say: conversions cost nothing in it, but for the curves that price them, and what a scan of "
    "512 entries costs (there: ten times `page_unsynced`) is an assumption; so is the order of the guest's work: all "
    "edits come before all faults. Counts are of whole runs, the warm-up included, in which nothing is bypassed yet. "
    "Nothing is random in this load: one run per point says all."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(
        table, ["profile", "bypass_guest_pf", SCAN, *KEYS, "iteration_cycles", "guest.iterations"], COUNTERS
    ).with_columns(faults=pl.col("kvm.pf_guest") + pl.col("vcpu.bypassed"))
    runs = runs.with_columns(
        cycles_per_fault=pl.col("iteration_cycles") * pl.col("guest.iterations") / pl.col("faults"),
        exits_per_fault=pl.col("timed.exits") / pl.col("faults"),
        bypassed=pl.col("vcpu.bypassed") / pl.col("faults"),
    )
    metrics = ["cycles_per_fault", "exits_per_fault"]
    of = kernels(runs, KEYS, metrics)
    if of.on.filter(PLAIN).is_empty():
        return Findings("There are no two runs yet with the parameter off and on.")
    on = of.on.with_columns(saved=saved("cycles_per_fault"))
    on, priced = on.filter(PLAIN), on.filter(~PLAIN)
    crossings = _crossings(on, priced)
    answer = paragraphs(
        _verdict(on),
        _costs(crossings, on),
        linux_3_1_said(of.after, "cycles_per_fault"),
        LIMITS,
        failures_said(table),
    )
    return Findings(answer, [_points(on, priced), ("Where it ends", crossings)], _charts(on, priced))


class Kernels(NamedTuple):
    """Runs of the tree before the patch with the parameter off; with it on, and of Linux 3.1, beside those."""

    off: pl.DataFrame
    on: pl.DataFrame
    after: pl.DataFrame


def kernels(runs: pl.DataFrame, keys: Sequence[str], metrics: Sequence[str]) -> Kernels:
    """The runs by kernel and parameter; those with the same values of `keys` are compared."""
    before = pl.col("profile") == "pre-patch"
    off = runs.filter(before & ~pl.col("bypass_guest_pf"))
    on = runs.filter(before & pl.col("bypass_guest_pf"))
    return Kernels(off, beside(on, off, keys, metrics), beside(runs.filter(~before), off, keys, metrics))


def linux_3_1_said(after: pl.DataFrame, time: str) -> str:
    """Whether Linux 3.1, which has no such parameter, is as fast as the tree before; "" without runs."""
    if after.is_empty():
        return ""
    change = largest_change(after, time)
    if change < 0.0005:
        return "Linux 3.1 is as fast as the tree before with the parameter off, in every run."
    return f"Linux 3.1 and the tree before with the parameter off differ by up to {percent(change)}."


def _faults(edits: int) -> str:
    return "one fault per table" if edits == 1 else f"{edits} faults per table"


def _verdict(on: pl.DataFrame) -> str:
    shares, edits = sorted(set(on[SHARE])), sorted(set(on[EDITS]))
    best, worst = _bypassed(on, edits[0], shares[0]), _bypassed(on, edits[0], shares[-1])
    true = worst <= 0.5 * best
    said = (
        f"{'True' if true else 'Not borne out'}: with {_faults(edits[0])} the parameter keeps {percent(best)} of the "
        f"guest's own faults from exiting when {percent(shares[0], 0)} of the tables are out of sync, and "
        f"{percent(worst)} when {percent(shares[-1], 0)} are."
    )
    if edits[-1] == edits[0]:
        return said
    rest = _bypassed(on, edits[-1], shares[0])
    if rest <= 0.5 * best:
        return (
            f"{said} It decays even without other unsync pages: with {_faults(edits[-1])} {percent(rest)} are "
            f"left at a share of {percent(shares[0], 0)}, since the guest's handler of a table's first fault stores to "
            "it: it goes out of sync, and is converted."
        )
    return f"{said} The number of faults per table hardly matters: with {edits[-1]} it is {percent(rest)}."


def _bypassed(on: pl.DataFrame, edits: int, share: float) -> float:
    """The share of the guest's own faults that do not exit, 0 without runs."""
    runs = on.filter((pl.col(EDITS) == edits) & (pl.col(SHARE) == share))
    return fmean(runs["bypassed"]) if runs.height else 0.0


def _costs(crossings: pl.DataFrame, on: pl.DataFrame) -> str:
    edits = min(on[EDITS])
    shares = sorted(set(on[SHARE]))
    few = on.filter((pl.col(EDITS) == edits) & (pl.col(SHARE) == shares[0]))
    gains = {
        str(model): (then - now, 1.0 - now / then)
        for model, now, then in few.select(MODEL, "cycles_per_fault", "cycles_per_fault" + BASE).rows()
    }
    sentences = []
    for row in crossings.filter(pl.col(EDITS) == edits).to_dicts():
        gain, share = gains[row[MODEL]]
        limit, eaten = row["not worth it from share"], row["conversions dearer from share"]
        until = (
            "never less" if limit is None else f"less than {percent(WORTH, 0)} from a share of {limit:.2f} on"
        )
        net = (
            "never cost more than it saves"
            if eaten is None
            else f"cost more than it saves from {eaten:.2f} on"
        )
        sentences.append(
            f"- {row[MODEL]}: {percent(share)} ({gain:,.0f} cycles a fault) at share {shares[0]:g}, {until}; "
            f"conversions, if they are priced, {net}"
        )
    most_cycles, most_share = (max(gains, key=lambda model: gains[model][which]) for which in (0, 1))
    dear = (
        f"In cycles and as a share of the time it pays most by {most_cycles}."
        if most_cycles == most_share
        else f"In cycles it pays most by {most_cycles}, as a share of the time by {most_share}."
    )
    return paragraphs(f"Time saved with {_faults(edits)}, by cost model:", "\n".join(sentences), dear)


def _crossings(on: pl.DataFrame, priced: pl.DataFrame) -> pl.DataFrame:
    """By cost model and faults per table: where what is saved falls below what is worth it, and below the scans."""
    schema = {
        MODEL: pl.String,
        EDITS: pl.Int64,
        "saved at least share": pl.Float64,
        "saved at greatest share": pl.Float64,
        "not worth it from share": pl.Float64,
        "conversions dearer from share": pl.Float64,
    }
    rows = []
    for (model, edits), group in on.group_by(MODEL, EDITS, maintain_order=True):
        dear = priced.filter((pl.col(MODEL) == model) & (pl.col(EDITS) == edits))
        points, net = (sorted(zip(runs[SHARE], runs["saved"], strict=True)) for runs in (group, dear))
        rows.append((model, edits, points[0][1], points[-1][1], crossing(points, WORTH), crossing(net)))
    return pl.DataFrame(rows, schema=schema, orient="row")


def _points(on: pl.DataFrame, priced: pl.DataFrame) -> tuple[str, pl.DataFrame]:
    net = priced.select(*KEYS, "replicate", pl.col("saved").alias("saved, conversions priced"))
    joined = on.join(net, on=[*KEYS, "replicate"], how="left", maintain_order="left")
    return (
        "Every point, per fault of the guest's own",
        joined.select(
            *KEYS,
            pl.col("bypassed").alias("bypassed share"),
            pl.col("exits_per_fault" + BASE).alias("exits, off"),
            pl.col("exits_per_fault").alias("exits, on"),
            (pl.col("kvm.notrap.on_sync") / pl.col("faults")).alias("entries to notrap in syncs"),
            (pl.col("kvm.notrap.converted") / pl.col("faults")).alias("entries converted to trap"),
            pl.col("cycles_per_fault" + BASE).alias("cycles, off"),
            pl.col("cycles_per_fault").alias("cycles, on"),
            "saved",
            "saved, conversions priced",
        ),
    )


def _charts(on: pl.DataFrame, priced: pl.DataFrame) -> list[tuple[str, ChartType]]:
    bypassed = Plot(
        title="Faults of the guest's own that do not exit",
        x=SHARE,
        y="bypassed",
        color="faults per table",
        x_title="% of the tables that are out of sync at the faults",
        y_title="% of the faults",
    )
    gain = Plot(
        title="Time saved by the parameter",
        x=SHARE,
        y="saved",
        color="faults per table",
        facet="cost model",
        x_title="% of the tables that are unsync",
        y_title="% of an iteration",
    )
    net = msgspec.structs.replace(gain, title="Time saved if a conversion costs ten times page_unsynced")
    first = on.filter(pl.col(MODEL) == on[MODEL][0])
    named = {EDITS: "faults per table", MODEL: "cost model"}
    return declared_charts(
        (plot, in_percent(runs, SHARE, plot.y).rename(named))
        for plot, runs in ((bypassed, first), (gain, on), (net, priced))
    )
