"""Experiment `vpid`: the misses and cycles that are saved if translations stay in the TLB while KVM handles an exit.

Each run with VPID is compared with the same run without it. Exits of load touch are write faults after readings of
the dirty log (`host.dirty_log`), which flush nothing themselves; at the readings all TLBs are flushed.
"""

from __future__ import annotations

from typing import Final

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_charts, in_percent
from shadowmmu.experiments.comparison import (
    BASE,
    beside,
    failures_said,
    join_words,
    paragraphs,
    percent,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import means_by, renamed, summary

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
    "What the model cannot say: VPID is free here, and a flush without it costs nothing beside its misses. The TLB is "
    "that of the parameters, which replaces the least recently used entry, and there are no caches of paging "
    "structures, so a walk always reads all its levels, at a price that is an estimate (4 to 100 cycles a level). A "
    "guest that does more between its accesses than these loads has fewer misses per exit to lose, and the exit itself "
    "is as dear."
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
    answer = paragraphs(
        _verdict(loads, touch),
        _flushes(loads),
        _reach(touch),
        _sensitivity(pairs),
        LIMITS,
        failures_said(table),
    )
    return Findings(answer, _tables(loads, touch, pairs), _charts(loads, touch))


def _label() -> pl.Expr:
    """The load, and its pages if they are chosen."""
    pages = pl.concat_str(pl.col(LOAD), pl.lit(", "), pl.col(PAGES).cast(pl.String), pl.lit(" pages"))
    return pl.when(pl.col(PAGES) > 0).then(pages).otherwise(pl.col(LOAD))


def _verdict(loads: pl.DataFrame, touch: pl.DataFrame) -> str:
    best = {f"`{label}`": saved for (label,), saved in means_by(loads, ["label"], "saved").items()}
    for (pages, log, entries), saved in means_by(touch, [PAGES, LOG, "entries"], "saved").items():
        assert isinstance(log, int)
        name = f"`touch` of {pages} pages, a dirty log read every {log:,} cycles, {entries} TLB entries"
        best[name] = saved
    if not best:
        return (
            "There are no two runs yet with VPID and without at the price of a walk that the cost model has."
        )
    name, most = max(best.items(), key=lambda item: item[1])
    if most < NOTHING:
        return f"VPID saves nothing in any of these loads, at most {percent(most, 2)} of the time."
    return (
        f"VPID saves little where page tables are shadowed: at most {percent(most)} of the time ({name})."
        if most < 0.1
        else f"VPID saves up to {percent(most)} of the time ({name})."
    )


def _flushes(loads: pl.DataFrame) -> str:
    """Which loads gain nothing by it, and how many of their entries flush all the same."""
    saved, flushing = (means_by(loads, ["label"], metric) for metric in ("saved", "flushing"))
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
        "Linux 3.1 flushes the guest's own tag at each CR3 write and INVLPG that exits, so only page-fault exits gain "
        "by VPID."
        if none
        else ""
    )
    return f"{'; '.join(parts)}. {why}".strip()


def _reach(touch: pl.DataFrame) -> str:
    """How many misses an exit costs without VPID, against the pages and the TLB's size."""
    if touch.is_empty():
        return ""
    by = [PAGES, LOG, "entries"]
    avoided, cycles, rate = (means_by(touch, by, metric) for metric in ("avoided", "cycles_avoided", "rate"))
    most, least = max(avoided, key=avoided.__getitem__), min(avoided, key=avoided.__getitem__)
    bound = all(
        value <= min(int(str(pages)), int(str(entries))) + 1 for (pages, _, entries), value in avoided.items()
    )
    said = (
        f"With random accesses and exits that flush nothing, an exit without VPID costs {avoided[least]:.1f} more "
        f"misses (touch of {least[0]} pages, {rate[least]:.0f} exits per 1,000 accesses) to {avoided[most]:.1f} "
        f"({most[0]} pages, {rate[most]:.1f} exits per 1,000): {cycles[least]:,.0f} to {cycles[most]:,.0f} cycles."
    )
    return (
        f"{said} It is never more than the pages that are used, or the entries of the TLB: the more often the guest "
        "exits, the less it has loaded again before the next one."
        if bound
        else f"{said} That is more than the pages, or the entries of the TLB, which cannot be."
    )


def _sensitivity(pairs: pl.DataFrame) -> str:
    saved = means_by(pairs, KEYS, "saved")
    parts = [
        f"`{load}` {percent(share)} instead of {percent(saved[load, *others, 1.0])} at {price:g} times the price"
        for (load, *others, price), share in saved.items()
        if price != 1.0 and (load, *others, 1.0) in saved
    ]
    return f"It depends on what a level of a walk costs: {join_words(parts)}." if parts else ""


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
    priced = pairs.filter(pl.col(PRICE) != 1.0)
    return [
        (title, renamed(summary(runs, by, metrics), names))
        for title, runs, by in (
            ("Loads", loads, ["label"]),
            ("Touch, with a dirty log", touch, [PAGES, LOG, "entries"]),
            ("Dearer walks", priced, [LOAD, PRICE]),
        )
    ]


def _charts(loads: pl.DataFrame, touch: pl.DataFrame) -> list[tuple[str, ChartType]]:
    saved = Plot(
        title="Time saved by VPID",
        x="label",
        y="saved",
        x_title="load",
        y_title="% of the time without it",
    )
    misses = Plot(
        title="Misses that an exit costs without VPID",
        x=LOG,
        y="avoided",
        color="TLB entries",
        facet="pages that touch uses",
        log_x=True,
        x_title="cycles from one reading of a dirty log to the next",
        y_title="misses per exit",
    )
    saved_in_touch = msgspec.structs.replace(
        misses, title="Time saved in touch", y="saved", y_title="% of the time without it"
    )
    shown = in_percent(touch, "saved").rename({"entries": "TLB entries", PAGES: "pages that touch uses"})
    return declared_charts(((saved, in_percent(loads, "saved")), (misses, shown), (saved_in_touch, shown)))
