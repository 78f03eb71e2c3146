"""Runs of a shipped experiment made here, in this process, as the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from shadowmmu.experiments.design import check_points, points_of, seed_of
from shadowmmu.experiments.point import KINDS
from shadowmmu.experiments.spec import SweepSpec, find_spec
from shadowmmu.experiments.values import Value

__all__ = ["checked", "few_runs", "table_of"]


def checked(name: str) -> SweepSpec:
    """The shipped experiment of that name, all of whose points can be run."""
    spec = find_spec(name)
    check_points(spec, name)
    return spec


def few_runs(spec: SweepSpec, points: Iterable[int], **shorter: Value) -> pl.DataFrame:
    """A table of the first replicate of these points, with other values of the parameters in `shorter`."""
    kind, design = KINDS[spec.kind], points_of(spec)
    rows: list[dict[str, object]] = []
    for number in points:
        seed = seed_of(spec, design[number], 0)
        values = design[number].parameters
        metrics = kind.run({**values, **shorter}, seed)
        rows.append({"point": number, "replicate": 0, "seed": seed, "status": "ok", **values, **metrics})
    return table_of(rows)


def table_of(rows: Iterable[dict[str, object]]) -> pl.DataFrame:
    """Rows, which may lack some of each other's columns, as a table of runs that succeeded."""
    full: list[dict[str, object]] = [{"replicate": 0, "status": "ok", **row} for row in rows]
    names = dict.fromkeys(name for row in full for name in row)
    return pl.DataFrame([{name: row.get(name) for name in names} for row in full], infer_schema_length=None)
