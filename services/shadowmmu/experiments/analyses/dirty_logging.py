"""Experiment `dirty-logging`: what the reading of dirty logs costs a guest, by interval, pages written to, and vCPUs.

A round is one reading of the log of the guest's working memory. The host thread reads the logs of two memory slots in
turn, so that a round takes two intervals (`host.dirty_log`). Relies on a run without logging for each number of vCPUs,
pages and share of writes.
"""

from __future__ import annotations

from statistics import fmean
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
    ratio,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import renamed, summary

__all__ = ["analyse"]

VCPUS, PAGES, SHARE, LOG = "vcpus", "load.pages", "load.write_share", "host.dirty_log"
KEYS: Final = (VCPUS, PAGES, SHARE)
FACTORS: Final = ("cost.page_fault", "cost.rmap_entry", "cost.lock_transfer")
READINGS: Final = "timed.host.get_dirty_log"
SLOTS: Final = 2
MISSES: Final = ("guest", "tlb_miss")
CAUSES: Final = (
    "guest",
    "tlb_miss",
    "fault_delivery",
    "exit",
    "handler",
    "lock",
    "lock_wait",
    "kick",
    "kick_wait",
    "interrupted",
    "wait",
    "idle",
)
ROOMY: Final = 1.5
"""A round is long if all pages that are written to can be faulted back in less than 1 / ROOMY of it."""
LIMITS: Final = (
    "What the model cannot say: a guest that does nothing but memory accesses, four cycles each, is slowed down most, "
    "so the cycles per fault carry over to other guests, and the ratios do not. Sending pages away, what user space "
    "does with the log, and its own walks are not in it. The host's walk is priced by the entries that are there (KVM "
    "reads all 512 of a table)."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    causes = [f"cause.{name}" for name in CAUSES]
    measured = [
        "iteration_cycles",
        "iteration_us",
        "cycles",
        "lock_held",
        "timed.exits",
        "exits.page_fault",
        READINGS,
    ]
    runs = succeeded(table, [*KEYS, LOG, *FACTORS, *measured, *causes])
    runs = runs.with_columns(
        round=SLOTS * pl.col(LOG),
        us=pl.col("iteration_us") / pl.col("iteration_cycles"),
        total=pl.sum_horizontal(causes),
        outside=pl.sum_horizontal(
            [f"cause.{name}" for name in CAUSES if name not in MISSES and name != "idle"]
        ),
        plain=pl.all_horizontal([pl.col(name) == 1.0 for name in FACTORS]),
    )
    quiet = runs.filter((pl.col(LOG) == 0) & pl.col("plain"))
    logged = beside(runs.filter(pl.col(LOG) > 0), quiet, KEYS, ["iteration_cycles", "exits.page_fault"])
    if logged.is_empty():
        return Findings("There are no two runs yet with a dirty log and without.")
    logged = logged.with_columns(
        slowdown=ratio("iteration_cycles"),
        round_us=(pl.col("round") * pl.col("us")).round_sig_figs(6),
        # The log of the working memory is read first, and when it is switched on, that removes write access too.
        faults=(pl.col("exits.page_fault") - pl.col("exits.page_fault" + BASE))
        / ((pl.col(READINGS) / SLOTS).ceil() + 1),
        fault_cycles=pl.col("outside") / pl.col("timed.exits"),
        lock_wait=pl.col("cause.lock_wait") / pl.col("total"),
        lock_used=pl.col("lock_held") / pl.col("cycles"),
    ).with_columns(
        rounds_in_faults=pl.col("round") / (pl.col(PAGES) * pl.col("fault_cycles")),
        dirty_share=pl.col("faults") / (pl.col(PAGES) * pl.col(VCPUS)),
    )
    one = logged.filter((pl.col(VCPUS) == 1) & pl.col("plain"))
    answer = paragraphs(
        _verdict(one),
        _price(one),
        _writes(one),
        _vcpus(logged),
        _sensitivity(logged),
        LIMITS,
        failures_said(table),
    )
    return Findings(answer, _tables(one, logged), _charts(one, logged))


def _verdict(one: pl.DataFrame) -> str:
    """Where dirty logging is cheap, and where the guest has no time left for anything but faults."""
    if one.is_empty():
        return ""
    means = summary(one, [PAGES, SHARE, LOG], ["rounds_in_faults", "slowdown"])
    long = means.filter(pl.col("rounds_in_faults") >= ROOMY)["slowdown"]
    short = means.filter(pl.col("rounds_in_faults") < 1.0)["slowdown"]
    if long.is_empty() or short.is_empty():
        least, most = min(means["slowdown"]), max(means["slowdown"])
        return f"Dirty logging slows the guest down {least:.2f} to {most:,.2f} times."
    most, least = max(long), min(short)
    if least > 5.0 * most:
        return (
            "What counts is the time between two readings against the time in which the guest can fault all its dirty "
            f"pages back: where it is at least {ROOMY:g} times as long, logging slows the guest down at most "
            f"{most:.2f} times; where it is shorter, {least:.0f} to {max(short):,.0f} times."
        )
    return (
        "There is no edge where readings come faster than the guest can fault its dirty pages back: logging slows it "
        f"down up to {most:.2f} times where they are at least {ROOMY:g} times as far apart, and {least:.2f} times or "
        "more where they are closer."
    )


def _price(one: pl.DataFrame) -> str:
    long = one.filter(pl.col("rounds_in_faults") >= ROOMY)
    if long.is_empty():
        return ""
    cost, us, dirty = (fmean(long[name]) for name in ("fault_cycles", "us", "dirty_share"))
    off = max(
        abs(row["slowdown"] * (1.0 - row["faults"] * row["fault_cycles"] / row["round"]) - 1.0)
        for row in long.to_dicts()
    )
    fits = (
        f"and that, times the faults of a round, explains the slow-down to within {percent(off)}"
        if off < 0.1
        else f"but that, times the faults of a round, misses the slow-down by up to {percent(off)}"
    )
    rate = 10_000
    return (
        f"A dirty page costs the guest one write fault in each round, {cost:,.0f} cycles ({cost * us:.2f} us) with its "
        f"exit, {fits}. In such a round {percent(dirty, 0)} of the pages are written to. So a guest that dirties "
        f"{rate:,} pages between two readings loses {cost * us * rate / 1000:.0f} ms from each to the next, whatever "
        "it does otherwise."
    )


def _writes(one: pl.DataFrame) -> str:
    """What the share of writes changes, at long rounds and at short ones."""
    parts = []
    for (_, pages), group in one.group_by([LOG, PAGES], maintain_order=True):
        means = summary(group, [SHARE], ["slowdown", "round_us"]).sort(SHARE)
        if means.height < 2:
            continue
        row, last = means.row(0, named=True), means.row(-1, named=True)
        parts.append(
            f"{row['slowdown']:,.2f} times with {percent(row[SHARE], 0)} writes and {last['slowdown']:,.2f} with "
            f"{percent(last[SHARE], 0)} ({pages} pages, {row['round_us']:,.0f} us)"
        )
    return f"By the share of writes: {join_words(parts)}." if parts else ""


def _vcpus(logged: pl.DataFrame) -> str:
    group = _by_vcpus(logged)
    if group.is_empty():
        return ""
    means = summary(group, [VCPUS], ["slowdown", "lock_wait", "lock_used", "faults"]).sort(VCPUS)
    few, many = means.row(0, named=True), means.row(-1, named=True)
    if few[VCPUS] == many[VCPUS]:
        return ""
    said = (
        f"With {many[VCPUS]} vCPUs, each with as many pages of its own, the slow-down is {many['slowdown']:.2f} "
        f"instead of {few['slowdown']:.2f} with {few[VCPUS]}"
    )
    if many["slowdown"] > 1.25 * few["slowdown"]:
        return (
            f"{said}: their faults take turns at mmu_lock, which is held {percent(many['lock_used'], 0)} of the time "
            f"({percent(few['lock_used'], 0)}), and waiting for it is {percent(many['lock_wait'], 0)} of all vCPUs' "
            f"time ({percent(few['lock_wait'], 0)})."
        )
    return f"{said}: mmu_lock, held {percent(many['lock_used'], 0)} of the time, does not matter yet."


def _by_vcpus(logged: pl.DataFrame) -> pl.DataFrame:
    """The runs at the interval, pages and share of writes at which vCPUs were varied."""
    more = logged.filter((pl.col(VCPUS) > 1) & pl.col("plain"))
    if more.is_empty():
        return more
    keys = [LOG, PAGES, SHARE]
    return logged.filter("plain").join(more.select(keys).unique(), on=keys, how="semi", maintain_order="left")


def _sensitivity(logged: pl.DataFrame) -> str:
    parts, plain = [], 1.0
    for row in _factors(logged).to_dicts():
        if row["factors"] != "none":
            parts.append(f"{row['slowdown']:.2f} with {row['factors']}")
        else:
            plain = row["slowdown"]
    if not parts:
        return ""
    return f"By the cost model's constants: {join_words(parts)}, where it is {plain:.2f} otherwise."


def _factors(logged: pl.DataFrame) -> pl.DataFrame:
    """Slow-downs under scaled constants, and under none at the same point."""
    scaled = logged.filter(~pl.col("plain"))
    keys = [*KEYS, LOG]
    same = logged.join(scaled.select(keys).unique(), on=keys, how="semi", maintain_order="left")
    texts = [
        pl.when(pl.col(name) != 1.0).then(pl.concat_str(pl.lit(f"{name} "), pl.col(name).cast(pl.String)))
        for name in FACTORS
    ]
    named = same.with_columns(factors=pl.concat_str(texts, separator=", ", ignore_nulls=True))
    named = named.with_columns(factors=pl.when("plain").then(pl.lit("none")).otherwise("factors"))
    return summary(named, ["factors"], ["slowdown", "fault_cycles"])


def _tables(one: pl.DataFrame, logged: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    names = {
        LOG: "interval (cycles)",
        "round_us": "round (us)",
        PAGES: "pages",
        SHARE: "share of writes",
        "faults": "write faults per round",
        "fault_cycles": "cycles per fault",
        "rounds_in_faults": "round / time to fault all back",
        "lock_wait": "share of time waiting for mmu_lock",
        "lock_used": "mmu_lock held",
    }
    by_interval = summary(
        one.sort(PAGES, SHARE, LOG),
        [PAGES, SHARE, LOG, "round_us"],
        ["slowdown", "faults", "fault_cycles", "rounds_in_faults"],
    )
    by_vcpus = summary(
        _by_vcpus(logged).sort(VCPUS),
        [VCPUS, PAGES, "round_us"],
        ["slowdown", "faults", "fault_cycles", "lock_wait", "lock_used"],
    )
    return [
        ("One vCPU", renamed(by_interval, names)),
        ("By vCPUs", renamed(by_vcpus, names)),
        ("By constants of the cost model", renamed(_factors(logged), names)),
    ]


def _charts(one: pl.DataFrame, logged: pl.DataFrame) -> list[tuple[str, ChartType]]:
    usual = one.filter(pl.col(SHARE) == one[SHARE].mode().max()).rename({PAGES: "pages"})
    shown = in_percent(usual, "rounds_in_faults").with_columns(pl.col("rounds_in_faults").round_sig_figs(2))
    vcpus = in_percent(_by_vcpus(logged), "lock_wait")
    slowdown = Plot(
        title="Slow-down against the time between two readings",
        x="round_us",
        y="slowdown",
        color="pages",
        log_x=True,
        log_y=True,
        x_title="microseconds from one reading to the next",
        y_title="slow-down",
    )
    in_faults = msgspec.structs.replace(
        slowdown,
        title="The same against what the guest can fault back",
        x="rounds_in_faults",
        x_title="time between two readings, in % of the time to fault all pages back",
    )
    faults = msgspec.structs.replace(slowdown, title="Write faults per round", y="faults", y_title="faults")
    by_vcpus = Plot(title="Slow-down by vCPUs", x=VCPUS, y="slowdown", x_title="vCPUs", y_title="slow-down")
    waiting = msgspec.structs.replace(
        by_vcpus, title="Waiting for mmu_lock, by vCPUs", y="lock_wait", y_title="% of the vCPUs' time"
    )
    return declared_charts(
        ((slowdown, shown), (in_faults, shown), (faults, shown), (by_vcpus, vcpus), (waiting, vcpus))
    )
