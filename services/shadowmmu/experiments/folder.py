"""The folder of a sweep, to write: results in small files as they come, one table at the end.

A file is written under another name, synchronised, then renamed; so whatever kills the program leaves whole files. One
program at a time writes to a folder. `shadowmmu.experiments.results` says what is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import polars as pl

from shadowmmu.experiments.design import Run, runs_of
from shadowmmu.experiments.results import (
    DIGEST_NAME,
    HEADER_NAME,
    PARTS_NAME,
    TABLE_NAME,
    SweepFolder,
    SweepFolderError,
    SweepHeader,
    open_sweep,
)
from shadowmmu.experiments.spec import PRESENTATION, SweepSpec
from shadowmmu.experiments.table import Row, Status, table_digest, table_of

__all__ = ["SweepWriteError", "SweepWriter"]

BATCH_SECONDS: Final = 1.0
BATCH_ROWS: Final = 256
"""A file of rows is written when there are so many, or when the last one is so old."""
TEMPORARY: Final = ".new"
LOCK_NAME: Final = ".lock"


class SweepWriteError(SweepFolderError):
    """The disk did not take a file. Those that are there are whole."""


class SweepWriter:
    """A sweep's folder while somebody runs it; a context manager.

    `path`: made if it is not there; what it has of the same sweep is gone on with. Raises SweepFolderError if it has
    something else, or if another program writes to it; SweepWriteError from whatever has to write.
    """

    def __init__(
        self, path: Path, spec: SweepSpec, code: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sweep = SweepFolder(path, SweepHeader(spec, code))
        self._parts = path / PARTS_NAME
        self._clock = clock
        self._rows: list[Row] = []
        self._flushed = -math.inf
        self._lock = -1

    def __enter__(self) -> Self:
        path = self.sweep.path
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._begin(path)
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise SweepFolderError(f"{path}: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def _begin(self, path: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepFolderError(f"{path}: another program is running this sweep") from None
        if (path / HEADER_NAME).exists():
            _check_same(open_sweep(path), self.sweep)
        elif self.sweep.row_files():
            raise SweepFolderError(f"{path} has results, but no {HEADER_NAME} that says of what")
        for left in (*path.glob(f"*{TEMPORARY}"), *self._parts.glob(f"*{TEMPORARY}")):
            left.unlink()
        header = msgspec.json.format(msgspec.json.encode(self.sweep.header), indent=2) + b"\n"
        _write(path / HEADER_NAME, header)

    # --- what is to be done ------------------------------------------------------------------------------------------

    def pending(self, *, retry_failed: bool = False) -> list[Run]:
        """The runs that have not ended; also those that have failed, if they are to be made again."""
        table = self.sweep.full_table()
        done = {
            (point, replicate)
            for point, replicate, status in table.select("point", "replicate", "status").iter_rows()
            if not (retry_failed and status == Status.FAILED.value)
        }
        return [run for run in runs_of(self.sweep.spec) if run.key not in done]

    # --- results -----------------------------------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        """A run has ended. The row is on disk after a `flush_now_and_then` some time later, or `flush`."""
        self._rows.append(row)
        if len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush_now_and_then(self) -> None:
        """Writes the rows that are waiting, if the last time was long ago."""
        if self._clock() - self._flushed >= BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are waiting."""
        if not self._rows:
            return
        table = table_of(self._rows, self.sweep.spec.names())
        stems = (path.stem.removeprefix("part-") for path in self._parts.glob("part-*.parquet"))
        numbers = [int(stem) for stem in stems if stem.isdecimal()]
        path = self._parts / f"part-{max(numbers, default=0) + 1:08d}.parquet"
        _write(path, _parquet(table))
        self._rows.clear()
        self._flushed = self._clock()

    def compact(self) -> str:
        """Puts all rows into the table, and says its digest, which is kept beside it if all runs have ended."""
        self.flush()
        path = self.sweep.path
        files = self.sweep.row_files()
        table = self.sweep.full_table()
        digest = table_digest(table)
        _write(path / TABLE_NAME, _parquet(table))
        for part in files:
            if part.parent == self._parts:
                part.unlink()
        if table.height == self.sweep.runs:
            _write(path / DIGEST_NAME, f"{digest}\n".encode())
        else:
            (path / DIGEST_NAME).unlink(missing_ok=True)
        return digest


def _check_same(there: SweepFolder, wanted: SweepFolder) -> None:
    """Raises SweepFolderError if results of one do not belong with those of the other."""
    differences = [
        f"{key}: {_shown(before)} there, {_shown(now)} now"
        for key, before, now in _different(
            msgspec.to_builtins(there.spec), msgspec.to_builtins(wanted.spec), PRESENTATION
        )
    ]
    if there.code != wanted.code:
        differences.append(f"version of the program: {there.code} there, {wanted.code} now")
    if differences:
        raise SweepFolderError(f"{there.path} has another sweep: {'; '.join(differences)}")


def _different(
    before: dict[str, Any], now: dict[str, Any], without: frozenset[str], prefix: str = ""
) -> list[tuple[str, object, object]]:
    found: list[tuple[str, object, object]] = []
    for key in [*before, *(key for key in now if key not in before)]:
        if key in without or before.get(key) == now.get(key):
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _different(old, new, frozenset(), f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", old, new))
    return found


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parquet(table: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    table.write_parquet(file)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all, and waits until the disk has it. Raises SweepWriteError."""
    scratch = path.with_name(f"{path.name}{TEMPORARY}")
    try:
        scratch.write_bytes(data)
        _synchronise(scratch)
        scratch.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()  # half of it is of no use, and takes room
        raise SweepWriteError(f"{path}: {error.strerror or error}") from error


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
