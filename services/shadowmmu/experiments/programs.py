"""Runs of guest programs, loads or workloads, as the analyses that compare kernels by many programs need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import polars as pl

from shadowmmu.experiments.comparison import succeeded
from shadowmmu.experiments.findings import FindingsError

__all__ = ["LOAD", "PROGRAM", "program_runs"]

PROGRAM: Final = "program"
"""The column that `program_runs` adds for the name of the load or of the workload."""
LOAD: Final = "load.load"
WORKLOAD: Final = "workload"
_IDLE: Final = "cause.idle"


def program_runs(table: pl.DataFrame, columns: Iterable[str], counters: Iterable[str]) -> pl.DataFrame:
    """The runs that succeeded, with columns `program`, and `spent`: the cycles of all vCPUs in which one was not idle.

    Counters of what a run has not met are 0. Raises FindingsError without a column.
    """
    name = next((name for name in (WORKLOAD, LOAD) if name in table.columns), None)
    if name is None:
        raise FindingsError(
            f"the table has neither {WORKLOAD} nor {LOAD}; this analysis is for another experiment"
        )
    causes = [column for column in table.columns if column.startswith("cause.") and column != _IDLE]
    return succeeded(table, ["vcpus", "vcpu.instructions", *columns], counters).with_columns(
        pl.col(name).alias(PROGRAM), spent=pl.sum_horizontal(pl.col(sorted(causes)).fill_null(0))
    )
