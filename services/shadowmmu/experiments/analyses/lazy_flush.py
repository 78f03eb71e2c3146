"""Experiments `lazy-flush` and `lazy-flush-loads`: what tlbs_dirty saves against flushing at once.

Three kernels are compared: Linux 3.1 as it is, Linux 3.1 whose write protection also flushes what sync_page has put off
(without which the deferral is wrong: bug A1), and one whose sync_page flushes itself (`sync-flush-now`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    in_words,
    join_words,
    paragraphs,
    percent,
    saved,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.programs import PROGRAM, program_runs
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import mean_interval, means_by, renamed, summary, values_by

__all__ = ["analyse"]

LAZY: Final = "linux-3.1"
CORRECT: Final = "linux-3.1+tlbs-dirty-missed-wp"
AT_ONCE: Final = "linux-3.1+sync-flush-now"
KERNELS: Final = {LAZY: "3.1", CORRECT: "3.1, A1 fixed", AT_ONCE: "flushing at once"}
KEYS: Final = (PROGRAM, "vcpus")
NOTABLE: Final = 0.02
"""Of the cycles: what saves less hardly matters."""
COUNTERS: Final = ("kvm.remote_tlb_flush", "kicks.sent", "tlbs_dirty.raised")
LIMITS: Final = (
    "What the model cannot say: how often a real guest synchronises while other vCPUs are in guest mode depends on its "
    "programs; vCPUs here do little between their edits, and workloads (not loads) have no warm-up. A flush counts if "
    "it kicked somebody: one that finds nobody in guest mode costs next to nothing here. Intervals are of single "
    "points: of so many, one may seem to differ by chance."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of either experiment. Raises FindingsError if it lacks something."""
    runs = program_runs(table, ["profile", "cause.kick", "cause.kick_wait"], COUNTERS)
    per = 1000.0 / pl.col("vcpu.instructions")
    runs = runs.with_columns(
        cycles=pl.col("spent") / pl.col("vcpu.instructions"),
        flushes=pl.col("kvm.remote_tlb_flush") * per,
        kicks=pl.col("kicks.sent") * per,
        put_off=pl.col("tlbs_dirty.raised") * per,
        share_of_kicks=(pl.col("cause.kick") + pl.col("cause.kick_wait")) / pl.col("spent"),
    )
    lazy, correct = _against_at_once(runs, LAZY), _against_at_once(runs, CORRECT)
    if lazy.is_empty():
        return Findings("There are no two runs yet of which one flushes at once.")
    answer = paragraphs(
        _verdict(lazy), f"{_counts(lazy)} {_why(lazy)}", _correct(correct), LIMITS, failures_said(table)
    )
    return Findings(answer, _tables(lazy, correct, runs), _charts(lazy, runs))


def _against_at_once(runs: pl.DataFrame, kernel: str) -> pl.DataFrame:
    """The runs of a kernel, and what they need less than those that flush at once."""
    metrics = ["cycles", "flushes", "kicks", "share_of_kicks"]
    of, at_once = (runs.filter(pl.col("profile") == profile) for profile in (kernel, AT_ONCE))
    return beside(of, at_once, KEYS, metrics).with_columns(
        saved=saved("cycles"),
        flushes_saved=pl.col("flushes" + BASE) - pl.col("flushes"),
        kicks_saved=pl.col("kicks" + BASE) - pl.col("kicks"),
    )


def _notable(pairs: pl.DataFrame, sign: float) -> list[str]:
    """Points at which the time differs by a share that matters, for certain; sign 1: saved, -1: lost."""
    found = []
    for (program, vcpus), shares in values_by(pairs, KEYS, "saved").items():
        interval = mean_interval([sign * share for share in shares])
        if interval.mean >= NOTABLE and interval.low is not None and interval.low > 0.0:
            found.append(f"{program} at {vcpus} vCPUs ({in_words(shares)})")
    return found


def _verdict(lazy: pl.DataFrame) -> str:
    points = means_by(lazy, KEYS, "saved")
    gains, losses = _notable(lazy, 1.0), _notable(lazy, -1.0)
    if not gains and not losses:
        return (
            f"Putting the flush off saves next to nothing: at none of {len(points)} points does it change the cycles "
            f"per instruction by {percent(NOTABLE, 0)} for certain; over all of them it saves "
            f"{in_words(list(points.values()))}."
        )
    first = (
        f"Putting the flush off saves {percent(NOTABLE, 0)} or more of the cycles per instruction at {len(gains)} of "
        f"{len(points)} points{': ' + join_words(gains) if gains else ''}."
    )
    return f"{first} It costs as much at {join_words(losses)}." if losses else first


def _flushes(lazy: pl.DataFrame) -> tuple[float, float]:
    """How many remote flushes there were in all these runs, when flushing at once and with tlbs_dirty."""
    at_once = sum(lazy["flushes" + BASE] * lazy["vcpu.instructions"]) / 1000.0
    return at_once, float(sum(lazy["kvm.remote_tlb_flush"]))


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
    most = max(programs, key=programs.__getitem__)
    return (
        f"In all runs together {entries} dropped entries were put off; that saved {at_once - now:.0f} of "
        f"{at_once:.0f} remote flushes ({percent(share)}; most in {most}: {percent(programs[most])}). Sending kicks "
        f"and waiting for answers takes {percent(kicks)} of the cycles when flushing at once, so this saves about "
        f"{percent(share * kicks, 2)}, and if kicks cost ten times as much about {percent(10 * share * kicks, 2)}."
    )


def _correct(correct: pl.DataFrame) -> str:
    if correct.is_empty():
        return ""
    if gains := _notable(correct, 1.0):
        return f"With the deferral mended (bug A1) it saves {percent(NOTABLE, 0)} or more at {join_words(gains)}."
    return (
        f"With the deferral mended (bug A1) it saves {percent(NOTABLE, 0)} or more nowhere for certain: over all "
        f"points {in_words(list(means_by(correct, KEYS, 'saved').values()))}."
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
    differences = {
        "put_off": "entries put off",
        "flushes_saved": "flushes saved",
        "kicks_saved": "kicks saved",
        "saved": "cycles saved",
    }
    each = {
        "flushes": "remote flushes",
        "kicks": "kicks",
        "cycles": "cycles per instruction",
        "share_of_kicks": "share of kicks",
    }
    return [
        (f"{title}, per 1,000 instructions; cycles as a share", _means(pairs, KEYS, differences))
        for title, pairs in (("Saved by Linux 3.1", lazy), ("Saved by Linux 3.1 with bug A1 fixed", correct))
        if pairs.height
    ] + [("Each kernel: flushes and kicks per 1,000 instructions", _means(runs, [*KEYS, "profile"], each))]


def _means(runs: pl.DataFrame, by: Sequence[str], metrics: Mapping[str, str]) -> pl.DataFrame:
    return renamed(summary(runs, by, metrics), metrics)


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
    return declared_charts(((cycles, in_percent(lazy, "saved")), (flushes, lazy), (each, named)))
