"""Experiment `vpid`: misses and cycles that translations save that stay in the TLB while KVM handles an exit.

Each run with VPID is compared with the same run without it. Exits of load touch are write faults after readings of
the dirty log (`host.dirty_log`), which flush nothing themselves; at the readings all TLBs are flushed.
"""

from __future__ import annotations

from statistics import fmean
from typing import Final

import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_chart
from shadowmmu.experiments.comparison import BASE, beside, failures_said, join_words, percent, succeeded
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import summary

__all__ = ["analyse"]

LOAD, PAGES, LOG, WAYS = "load.load", "load.pages", "host.dirty_log", "tlb_ways"
PRICE: Final = "cost.tlb_miss_level"
KEYS: Final = (LOAD, PAGES, LOG, WAYS, PRICE)
SETS: Final = 128
"""Of the TLB: what a run has if it is not told."""
TOUCH: Final = "touch"
NOTHING: Final = 0.0005
"""A share of the time that is called nothing."""
COUNTERS: Final = (
    "timed.exits",
    "vcpu.entries",
    "vcpu.flushes",
    "vcpu.instructions",
    "vcpu.tlb_misses",
    "cause.tlb_miss",
)
MEASURED: Final = ("cycles", "timed.exits", "missed", "miss_cycles")
LIMITS: Final = (
    "What the model cannot say: VPID is free here, and a flush without it costs nothing beside its misses. The TLB "
    "is that of the "
    "parameters, least recently used out first, with no caches of paging structures, so a walk always reads all "
    "its levels, at a price that "
    "is an estimate (4 to 100 cycles a level). A guest that does more between its accesses than these loads has "
    "fewer misses "
    "per exit to lose, and the exit itself is as dear."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(table, ["vpid", *KEYS, "cycles", *COUNTERS]).with_columns(
        missed=pl.col("vcpu.tlb_misses") / pl.col("timed.exits"),
        miss_cycles=pl.col("cause.tlb_miss") / pl.col("timed.exits"),
    )
    pairs = beside(runs.filter("vpid"), runs.filter(~pl.col("vpid")), KEYS, MEASURED).with_columns(
        avoided=pl.col("missed" + BASE) - pl.col("missed"),
        cycles_avoided=pl.col("miss_cycles" + BASE) - pl.col("miss_cycles"),
        flushing=pl.col("vcpu.flushes") / pl.col("vcpu.entries"),
        rate=1000.0 * pl.col("timed.exits") / pl.col("vcpu.instructions"),
        entries=SETS * pl.col(WAYS),
    )
    # By misses, not by the length of the run: how many readings of the log fall into that is a matter of chance.
    of_all = pl.col("timed.exits" + BASE) / pl.col("cycles" + BASE)
    pairs = pairs.with_columns(saved=pl.col("cycles_avoided") * of_all)
    if pairs.is_empty():
        return Findings("There are no two runs yet with VPID and without.")
    plain = pairs.filter(pl.col(PRICE) == 1.0)
    loads = plain.filter(pl.col(LOG) == 0).with_columns(label=_label())
    touch = plain.filter((pl.col(LOAD) == TOUCH) & (pl.col(LOG) > 0))
    said = [_verdict(loads, touch), _flushes(loads), _reach(touch), _sensitivity(pairs), LIMITS]
    return Findings(
        " ".join(part for part in said if part) + failures_said(table),
        _tables(loads, touch, pairs),
        _charts(loads, touch),
    )


def _label() -> pl.Expr:
    """The load, and its pages if they are chosen."""
    pages = pl.concat_str(pl.col(LOAD), pl.lit(", "), pl.col(PAGES).cast(pl.String), pl.lit(" pages"))
    return pl.when(pl.col(PAGES) > 0).then(pages).otherwise(pl.col(LOAD))


def _means(runs: pl.DataFrame, by: list[str], metric: str) -> dict[tuple[object, ...], float]:
    return {tuple(row[name] for name in by): row[metric] for row in summary(runs, by, [metric]).to_dicts()}


def _verdict(loads: pl.DataFrame, touch: pl.DataFrame) -> str:
    best = {f"`{label}`": saved for (label,), saved in _means(loads, ["label"], "saved").items()}
    for (pages, log, entries), saved in _means(touch, [PAGES, LOG, "entries"], "saved").items():
        assert isinstance(log, int)
        best[f"`touch` of {pages} pages, a dirty log read every {log:,} cycles, {entries} TLB entries"] = (
            saved
        )
    name, most = max(best.items(), key=lambda item: item[1])
    if most < NOTHING:
        return f"VPID saves nothing in any of these loads, at most {percent(most, 2)} of the time."
    return (
        f"VPID saves little where page tables are shadowed: at most {percent(most)} of the time ({name})."
        if (most < 0.1)
        else f"VPID saves up to {percent(most)} of the time ({name})."
    )


def _flushes(loads: pl.DataFrame) -> str:
    """Which loads have nothing of it, and how many of their entries flush all the same."""
    saved = _means(loads, ["label"], "saved")
    flushing = _means(loads, ["label"], "flushing")
    none = [label for label in saved if abs(saved[label]) < NOTHING]
    some = sorted((label for label in saved if label not in none), key=lambda label: -saved[label])
    parts = []
    if none:
        parts.append(
            "It saves nothing in "
            f"{join_words([f'`{label[0]}` ({percent(flushing[label], 0)} of the entries flush)' for label in none])}"
        )
    if some:
        parts.append(
            join_words(
                [f"{percent(saved[label])} in `{label[0]}` ({percent(flushing[label], 0)})" for label in some]
            )
        )
    if not parts:
        return ""
    why = (
        "Linux 3.1 flushes the guest's own tag at each CR3 write and INVLPG that exits, so of VPID only page-fault "
        "exits have something."
        if none
        else ""
    )
    return f"{'; '.join(parts)}. {why}".strip()


def _reach(touch: pl.DataFrame) -> str:
    """How many misses an exit costs without VPID, against the pages and the TLB's size."""
    if touch.is_empty():
        return ""
    avoided = _means(touch, [PAGES, LOG, "entries"], "avoided")
    cycles = _means(touch, [PAGES, LOG, "entries"], "cycles_avoided")
    rate = _means(touch, [PAGES, LOG, "entries"], "rate")
    most, least = max(avoided, key=lambda key: avoided[key]), min(avoided, key=lambda key: avoided[key])
    bound = all(
        value <= min(int(str(pages)), int(str(entries))) + 1 for (pages, _, entries), value in avoided.items()
    )
    said = (
        f"With random accesses and exits that flush nothing, an exit without VPID costs {avoided[least]:.1f} more "
        f"misses (touch of {least[0]} pages, "
        f"{rate[least]:.0f} exits per 1,000 accesses) to {avoided[most]:.1f} ({most[0]} pages, {rate[most]:.1f} "
        "exits per 1,000): "
        f"{cycles[least]:,.0f} to {cycles[most]:,.0f} cycles."
    )
    return (
        f"{said} It is never more than the pages that are used, or the entries of the TLB: the more often the "
        "guest exits, the less it has "
        "loaded again before the next one."
        if bound
        else f"{said} That is more than the pages, or the entries of the TLB, which cannot be."
    )


def _sensitivity(pairs: pl.DataFrame) -> str:
    parts = []
    priced = pairs.filter(pl.col(PRICE) != 1.0)
    for (load, pages, log, ways, price), saved in _means(priced, list(KEYS), "saved").items():
        plain = pairs.filter(
            (pl.col(PRICE) == 1.0)
            & (pl.col(LOAD) == load)
            & (pl.col(PAGES) == pages)
            & (pl.col(LOG) == log)
            & (pl.col(WAYS) == ways)
        )
        if plain.height:
            parts.append(
                f"`{load}` {percent(saved)} instead of {percent(fmean(plain['saved']))} at {price:g} times the price"
            )
    return f"It hangs on what a level of a walk costs: {join_words(parts)}." if parts else ""


def _tables(loads: pl.DataFrame, touch: pl.DataFrame, pairs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    names = {
        "label": "load",
        PAGES: "pages",
        LOG: "dirty log every (cycles)",
        "entries": "TLB entries",
        "rate": "exits per 1,000 instructions",
        "flushing": "entries that flush",
        "missed": "misses per exit, VPID",
        "missed" + BASE: "misses per exit, none",
        "avoided": "misses avoided per exit",
        "cycles_avoided": "cycles avoided per exit",
        "saved": "time saved",
    }
    metrics = ["rate", "flushing", "missed", "missed" + BASE, "avoided", "cycles_avoided", "saved"]

    def named(frame: pl.DataFrame) -> pl.DataFrame:
        ends = {
            f"{old}{end}": f"{new}{end}"
            for old, new in names.items()
            for end in ("", ".low", ".high")
            if f"{old}{end}" in frame.columns
        }
        return frame.rename(ends)

    priced = pairs.filter(pl.col(PRICE) != 1.0)
    return [
        ("Loads", named(summary(loads, ["label"], metrics))),
        ("Touch, with a dirty log", named(summary(touch, [PAGES, LOG, "entries"], metrics))),
        ("Dearer walks", named(summary(priced, [LOAD, PRICE], metrics))),
    ]


def _charts(loads: pl.DataFrame, touch: pl.DataFrame) -> list[tuple[str, ChartType]]:
    saved = (100.0 * pl.col("saved")).alias("percent")
    shown = touch.with_columns(saved).rename({"entries": "TLB entries", PAGES: "pages that touch uses"})
    every = "cycles from one reading of a dirty log to the next"
    plots = [
        (
            loads.with_columns(saved),
            Plot(
                title="Time saved by VPID",
                x="label",
                y="percent",
                x_title="load",
                y_title="% of the time without it",
            ),
        ),
        (
            shown,
            Plot(
                title="Misses that an exit costs without VPID",
                x=LOG,
                y="avoided",
                color="TLB entries",
                facet="pages that touch uses",
                log_x=True,
                x_title=every,
                y_title="misses per exit",
            ),
        ),
        (
            shown,
            Plot(
                title="Time saved in touch",
                x=LOG,
                y="percent",
                color="TLB entries",
                facet="pages that touch uses",
                log_x=True,
                x_title=every,
                y_title="% of the time without it",
            ),
        ),
    ]
    return [(plot.title, declared_chart(plot, runs)) for runs, plot in plots if runs.height]
