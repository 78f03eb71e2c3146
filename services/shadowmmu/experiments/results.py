"""The folder of a sweep, to read: its spec, its table, its failures.

    sweep.json         the spec as it was checked, and the version of the code
    results.parquet    the table: a row per run, sorted by point and replicate
    results.digest     of the table's content, once every run has a row
    parts/*.parquet    rows that are not yet in the table (a sweep that is going on, or was killed)

`shadowmmu.experiments.folder` writes it. What is read here may be of a sweep that is going on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import polars as pl

from shadowmmu.experiments.spec import SweepSpec
from shadowmmu.experiments.table import RESERVED, Row, Status, table_digest, table_of

__all__ = [
    "DIGEST_NAME",
    "HEADER_NAME",
    "PARTS_NAME",
    "TABLE_NAME",
    "SweepFolder",
    "SweepFolderError",
    "SweepHeader",
    "open_sweep",
]

SCHEMA: Final = "shadowmmu-sweep/1"
HEADER_NAME: Final = "sweep.json"
TABLE_NAME: Final = "results.parquet"
DIGEST_NAME: Final = "results.digest"
PARTS_NAME: Final = "parts"


class SweepFolderError(ValueError):
    """A folder that is no sweep's, or is damaged; the message names the file and says what to do."""


class SweepHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """sweep.json. `code`: the version of the program that runs the sweep."""

    spec: SweepSpec
    code: str
    schema: str = SCHEMA


class SweepFolder:
    """A sweep's folder. Made by `open_sweep`."""

    def __init__(self, path: Path, header: SweepHeader) -> None:
        self.path = path
        self.header = header

    @property
    def spec(self) -> SweepSpec:
        """What the sweep is."""
        return self.header.spec

    @property
    def code(self) -> str:
        """The version of the program that ran it."""
        return self.header.code

    @property
    def runs(self) -> int:
        """How many runs the whole sweep has."""
        return self.spec.runs()

    def table(self) -> pl.DataFrame:
        """A row per run that has ended: point, replicate, seed, parameters, status, error, metrics.

        Failed runs have no metrics. Raises SweepFolderError for a file that is damaged.
        """
        return self.full_table().drop("traceback")

    def failures(self) -> pl.DataFrame:
        """The runs that failed: point, replicate, seed, parameters, error, traceback (its end).

        Raises SweepFolderError.
        """
        columns = ["point", "replicate", "seed", *self.spec.names(), "error", "traceback"]
        return self.full_table().filter(pl.col("status") == Status.FAILED.value).select(columns)

    def complete(self) -> bool:
        """Whether every run has a row, failed ones too. Raises SweepFolderError."""
        return self.full_table().height == self.runs

    def digest(self) -> str:
        """The digest of the table as it is now. Raises SweepFolderError."""
        return table_digest(self.full_table())

    def full_table(self) -> pl.DataFrame:
        """The table with the column of tracebacks. Raises SweepFolderError."""
        try:
            rows = self._rows()
        except FileNotFoundError:  # a sweep that is going on has just put it into the table
            rows = self._rows()
        return table_of(rows, self.spec.names())

    def row_files(self) -> list[Path]:
        """The files with rows, those that count more after the others."""
        parts = sorted((self.path / PARTS_NAME).glob("part-*.parquet"))
        table = self.path / TABLE_NAME
        return [table, *parts] if table.exists() else parts

    def _rows(self) -> list[Row]:
        return [row for path in self.row_files() for row in self._frame(path).iter_rows(named=True)]

    def _frame(self, path: Path) -> pl.DataFrame:
        try:
            frame = pl.read_parquet(path, glob=False)
        except FileNotFoundError:
            raise
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise SweepFolderError(
                f"{path} is damaged ({error}); without it, its runs are made again"
            ) from error
        missing = [name for name in sorted(RESERVED) + self.spec.names() if name not in frame.columns]
        if missing:
            raise SweepFolderError(f"{path} is no file of this sweep: it has no column {missing[0]!r}")
        return frame


def open_sweep(path: Path | str) -> SweepFolder:
    """The sweep in a folder. Raises SweepFolderError if there is none."""
    folder = Path(path)
    file = folder / HEADER_NAME
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SweepFolderError(f"{folder} is no folder of a sweep: it has no {HEADER_NAME}") from None
    except OSError as error:
        raise SweepFolderError(f"{file}: {error.strerror or error}") from error
    try:
        raw: Any = msgspec.json.decode(data)
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if schema != SCHEMA:
            raise SweepFolderError(f"{file}: the schema is {schema!r}; {SCHEMA!r} is known here")
        return SweepFolder(folder, msgspec.json.decode(data, type=SweepHeader))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SweepFolderError(f"{file} is damaged: {error}") from error
