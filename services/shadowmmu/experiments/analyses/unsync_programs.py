"""Experiments `unsync-loads`, `unsync-workloads`: programs with unsync pages, and with tables write-protected."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Final

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
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.programs import LOAD, PROGRAM, program_runs
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import mean_interval, renamed, summary, values_by

__all__ = ["analyse"]

MODEL: Final = "cost_model"
KEYS: Final = (MODEL, PROGRAM, "vcpus")
NOTABLE: Final = 0.02
COUNTERS: Final = ("timed.exits", "kvm.mmu_flooded", "kvm.remote_tlb_flush")
LIMITS: Final = (
    "What the model cannot say: programs here are small, so that few entries are compared at each CR3 write; "
    "experiment `unsync` shows that full tables turn the balance. Workloads (not loads) have no warm-up: empty shadow "
    "tables are part of what they cost. What draws nothing at random on one vCPU has intervals of no width."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of either experiment. Raises FindingsError if it lacks something."""
    runs = program_runs(table, [MODEL, "oos_shadow", "iteration_cycles", "lock_held"], COUNTERS)
    per_instruction = pl.col("spent") / pl.col("vcpu.instructions")
    runs = runs.with_columns(
        # A workload has no iterations: then cycles of all vCPUs per instruction.
        time=pl.col("iteration_cycles") if LOAD in runs.columns else per_instruction,
        exits=1000.0 * pl.col("timed.exits") / pl.col("vcpu.instructions"),
        held=pl.col("lock_held") / pl.col("vcpu.instructions"),
        flushes=1000.0 * pl.col("kvm.remote_tlb_flush") / pl.col("vcpu.instructions"),
    )
    compared = ["time", "exits", "flushes", "held"]
    both = beside(runs.filter(pl.col("oos_shadow")), runs.filter(~pl.col("oos_shadow")), KEYS, compared)
    if both.is_empty():
        return Findings("There are no two runs yet with and without unsync pages.")
    both = both.with_columns(ratio=pl.col("time" + BASE) / pl.col("time"))
    columns = {
        "exits": "exits, unsync",
        "exits" + BASE: "exits, write-protected",
        "flushes": "flushes, unsync",
        "flushes" + BASE: "flushes, write-protected",
        "ratio": "times as fast",
    }
    means = renamed(summary(both, KEYS, columns), columns)
    answer = paragraphs(_verdict(both), LIMITS, failures_said(table))
    return Findings(
        answer,
        [("With unsync pages against without; exits and flushes per 1,000 instructions", means)],
        _charts(both),
    )


def _verdict(both: pl.DataFrame) -> str:
    faster: dict[str, list[float]] = {}
    slower: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    for (_, program, _), ratios in values_by(both, KEYS, "ratio").items():
        interval = mean_interval(ratios)
        low = interval.mean if interval.low is None else interval.low
        high = interval.mean if interval.high is None else interval.high
        where = faster if low > 1.0 + NOTABLE else slower if high < 1.0 - NOTABLE else same
        where.setdefault(str(program), []).append(interval.mean)
    counts = [sum(map(len, where.values())) for where in (faster, slower, same)]
    first = (
        f"Unsync pages make the guest faster at {counts[0]} of {sum(counts)} points and slower at {counts[1]}; at "
        f"{counts[2]} there is no difference beyond {percent(NOTABLE, 0)} for certain."
    )
    kinds = (("faster", faster), ("slower", slower), ("no certain difference", same))
    lines = [f"- {kind}: {_listed(where)} times as fast" for kind, where in kinds if where]
    return paragraphs(first, "\n".join(lines), _by_vcpus(both))


def _by_vcpus(both: pl.DataFrame) -> str:
    """The geometric mean of all points of a number of vCPUs, and how often all TLBs were flushed."""
    speeds, flushes, locks = [], [], []
    for (vcpus,), group in both.group_by("vcpus", maintain_order=True):
        mean = math.exp(fmean(map(math.log, group["ratio"])))
        speeds.append(f"{mean:.2f} with {vcpus}")
        flushes.append(f"{fmean(group['flushes']):.1f} and {fmean(group['flushes' + BASE]):.1f} with {vcpus}")
        locks.append(f"{fmean(group['held']) / fmean(group['held' + BASE]):.2f} with {vcpus}")
    return (
        f"Over all programs the speed is so many times that without, by vCPUs (geometric means): {join_words(speeds)}. "
        f"Remote flushes per 1,000 instructions, with unsync pages and without: {join_words(flushes)}. "
        f"mmu_lock is held so many times as long for each instruction: {join_words(locks)}."
    )


def _listed(ratios: dict[str, list[float]]) -> str:
    """Programs with the range of their ratios."""
    return join_words(
        [
            f"{program} {min(values):.2f}"
            + (f" to {max(values):.2f}" if max(values) - min(values) >= 0.005 else "")
            for program, values in ratios.items()
        ]
    )


def _charts(both: pl.DataFrame) -> list[tuple[str, ChartType]]:
    several = both[MODEL].n_unique() > 1
    speed = Plot(
        title="Speed with unsync pages, of that without",
        x=PROGRAM if several else "vCPUs",
        y="ratio",
        color="vCPUs" if several else PROGRAM,
        facet="cost model" if several else None,
        log_x=not several,
        x_title="load" if several else "vCPUs",
        y_title="% of the speed without",
    )
    named = both.rename({MODEL: "cost model", "vcpus": "vCPUs"})
    return declared_charts([(speed, in_percent(named, "ratio"))])
