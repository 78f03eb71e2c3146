"""Experiments `lazy-flush` and `lazy-flush-loads`: what tlbs_dirty saves against flushing at once.

Three kernels are compared: Linux 3.1 as it is, Linux 3.1 whose write protection also flushes what sync_page has put off
(without which the deferral is wrong: bug A1), and one whose sync_page flushes itself (`sync-flush-now`).
"""

from __future__ import annotations

from statistics import fmean
from typing import Final

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_chart
from shadowmmu.experiments.comparison import (
    BASE,
    beside,
    failures_said,
    in_words,
    join_words,
    paragraphs,
    percent,
    succeeded,
)
from shadowmmu.experiments.findings import Findings, FindingsError
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import mean_interval, summary

__all__ = ["analyse"]

LAZY: Final = "linux-3.1"
CORRECT: Final = "linux-3.1+tlbs-dirty-missed-wp"
AT_ONCE: Final = "linux-3.1+sync-flush-now"
KERNELS: Final = {LAZY: "3.1", CORRECT: "3.1, A1 fixed", AT_ONCE: "flushing at once"}
PROGRAM: Final = "program"
KEYS: Final = (PROGRAM, "vcpus")
NOTABLE: Final = 0.02
"""Of the cycles: what saves less hardly matters."""
COUNTERS: Final = ("kvm.remote_tlb_flush", "kicks.sent", "tlbs_dirty.raised")
LIMITS: Final = (
    "What the model cannot say: how often a real guest's synchronisations fall together with other vCPUs in guest mode "
    "hangs on its programs; vCPUs here do little between their edits, and workloads (not loads) have no warm-up. A "
    "flush counts if it kicked somebody: one that finds nobody in guest mode costs next to nothing here. Intervals are "
    "of single points: of so many, one may seem to differ by chance."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of either experiment. Raises FindingsError if it lacks something."""
    name = next((name for name in ("workload", "load.load") if name in table.columns), None)
    if name is None:
        raise FindingsError(
            "the table has neither workload nor load.load; this analysis is for another experiment"
        )
    causes = sorted(
        column for column in table.columns if column.startswith("cause.") and column != "cause.idle"
    )
    runs = succeeded(
        table,
        [name, "vcpus", "profile", "vcpu.instructions", "cause.kick", "cause.kick_wait", *causes],
        COUNTERS,
    ).with_columns(
        pl.col(name).alias(PROGRAM),
        spent=pl.sum_horizontal(pl.col(causes).fill_null(0)),
    )
    per = 1000.0 / pl.col("vcpu.instructions")
    runs = runs.with_columns(
        cycles=pl.col("spent") / pl.col("vcpu.instructions"),
        flushes=pl.col("kvm.remote_tlb_flush") * per,
        kicks=pl.col("kicks.sent") * per,
        put_off=pl.col("tlbs_dirty.raised") * per,
        share_of_kicks=(pl.col("cause.kick") + pl.col("cause.kick_wait")) / pl.col("spent"),
    )
    compared = ["cycles", "flushes", "kicks", "share_of_kicks"]
    at_once = runs.filter(pl.col("profile") == AT_ONCE)
    lazy = _saved(beside(runs.filter(pl.col("profile") == LAZY), at_once, KEYS, compared))
    correct = _saved(beside(runs.filter(pl.col("profile") == CORRECT), at_once, KEYS, compared))
    if lazy.is_empty():
        return Findings("There are no two runs yet of which one flushes at once.")
    answer = paragraphs(
        _verdict(lazy), f"{_counts(lazy)} {_why(lazy)}", _correct(correct), LIMITS, failures_said(table)
    )
    return Findings(answer, _tables(lazy, correct, runs), _charts(lazy, runs))


def _saved(pairs: pl.DataFrame) -> pl.DataFrame:
    """What a run needs less than the one that flushes at once."""
    return pairs.with_columns(
        saved=1.0 - pl.col("cycles") / pl.col("cycles" + BASE),
        flushes_saved=pl.col("flushes" + BASE) - pl.col("flushes"),
        kicks_saved=pl.col("kicks" + BASE) - pl.col("kicks"),
    )


def _notable(pairs: pl.DataFrame, sign: float) -> list[str]:
    """Points at which the time differs by a share that matters, for certain; sign 1: saved, -1: lost."""
    found = []
    for (program, vcpus), group in pairs.group_by(*KEYS, maintain_order=True):
        interval = mean_interval([sign * value for value in group["saved"]])
        if interval.mean >= NOTABLE and interval.low is not None and interval.low > 0.0:
            found.append(f"{program} at {vcpus} vCPUs ({in_words(list(group['saved']))})")
    return found


def _verdict(lazy: pl.DataFrame) -> str:
    points = lazy.select(KEYS).n_unique()
    saved, lost = _notable(lazy, 1.0), _notable(lazy, -1.0)
    if not saved and not lost:
        return (
            f"Putting the flush off saves next to nothing: at none of {points} points does it change the cycles per "
            f"instruction by {percent(NOTABLE, 0)} for certain; over all of them it saves {in_words(_means(lazy))}."
        )
    first = (
        f"Putting the flush off saves {percent(NOTABLE, 0)} or more of the cycles per instruction at {len(saved)} of "
        f"{points} points{': ' + join_words(saved) if saved else ''}."
    )
    return f"{first} It costs as much at {join_words(lost)}." if lost else first


def _means(pairs: pl.DataFrame, column: str = "saved") -> list[float]:
    """The mean of each point."""
    return [
        float(sum(group[column]) / group.height) for _, group in pairs.group_by(*KEYS, maintain_order=True)
    ]


def _flushes(lazy: pl.DataFrame) -> tuple[float, float]:
    """How many remote flushes there were in all these runs, when flushing at once and with tlbs_dirty."""
    return sum(lazy["flushes" + BASE] * lazy["vcpu.instructions"]) / 1000.0, float(
        sum(lazy["kvm.remote_tlb_flush"])
    )


def _saved_flushes(lazy: pl.DataFrame) -> float:
    at_once, now = _flushes(lazy)
    return (at_once - now) / at_once if at_once else 0.0


def _counts(lazy: pl.DataFrame) -> str:
    entries = sum(lazy["tlbs_dirty.raised"])
    if not entries:
        return "No entry was dropped by a synchronisation, so there was nothing to put off."
    at_once, now = _flushes(lazy)
    share, kicks = _saved_flushes(lazy), fmean(lazy["share_of_kicks" + BASE])
    programs = {
        str(name): _saved_flushes(group) for (name,), group in lazy.group_by(PROGRAM, maintain_order=True)
    }
    most = max(programs, key=lambda name: programs[name])
    return (
        f"In all runs together {entries} dropped entries were put off; that saved {at_once - now:.0f} of "
        f"{at_once:.0f} remote flushes ({percent(share)}; most in {most}: {percent(programs[most])}). Sending kicks "
        f"and waiting for answers takes {percent(kicks)} of the cycles when flushing at once, so this saves about "
        f"{percent(share * kicks, 2)}, and if kicks cost ten times as much about {percent(10 * share * kicks, 2)}."
    )


def _correct(correct: pl.DataFrame) -> str:
    if correct.is_empty():
        return ""
    saved = _notable(correct, 1.0)
    if saved:
        return f"With the deferral mended (bug A1) it saves {percent(NOTABLE, 0)} or more at {join_words(saved)}."
    return (
        f"With the deferral mended (bug A1) it saves {percent(NOTABLE, 0)} or more nowhere for certain: over all "
        f"points {in_words(_means(correct))}."
    )


def _why(lazy: pl.DataFrame) -> str:
    if not _flushes(lazy)[0] or _saved_flushes(lazy) >= 0.1:
        return ""
    return (
        "Few flushes are saved because a table that is synchronised is write-protected again just before, in the same "
        "critical section, and that flushes all TLBs whenever it takes write access away: when sync_page flushes next, "
        "the others have just been kicked, or find nothing to flush."
    )


def _tables(lazy: pl.DataFrame, correct: pl.DataFrame, runs: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    names = {
        "put_off": "entries put off",
        "flushes_saved": "flushes saved",
        "kicks_saved": "kicks saved",
        "saved": "cycles saved",
    }
    tables = []
    for title, pairs in (
        ("Saved by Linux 3.1, per 1,000 instructions; cycles as a share", lazy),
        ("Saved by Linux 3.1 with bug A1 fixed, per 1,000 instructions; cycles as a share", correct),
    ):
        if pairs.height:
            means = summary(pairs, KEYS, list(names))
            ends = ("", ".low", ".high")
            tables.append(
                (
                    title,
                    means.rename(
                        {f"{old}{end}": f"{new}{end}" for old, new in names.items() for end in ends}
                    ),
                )
            )
    each = summary(runs, [*KEYS, "profile"], ["flushes", "kicks", "cycles", "share_of_kicks"])
    renamed = {
        "flushes": "remote flushes",
        "cycles": "cycles per instruction",
        "share_of_kicks": "share of kicks",
    }
    each = each.rename(
        {f"{old}{end}": f"{new}{end}" for old, new in renamed.items() for end in ("", ".low", ".high")}
    )
    tables.append(("Each kernel: flushes and kicks per 1,000 instructions", each))
    return tables


def _charts(lazy: pl.DataFrame, runs: pl.DataFrame) -> list[tuple[str, ChartType]]:
    cycles = Plot(
        title="Cycles per instruction saved by tlbs_dirty",
        x="vcpus",
        y="saved",
        color=PROGRAM,
        log_x=True,
        x_title="vCPUs",
        y_title="%",
    )
    flushes = msgspec.structs.replace(
        cycles,
        title="Remote flushes saved by tlbs_dirty",
        y="flushes_saved",
        y_title="per 1,000 instructions",
    )
    each = Plot(
        title="Remote flushes",
        x=PROGRAM,
        y="flushes",
        color="kernel",
        facet="vCPUs",
        x_title="program",
        y_title="per 1,000 instructions",
    )
    named = runs.with_columns(pl.col("profile").replace(KERNELS).alias("kernel")).rename({"vcpus": "vCPUs"})
    return [
        (cycles.title, declared_chart(cycles, lazy.with_columns(pl.col("saved") * 100.0))),
        (flushes.title, declared_chart(flushes, lazy)),
        (each.title, declared_chart(each, named)),
    ]
