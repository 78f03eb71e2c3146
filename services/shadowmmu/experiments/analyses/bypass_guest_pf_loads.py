"""Experiment `bypass-guest-pf-loads`: what the parameter saves in loads, with unsync pages and without.

Without (`oos_shadow` off) every store to a shadowed table is emulated, as in the KVM for which the parameter was made.
"""

from __future__ import annotations

from typing import Final

import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.analyses.bypass_guest_pf import kernels, linux_3_1_said
from shadowmmu.experiments.charts import declared_charts, in_percent
from shadowmmu.experiments.comparison import (
    beside,
    failures_said,
    in_words,
    join_words,
    paragraphs,
    percent,
    ratio,
    saved,
    succeeded,
)
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import means_by, renamed, summary

__all__ = ["analyse"]

MODEL: Final = "cost_model"
LOAD: Final = "load"
KEYS: Final = (MODEL, LOAD, "oos_shadow")
NOTABLE: Final = 0.05
"""Of a load's time: what saves less hardly matters."""
LIMITS: Final = (
    "What the model cannot say: `oos_shadow` off stands for the KVM before unsync pages, but all else is the tree of "
    "2011; and scans of new shadow pages for entries that are not present cost it nothing more than clearing the page. "
    "Only page-fault draws something at random (its order); other intervals have no width."
)


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    needed = [
        MODEL,
        "oos_shadow",
        "profile",
        "bypass_guest_pf",
        "load.load",
        "load.fault_around",
        "iteration_cycles",
        "guest.iterations",
    ]
    counters = ["timed.exits", "kvm.pf_guest", "vcpu.bypassed"]
    runs = succeeded(table, needed, counters).with_columns(
        pl.when(pl.col("load.load") == "page-fault")
        .then(pl.format("page-fault ({} at once)", "load.fault_around"))
        .otherwise("load.load")
        .alias(LOAD)
    )
    runs = runs.with_columns(
        bypassed=pl.col("vcpu.bypassed") / (pl.col("kvm.pf_guest") + pl.col("vcpu.bypassed")),
        exits=pl.col("timed.exits") / pl.col("guest.iterations"),
    )
    off, on, after = kernels(runs, KEYS, ["iteration_cycles", "exits"])
    if on.is_empty():
        return Findings("There are no two runs yet with the parameter off and on.")
    on = on.with_columns(
        saved=saved("iteration_cycles"),
        exits_saved=saved("exits"),
        setting=pl.when(pl.col("oos_shadow"))
        .then(pl.lit("with unsync pages"))
        .otherwise(pl.lit("without unsync pages")),
    )
    answer = paragraphs(
        _verdict(on),
        _by_load(on),
        _either(off, on),
        linux_3_1_said(after, "iteration_cycles"),
        LIMITS,
        failures_said(table),
    )
    columns = {"bypassed": "faults that do not exit", "exits_saved": "exits saved", "saved": "time saved"}
    means = renamed(summary(on, KEYS, list(columns)), columns)
    return Findings(answer, [("By load", means)], _charts(on))


def _most(on: pl.DataFrame) -> dict[str, float]:
    """The loads, and what the parameter saves in each by the cost model that gives most."""
    most: dict[str, float] = {}
    for (_, load), mean in means_by(on, [MODEL, LOAD], "saved").items():
        most[str(load)] = max(mean, most.get(str(load), mean))
    return most


def _verdict(on: pl.DataFrame) -> str:
    now = _most(on.filter(pl.col("oos_shadow")))
    then = _most(on.filter(~pl.col("oos_shadow")))
    if not now or not then:
        return "Only one of the two settings of `oos_shadow` has been run."
    worth_then = [load for load, share in then.items() if share >= NOTABLE]
    worth_now = [load for load, share in now.items() if share >= NOTABLE]
    lost = [load for load in worth_then if load not in worth_now]
    if not worth_then:
        return (
            f"It was not effective before unsync pages either: no load saves {percent(NOTABLE, 0)} of its time by it, "
            "so there is nothing that they could have taken away."
        )
    if lost:
        return (
            f"It used to be effective and no longer is in {join_words(lost)}: without unsync pages the parameter saves "
            f"up to {percent(max(then[load] for load in lost))} of the time there, with them at most "
            f"{percent(max(now[load] for load in lost))}."
        )
    return (
        f"It is still effective: in {join_words(worth_now)} the parameter saves up to "
        f"{percent(max(now[load] for load in worth_now))} of the time with unsync pages, and without them up to "
        f"{percent(max(then[load] for load in worth_then))}."
    )


def _by_load(on: pl.DataFrame) -> str:
    model = on[MODEL][-1]
    sentences = []
    for (load,), group in on.filter(pl.col(MODEL) == model).group_by(LOAD, maintain_order=True):
        parts = [
            f"{in_words(list(runs['bypassed']))} of the guest's own faults do not exit {setting}, "
            f"and {in_words(list(runs['saved']))} of the time is saved"
            for (setting,), runs in group.group_by("setting", maintain_order=True)
        ]
        sentences.append(f"- {load}: {'; '.join(parts)}.")
    return paragraphs(f"By {model}:", "\n".join(sentences))


def _either(off: pl.DataFrame, on: pl.DataFrame) -> str:
    """Unsync pages without the parameter against write-protected tables with it: the time of the one, of the other."""
    model = on[MODEL][-1]
    with_bypass = on.filter(~pl.col("oos_shadow") & (pl.col(MODEL) == model))
    pairs = beside(
        off.filter(pl.col("oos_shadow") & (pl.col(MODEL) == model)), with_bypass, [LOAD], ["iteration_cycles"]
    ).with_columns(ratio=ratio("iteration_cycles"))
    if pairs.is_empty():
        return ""
    means = {str(load): mean for (load,), mean in means_by(pairs, [LOAD], "ratio").items()}
    longer = [load for load, mean in means.items() if mean > 1.0]
    listed = join_words([f"{mean:.2f} in {load}" for load, mean in means.items()])
    dearer = (
        f"they take away more than they gain in {join_words(longer)}"
        if longer
        else "unsync pages gain more than they take"
    )
    return (
        f"With unsync pages and no parameter a load takes so many times as long as with write-protected tables and the "
        f"parameter: {listed}; so {dearer}."
    )


def _charts(on: pl.DataFrame) -> list[tuple[str, ChartType]]:
    plots = [
        Plot(
            title="Faults of the guest's own that do not exit",
            x=LOAD,
            y="bypassed",
            color="setting",
            x_title="load",
            y_title="% of the faults",
        ),
        Plot(
            title="Time saved by the parameter",
            x=LOAD,
            y="saved",
            color="setting",
            facet="cost model",
            x_title="load",
            y_title="% of an iteration",
        ),
    ]
    one_model = on.filter(pl.col(MODEL) == on[MODEL][-1])
    return declared_charts(
        (plot, in_percent(runs, plot.y).rename({MODEL: "cost model"}))
        for plot, runs in zip(plots, (one_model, on), strict=True)
    )
