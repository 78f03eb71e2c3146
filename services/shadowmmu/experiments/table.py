"""Rows of a sweep as a table: the same rows give the same table, in whatever order and batches they came.

A column's type follows from all its values: truth values, integers, numbers (integers among them become such), or
text. Columns: point, replicate, seed, the parameters in the spec's order, status, error, traceback, then the metrics
by name.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
import polars as pl

from shadowmmu.experiments.design import Run
from shadowmmu.experiments.point import Outcome
from shadowmmu.experiments.values import Metric

__all__ = ["RESERVED", "Row", "Status", "row_of", "table_digest", "table_of"]

Row = dict[str, Metric]
"""A run's row: column to value."""


class Status(enum.Enum):
    """How a run of a sweep ended."""

    OK = "ok"
    FAILED = "failed"


_KEYS: Final = ("point", "replicate", "seed")
_ENDING: Final = ("status", "error", "traceback")
RESERVED: Final = frozenset((*_KEYS, *_ENDING))
"""Columns that no parameter and no metric can be called."""


def row_of(run: Run, outcome: Outcome) -> Row:
    """The row of a run. A metric of a parameter's name, or of a column's, makes it a failure."""
    row: Row = {
        "point": run.point.number,
        "replicate": run.replicate,
        "seed": run.seed,
        **run.point.parameters,
    }
    metrics = outcome.metrics
    error = outcome.error
    if metrics is not None:
        taken = sorted((RESERVED | run.point.parameters.keys()) & metrics.keys())
        if taken:
            error, metrics = f"a metric is called {taken[0]!r}, as another column is", None
    if metrics is None:
        return row | {"status": Status.FAILED.value, "error": error, "traceback": outcome.traceback}
    return row | {"status": Status.OK.value, "error": None, "traceback": None} | metrics


def table_of(rows: Iterable[Row], parameters: Sequence[str]) -> pl.DataFrame:
    """The table of rows, sorted by point and replicate. Of several rows of a run the last counts."""
    last: dict[tuple[Metric, Metric], Row] = {}
    for row in rows:
        last[row["point"], row["replicate"]] = row
    ordered = sorted(last.values(), key=lambda row: (row["point"], row["replicate"]))
    fixed = [*_KEYS, *parameters, *_ENDING]
    known = set(fixed)
    metrics = sorted({name for row in ordered for name in row if name not in known})
    columns = [_column(name, [row.get(name) for row in ordered]) for name in (*fixed, *metrics)]
    # What no run that counts has measured is of an attempt that was made again.
    return pl.DataFrame(
        [column for column in columns if column.name in known or column.null_count() < len(column)]
    )


def _column(name: str, values: list[Metric]) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    if name in _KEYS:
        return pl.Series(name, values, pl.Int64)
    if not kinds or str in kinds:
        return pl.Series(name, [None if value is None else _text(value) for value in values], pl.String)
    if bool in kinds:
        if len(kinds) == 1:
            return pl.Series(name, values, pl.Boolean)
        return pl.Series(name, [None if value is None else _text(value) for value in values], pl.String)
    if kinds == {int}:
        return pl.Series(name, values, pl.Int64)
    return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64)


def _text(value: Metric) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def table_digest(table: pl.DataFrame) -> str:
    """BLAKE2b-128 (hex) of a table's content: names, types and values; independent of how a file has it.

    Tracebacks are left out: their line numbers are the code's, not the result's.
    """
    content = table.drop("traceback", strict=False)
    digest = hashlib.blake2b(digest_size=16)
    schema: list[Any] = [[name, str(dtype)] for name, dtype in content.schema.items()]
    digest.update(msgspec.msgpack.encode(schema))
    for row in content.iter_rows():
        digest.update(msgspec.msgpack.encode(row))
    return digest.hexdigest()
