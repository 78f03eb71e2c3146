"""What a sweep says: an answer, tables and charts, by the analysis that its spec names or by a general one.

An analysis is a module of `shadowmmu.experiments.analyses` with a function `analyse` (`Analysis`).
"""

from __future__ import annotations

import importlib
from typing import Final, Protocol, cast

import msgspec
import polars as pl
from altair.typing import ChartType

from shadowmmu.experiments.analyses import module_name
from shadowmmu.experiments.charts import declared_charts
from shadowmmu.experiments.results import SweepFolder
from shadowmmu.experiments.spec import SweepSpec
from shadowmmu.experiments.statistics import CONFIDENCE, summary
from shadowmmu.experiments.table import RESERVED, Status

__all__ = ["Analysis", "Findings", "FindingsError", "findings_of", "general_findings"]

MOST_COLUMNS: Final = 12
"""Metrics that a table in a report has at most, if no plot says which matter."""


class FindingsError(ValueError):
    """The table does not have what an analysis or a plot needs; the message says what."""


class Findings(msgspec.Struct, frozen=True):
    """`answer` is Markdown; `tables` and `charts` have a title each, and stand in this order."""

    answer: str
    tables: list[tuple[str, pl.DataFrame]] = []
    charts: list[tuple[str, ChartType]] = []


class Analysis(Protocol):
    """What `analyse` of a module of `shadowmmu.experiments.analyses` is."""

    def __call__(self, table: pl.DataFrame) -> Findings:
        """What the table of `SweepFolder.table` says. Raises FindingsError if it lacks something."""


def findings_of(sweep: SweepFolder) -> Findings:
    """What a sweep says. Raises FindingsError, or SweepFolderError for a damaged folder."""
    table = sweep.table()
    if sweep.spec.analysis is None:
        return general_findings(sweep.spec, table)
    module = importlib.import_module(module_name(sweep.spec.analysis))
    return cast("Analysis", module.analyse)(table)


def general_findings(spec: SweepSpec, table: pl.DataFrame) -> Findings:
    """Means with confidence intervals at every point, and the plots that the spec declares."""
    good = table.filter(pl.col("status") == Status.OK.value)
    if good.is_empty():
        return Findings("No run has succeeded.")
    for plot in spec.plots:
        for name in (plot.x, plot.y):
            if name not in good.columns:
                raise FindingsError(
                    f"plot {plot.title!r}: there is no column {name!r}; there are {', '.join(_measured(spec, good))}"
                )
        if not good.schema[plot.y].is_numeric():
            raise FindingsError(f"plot {plot.title!r}: {plot.y!r} is no number")
    answer = (
        f"Means over the runs at each point, with {CONFIDENCE:.0%} confidence intervals (Student's t) where there "
        "is more than one."
    )
    if good.height < table.height:
        answer += f" {table.height - good.height} of {table.height} runs have failed and are left out."
    chosen = list(dict.fromkeys(plot.y for plot in spec.plots)) or _measured(spec, good)[:MOST_COLUMNS]
    return Findings(
        answer,
        [("Means per point", summary(good, spec.varied(), chosen))],
        declared_charts((plot, good) for plot in spec.plots),
    )


def _measured(spec: SweepSpec, table: pl.DataFrame) -> list[str]:
    """The metrics that are numbers."""
    known = RESERVED | set(spec.names())
    return [name for name, dtype in table.schema.items() if name not in known and dtype.is_numeric()]
