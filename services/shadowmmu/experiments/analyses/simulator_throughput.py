"""Experiment `simulator-throughput`: what the simulator itself executes per second of wall clock, on one computer.

Nothing here is virtual time, or says anything about a kernel's speed.
"""

from __future__ import annotations

from typing import Final

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.charts import declared_charts
from shadowmmu.experiments.comparison import failures_said, join_words, paragraphs, succeeded
from shadowmmu.experiments.findings import Findings
from shadowmmu.experiments.spec import Plot
from shadowmmu.experiments.statistics import summary

__all__ = ["analyse"]

RATE: Final = "instructions_per_second"
EVENTS: Final = "events_per_second"
GAIN: Final = 1.25
"""A rate this many times another is called higher."""


def analyse(table: pl.DataFrame) -> Findings:
    """The table of a sweep of that experiment. Raises FindingsError if it lacks something."""
    runs = succeeded(table, ["machines", "vcpus", "cores", "python", RATE, EVENTS, "seconds"])
    runs = runs.with_columns(processes=pl.col("machines") * (pl.col("vcpus") + 1))
    means = summary(runs, ["machines", "vcpus", "processes"], [RATE, EVENTS, "seconds"])
    answer = paragraphs(
        _verdict(means), _vcpus(means), _machines(means, runs), _where(runs), failures_said(table)
    )
    return Findings(answer, [("Wall clock of this computer, all machines together", means)], _charts(runs))


def _verdict(means: pl.DataFrame) -> str:
    best = max(means.to_dicts(), key=lambda row: row[RATE])
    return (
        f"At most {best[RATE]:,.0f} guest instructions and {best[EVENTS]:,.0f} events per second of wall clock on the "
        f"computer that this was measured on, with {_times(best['machines'], 'virtual machine')} of "
        f"{_times(best['vcpus'], 'vCPU process', 'vCPU processes')}."
    )


def _times(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _vcpus(means: pl.DataFrame) -> str:
    """What more vCPU processes give one virtual machine."""
    alone = sorted(means.filter(pl.col("machines") == 1).to_dicts(), key=lambda row: int(row["vcpus"]))
    if len(alone) < 2:
        return ""
    first, last = alone[0], alone[-1]
    ratio = last[RATE] / first[RATE]
    said = f"{last['vcpus']} vCPU processes instead of {first['vcpus']} make one machine {ratio:.2f} times as fast"
    if ratio >= GAIN:
        return f"{said}."
    return (
        f"{said}: all exits and walks go through its MMU service, a single process; guests that share memory with more "
        "others exit more often; and processes share cores. The table does not tell these apart."
    )


def _machines(means: pl.DataFrame, runs: pl.DataFrame) -> str:
    """What more virtual machines at once give together, and whether they could have cores of their own."""
    rows = means.to_dicts()
    most = max(row["machines"] for row in rows)
    alone = {row["vcpus"]: row[RATE] for row in rows if row["machines"] == 1}
    parts = [
        f"{row[RATE] / alone[row['vcpus']]:.2f} times as many with {_times(row['vcpus'], 'vCPU')} each"
        for row in rows
        if row["machines"] == most > 1 and row["vcpus"] in alone
    ]
    if not parts:
        return ""
    said = f"{most} virtual machines at once execute together {join_words(parts)} as one alone."
    cores, processes = min(runs["cores"].to_list()), max(row["processes"] for row in rows)
    if processes <= cores:
        return said
    return (
        f"{said} They share nothing but the computer, and it has {_times(cores, 'core')} for {processes} processes: "
        "with more processes than cores, the operating system's scheduler is measured too."
    )


def _where(runs: pl.DataFrame) -> str:
    pythons = sorted(set(runs["python"].to_list()))
    cores = sorted(set(runs["cores"].to_list()))
    return (
        f"Measured by the wall clock on {join_words([str(n) for n in cores])} usable core{'s' if cores != [1] else ''} "
        f"with Python {join_words(pythons)}; a second run gives other numbers, and other programs on the computer "
        "change them."
    )


def _charts(runs: pl.DataFrame) -> list[tuple[str, ChartType]]:
    named = runs.rename({"machines": "virtual machines"})
    cores = join_words([str(n) for n in sorted(set(runs["cores"].to_list()))])
    instructions = Plot(
        title=f"Guest instructions per second of wall clock, {cores} cores",
        x="vcpus",
        y=RATE,
        color="virtual machines",
        log_x=True,
        x_title="vCPU processes of each virtual machine",
        y_title="instructions per second, all together",
    )
    events = msgspec.structs.replace(
        instructions,
        title=f"Events per second of wall clock, {cores} cores",
        y=EVENTS,
        y_title="events per second, all together",
    )
    return declared_charts(((instructions, named), (events, named)))
