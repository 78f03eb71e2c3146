"""Experiment `shadow-page-limit`: what iterations cost below the number of shadow pages that a load uses.

The working set of a load is the number of shadow pages in use at the end of its runs at its highest limit, where
nothing is recycled.
"""

from __future__ import annotations

from typing import Final

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_charts
from shadowmmu.experiments.comparison import (
    BASE,
    beside,
    failures_said,
    join_words,
    paragraphs,
    percent,
    ratio,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import renamed, summary

__all__ = ["analyse"]

LOAD: Final = "load.load"
LIMIT: Final = "mmu_pages"
PROCESSES: Final = "load.processes"
CREATED, ZAPPED, RECYCLED = "kvm.mmu_cache_miss", "kvm.mmu_shadow_zapped", "kvm.mmu_recycled"
COUNTERS: Final = (CREATED, ZAPPED, RECYCLED, "guest.iterations", "exits.page_fault")
SPARE: Final = 5
"""Fewer free pages than this, and KVM recycles (KVM_MIN_FREE_MMU_PAGES)."""
HARMLESS: Final = 1.05
"""A slow-down up to this is called none."""
EDGE: Final = 0.15
"""So far below the last limit that does no harm, as a share of it, a cliff is at its foot."""
FOOT: Final = 0.7
"""And this share of all the time that is ever lost is lost there."""
PERMILLE: Final = 20
"""Linux's own limit: so many shadow pages for a thousand pages of guest memory (KVM_PERMILLE_MMU_PAGES)."""
GIB_PAGES: Final = 1 << 18
LIMITS: Final = (
    "What the model cannot say: how long the host takes to find a page to recycle, and what its memory shrinker does "
    "beside the limit. Where the edge is does not depend on the cost model, for it counts pages; how high it is does: "
    "on the prices of a fault, and of making a shadow page and taking it away, the last two of which are estimates. "
    "Loads `fork` and `remap` draw nothing at random: intervals of no width there say nothing. Children of `fork` come "
    "and go, so that at times it uses more pages than at its end, which is what is called its working set here."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(table, [LOAD, LIMIT, PROCESSES, "iteration_cycles", "iteration_us", *COUNTERS])
    highest = runs.filter(pl.col(LIMIT) == pl.col(LIMIT).max().over(LOAD))
    runs = beside(runs, highest, [LOAD], ["iteration_cycles", CREATED, ZAPPED]).with_columns(
        slowdown=ratio("iteration_cycles"),
        recycled=pl.col(RECYCLED) / pl.col("guest.iterations"),
        exits=pl.col("exits.page_fault") / pl.col("guest.iterations"),
        used=pl.col(CREATED + BASE) - pl.col(ZAPPED + BASE),
    )
    if runs.is_empty():
        return Findings("There is no load yet with a run at its highest limit.")
    runs = runs.with_columns(used=pl.col("used").mean().over(LOAD)).with_columns(
        relative=pl.col(LIMIT) / pl.col("used")
    )
    edges = _edges(runs)
    answer = paragraphs(_verdict(edges), _rule(runs), _default(runs), LIMITS, failures_said(table))
    means = summary(
        runs.sort(LOAD, LIMIT), [LOAD, LIMIT, "relative"], ["iteration_us", "slowdown", "recycled", "exits"]
    )
    names = {
        "relative": "limit / working set",
        "recycled": "recycled per iteration",
        "exits": "page-fault exits per iteration",
    }
    tables = [("Where the edges are", edges), ("Every load at every limit", renamed(means, names))]
    return Findings(answer, tables, _charts(runs))


def _edges(runs: pl.DataFrame) -> pl.DataFrame:
    """By load: the working set, the last limit that does no harm, the first that does, and what is lost there."""
    schema = {
        "load": pl.String,
        "working set": pl.Float64,
        "no harm down to": pl.Int64,
        "harm from": pl.Int64,
        "slow-down there": pl.Float64,
        f"slow-down {EDGE:.0%} below": pl.Float64,
        "greatest slow-down": pl.Float64,
        "recycled at most": pl.Float64,
        "cliff": pl.Boolean,
    }
    rows = []
    for (load,), group in runs.group_by(LOAD, maintain_order=True):
        used, means = group["used"][0], summary(group, [LIMIT], ["slowdown"]).sort(LIMIT, descending=True)
        points = list(zip(means[LIMIT], means["slowdown"], strict=True))
        bad = next((n for n, (_, slowdown) in enumerate(points) if slowdown > HARMLESS), None)
        harmless = points[-1][0] if bad is None else points[max(bad - 1, 0)][0]
        harm, there = (None, None) if bad is None else points[bad]
        near = max(slowdown for limit, slowdown in points if limit >= (1.0 - EDGE) * harmless)
        worst = max(slowdown for _, slowdown in points)
        cliff = bad is not None and near - 1.0 >= FOOT * (worst - 1.0)
        rows.append((load, used, harmless, harm, there, near, worst, group["recycled"].max(), cliff))
    return pl.DataFrame(rows, schema=schema, orient="row")


def _verdict(edges: pl.DataFrame) -> str:
    harmed = edges.filter(pl.col("harm from").is_not_null())
    unharmed = [f"`{load}`" for load in edges.filter(pl.col("harm from").is_null())["load"]]
    if harmed.is_empty():
        return "No limit of this sweep makes any load slower."
    cliffs, slopes = harmed.filter("cliff"), harmed.filter(~pl.col("cliff"))
    said = []
    if cliffs.height:
        said.append(f"The limit is a cliff for {_loads(cliffs)}")
    if slopes.height:
        said.append(f"{'it is' if said else 'The limit is'} a slope for {_loads(slopes)}")
    if unharmed:
        said.append(f"{join_words(unharmed)} {'is' if len(unharmed) == 1 else 'are'} not slowed down by any")
    return (
        f"{'; '.join(said)}. (In brackets the slow-down at its worst; a cliff: at least {percent(FOOT, 0)} of that is "
        f"there before the limit is {percent(EDGE, 0)} below the last that does no harm.)"
    )


def _loads(edges: pl.DataFrame) -> str:
    return join_words(
        [f"`{row['load']}` ({_factor(row['greatest slow-down'])} times)" for row in edges.to_dicts()]
    )


def _factor(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _rule(runs: pl.DataFrame) -> str:
    """Whether recycling begins where KVM's own rule says."""
    steady = runs.filter(pl.col(LOAD) != "fork")
    early = steady.filter((pl.col(LIMIT) >= pl.col("used") + SPARE) & (pl.col(RECYCLED) > 0))
    late = steady.filter((pl.col(LIMIT) < pl.col("used") + SPARE) & (pl.col(RECYCLED) == 0))
    said = f"KVM recycles when fewer than {SPARE} pages are free, so N pages in use fit into a limit of N + {SPARE}"
    if early.is_empty() and late.is_empty():
        return (
            f"{said}: in every run of a load whose tables stay, pages are recycled below that limit, and none are from "
            "it on. It takes the oldest pages first, 20 at a time, whether they are in use or not: for a load that "
            "comes round to its tables in order these are the ones that it needs next."
        )
    odd = [f"{row[LOAD]} at {row[LIMIT]}" for row in pl.concat([early, late]).to_dicts()]
    return f"{said}; but it is otherwise for {join_words(sorted(set(odd)))}."


def _default(runs: pl.DataFrame) -> str:
    switch = runs.filter(pl.col(LOAD) == "context-switch")
    if switch.is_empty():
        return ""
    each = switch["used"][0] / switch[PROCESSES][0]
    limit = GIB_PAGES * PERMILLE // 1000
    return (
        f"A process of `context-switch` has {each:.1f} shadow pages; Linux's own limit, {PERMILLE} for a thousand "
        f"pages of guest memory, is {limit:,} for 1 GiB, which is enough for {int((limit - SPARE) / each)} such "
        "processes that take turns."
    )


def _charts(runs: pl.DataFrame) -> list[tuple[str, ChartType]]:
    named = runs.rename({LOAD: "load"}).filter(pl.col("relative") <= 4.0)
    slowdown = Plot(
        title="Slow-down against the limit",
        x="relative",
        y="slowdown",
        color="load",
        log_y=True,
        x_title="limit / shadow pages that the load uses",
        y_title="time of an iteration / without a limit",
    )
    exits = msgspec.structs.replace(
        slowdown, title="Page-fault exits per iteration", y="exits", y_title="exits"
    )
    recycled = msgspec.structs.replace(
        slowdown,
        title="Shadow pages recycled per iteration",
        y="recycled",
        log_y=False,
        y_title="pages",
    )
    return declared_charts((plot, named) for plot in (slowdown, exits, recycled))
