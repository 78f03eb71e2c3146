"""Experiment `unsync`: from how many edits per table and CR3 write on an unsync page is cheaper than emulated stores.

Relies on the load remap with one table of `load.pages` pages, all in use: with every CR3 write an unsync page is
compared entry by entry (`spte_synced`, `spte_set`), so that the price of an edit depends on how many share that.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_charts, in_percent
from shadowmmu.experiments.comparison import (
    BASE,
    beside,
    crossing,
    failures_said,
    paragraphs,
    percent,
    ratio,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot

__all__ = ["analyse"]

MODEL: Final = "cost_model"
PAGES: Final = "load.pages"
EDITS: Final = "load.edits"
FACTOR: Final = "cost.spte_set"
ASSUMED: Final = 1.0
"""The factor of the cost model as it is."""
KEYS: Final = (MODEL, FACTOR, PAGES, EDITS)
LIMITS: Final = (
    "What the model cannot say: an entry that is compared and still good costs `spte_synced` and, as the kernel calls "
    "set_spte for it, `spte_set`, of which only a sum with others is sourced; empty entries, which the kernel looks at "
    "too, have no price. The load edits in one burst before one CR3 write. Nothing in it is random: one run per point "
    "says all."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(
        table,
        ["oos_shadow", *KEYS, "iteration_cycles", "guest.iterations"],
        ["timed.exits", "kvm.mmu_flooded"],
    ).with_columns(
        cycles=pl.col("iteration_cycles") / pl.col(EDITS),
        exits=pl.col("timed.exits") / pl.col("guest.iterations") / pl.col(EDITS),
        floods=pl.col("kvm.mmu_flooded") / pl.col("guest.iterations"),
    )
    protected = runs.filter(~pl.col("oos_shadow"))
    both = beside(runs.filter(pl.col("oos_shadow")), protected, KEYS, ["cycles", "exits", "floods"])
    if both.filter(pl.col(FACTOR) == ASSUMED).is_empty():
        return Findings("There are no two runs yet with and without unsync pages.")
    both = both.with_columns(ratio=ratio("cycles"))
    crossings = _crossings(both)
    answer = paragraphs(
        _verdict(both, crossings), _sensitivity(crossings), _floods(both), LIMITS, failures_said(table)
    )
    points = both.select(
        *KEYS,
        pl.col("exits").alias("exits per edit, unsync"),
        pl.col("exits" + BASE).alias("exits per edit, write-protected"),
        pl.col("floods" + BASE).alias("floods per iteration, write-protected"),
        pl.col("cycles").alias("cycles per edit, unsync"),
        pl.col("cycles" + BASE).alias("cycles per edit, write-protected"),
        pl.col("ratio").alias("unsync / write-protected"),
    )
    return Findings(
        answer, [("From where on unsync pages pay", crossings), ("Every point", points)], _charts(both)
    )


def _crossings(both: pl.DataFrame) -> pl.DataFrame:
    """Edits per table and CR3 write from which on unsync pages are cheaper; null: from none that was tried."""
    schema = {
        MODEL: pl.String,
        FACTOR: pl.Float64,
        PAGES: pl.Int64,
        "edits tried, at most": pl.Int64,
        "unsync cheaper from edits": pl.Float64,
        "least ratio": pl.Float64,
        "greatest ratio": pl.Float64,
    }
    rows = []
    for key, group in both.group_by(MODEL, FACTOR, PAGES, maintain_order=True):
        edits, ratios = list(group[EDITS]), list(group["ratio"])
        where = crossing([(math.log2(n), value - 1.0) for n, value in zip(edits, ratios, strict=True)])
        rows.append((*key, max(edits), None if where is None else 2.0**where, min(ratios), max(ratios)))
    return pl.DataFrame(rows, schema=schema, orient="row")


def _from(row: dict[str, object]) -> str:
    where = row["unsync cheaper from edits"]
    if not isinstance(where, float):
        return f"not up to {row['edits tried, at most']} edits"
    return "from the first edit on" if where <= 1.0 else f"from {where:.1f} edits on"


def _verdict(both: pl.DataFrame, crossings: pl.DataFrame) -> str:
    plain = crossings.filter(pl.col(FACTOR) == ASSUMED)
    ratios = both.filter(pl.col(FACTOR) == ASSUMED)["ratio"]
    least, most = min(ratios), max(ratios)
    if most <= 1.0:
        first = f"Unsync pages are cheaper everywhere: they take {percent(least, 0)} to {percent(most, 0)} of the time."
    elif least > 1.0:
        first = f"Unsync pages are nowhere cheaper: they take {least:.2f} to {most:.2f} times as long."
    else:
        model = plain[MODEL][-1]
        parts = [
            f"{_from(row)} in a table of {row[PAGES]} pages in use"
            for row in plain.filter(pl.col(MODEL) == model).to_dicts()
        ]
        first = (
            f"It depends on how full the table is: by {model} letting it go out of sync pays {', '.join(parts)}; "
            f"the time is {percent(least, 0)} at best and {most:.1f} times as much at worst."
        )
    others = [
        f"{row[MODEL]}, {row[PAGES]} pages: {_from(row)}"
        for row in plain.filter(pl.col(MODEL) != plain[MODEL][-1]).to_dicts()
    ]
    return paragraphs(first, f"By the other cost models: {'; '.join(others)}.") if others else first


def _sensitivity(crossings: pl.DataFrame) -> str:
    factors = sorted(set(crossings[FACTOR]))
    if len(factors) < 2:
        return ""
    parts = []
    for (model, pages), group in crossings.group_by(MODEL, PAGES, maintain_order=True):
        by_factor = {row[FACTOR]: _from(row) for row in group.to_dicts()}
        least, most = by_factor.get(factors[0]), by_factor.get(factors[-1])
        if least is not None and most is not None and least != most:
            parts.append(f"- {model}, {pages} pages: {least}; {most}")
    if not parts:
        return "That does not depend on the price of an entry (`spte_set`) within the range that was tried."
    return paragraphs(
        f"It depends on the price of an entry (`spte_set`). With {factors[0]:g} and with {factors[-1]:g} times it "
        "unsync pages pay:",
        "\n".join(parts),
    )


def _floods(both: pl.DataFrame) -> str:
    flooded = both.filter(pl.col("floods" + BASE) >= 0.5)
    if flooded.is_empty():
        return "No write-protected page was taken for one that is no table any more (a flood)."
    least = min(flooded[EDITS])
    return (
        f"From {least} edit{'s' if least > 1 else ''} on a write-protected page is taken for flooded and zapped about "
        "once in each iteration: that costs a new shadow page and faults for what it mapped, but frees the stores "
        "that follow."
    )


def _charts(both: pl.DataFrame) -> list[tuple[str, ChartType]]:
    named = in_percent(both, "ratio").rename({MODEL: "cost model", PAGES: "pages in use"})
    plain = named.filter(pl.col(FACTOR) == ASSUMED)
    last = plain["cost model"][-1]
    of_last = named.filter(pl.col("cost model") == last).sort(FACTOR, maintain_order=True)
    times = pl.concat(
        plain.filter(pl.col("cost model") == last).select(
            EDITS, "pages in use", pl.col(column).alias("cycles"), setting=pl.lit(setting)
        )
        for column, setting in (("cycles", "unsync"), ("cycles" + BASE, "write-protected"))
    )
    share = Plot(
        title="Time with unsync pages, of that without",
        x=EDITS,
        y="ratio",
        color="pages in use",
        facet="cost model",
        log_x=True,
        log_y=True,
        x_title="edits per CR3 write",
        y_title="% of write-protected",
    )
    by_price = msgspec.structs.replace(
        share, title=f"The same if setting an entry costs less or more ({last})", facet="times spte_set"
    )
    cycles = msgspec.structs.replace(
        share,
        title=f"Cycles of an edit and the use of its page ({last})",
        y="cycles",
        color="setting",
        facet="pages in use",
        y_title="cycles per edit",
    )
    plots = [(share, plain), (cycles, times)]
    if of_last[FACTOR].n_unique() > 1:
        plots.insert(1, (by_price, of_last.rename({FACTOR: "times spte_set"})))
    return declared_charts(plots)
