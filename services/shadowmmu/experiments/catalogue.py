"""The catalogue of runs: an SQLite file with an entry per run that has ended.

Anybody may enter runs at the same time: SQLite's locks see to it that none is lost. Nothing but the standard library
and msgspec is needed here.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from shadowmmu.experiments.values import Metric

__all__ = [
    "CATALOGUE_VARIABLE",
    "DEFAULT_WORD",
    "Catalogue",
    "CatalogueError",
    "Entry",
    "Run",
    "default_catalogue",
    "enter",
]

CATALOGUE_VARIABLE: Final = "SHADOWMMU_CATALOGUE"
DEFAULT_WORD: Final = "default"
"""Stands for the file of `default_catalogue`."""

_APPLICATION: Final = 0x53684D55
"""PRAGMA application_id: "ShMU". Another program's database has another."""
_VERSION: Final = 1
_LOCK_SECONDS: Final = 60.0
_SCHEMA: Final = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    folder TEXT,
    started TEXT NOT NULL,
    entered TEXT NOT NULL,
    code TEXT NOT NULL,
    verdict TEXT NOT NULL,
    text TEXT NOT NULL,
    configuration TEXT NOT NULL,
    metrics TEXT NOT NULL
) STRICT
"""
_COLUMNS: Final = "id, kind, folder, started, entered, code, verdict, text, configuration, metrics"


class CatalogueError(ValueError):
    """The catalogue cannot be used; the message names the file and says why."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is entered of a run.

    `folder` is None if nothing of it was kept. `started`: UTC, ISO 8601. `metrics` are counters and rates.
    """

    kind: str
    folder: Path | None
    started: str
    code: str
    verdict: str
    text: str
    configuration: dict[str, Any]
    metrics: dict[str, Metric]


class Run(msgspec.Struct, frozen=True):
    """An entry with its number, and when it was entered."""

    number: int
    entered: datetime
    entry: Entry


def default_catalogue(environment: Mapping[str, str] = os.environ) -> Path:
    """The catalogue's place if somebody asks for one without saying where: XDG's folder for state.

    Raises CatalogueError for a user without a home folder.
    """
    state = environment.get("XDG_STATE_HOME", "")
    # XDG: a relative path is to be ignored.
    try:
        base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise CatalogueError(f"there is no usual place for a catalogue: {error}") from error
    return base / "shadowmmu" / "catalogue.sqlite"


def enter(path: Path, entry: Entry) -> int:
    """Enters a run in the catalogue, which is made if it is not there; the run's number. Raises CatalogueError."""
    with Catalogue(path, make=True) as catalogue:
        return catalogue.enter(entry)


class Catalogue:
    """A catalogue, open; a context manager. `make`: if it is not there. Raises CatalogueError."""

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self._path = path
        with self._errors():
            if make:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif not path.exists():
                raise CatalogueError(f"there is no catalogue {path}")
            self._database = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
            try:
                if make:
                    self._prepare()
                self._check()
            except BaseException:
                self._database.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CatalogueError(f"{self._path}: {error.strerror or error}") from error
        except sqlite3.Error as error:
            raise CatalogueError(f"{self._path}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Writes of one go; waits for other writers first, so that no lock has to be upgraded later."""
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _prepare(self) -> None:
        if self._pragma("application_id") == 0:
            with self._transaction():
                # Somebody else may have been quicker.
                if self._pragma("application_id") == 0:
                    if self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                        raise CatalogueError(f"{self._path} is a database of another program")
                    self._database.execute(_SCHEMA)
                    self._database.execute(f"PRAGMA user_version = {_VERSION}")
                    self._database.execute(f"PRAGMA application_id = {_APPLICATION}")

    def _check(self) -> None:
        if self._pragma("application_id") != _APPLICATION:
            raise CatalogueError(f"{self._path} is no catalogue of runs, or a database of another program")
        version = self._pragma("user_version")
        if version != _VERSION:
            raise CatalogueError(f"{self._path} is of version {version}; version {_VERSION} is known here")

    def _pragma(self, name: str) -> int:
        value: int = self._database.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def enter(self, entry: Entry) -> int:
        """Enters a run; its number. Raises CatalogueError."""
        row = (
            entry.kind,
            None if entry.folder is None else str(entry.folder.absolute()),
            entry.started,
            datetime.now(UTC).isoformat(timespec="seconds"),
            entry.code,
            entry.verdict,
            entry.text,
            msgspec.json.encode(entry.configuration).decode(),
            msgspec.json.encode(entry.metrics).decode(),
        )
        with self._transaction():
            cursor = self._database.execute(
                f"INSERT INTO runs ({_COLUMNS.removeprefix('id, ')}) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608 - no input
                row,
            )
        number = cursor.lastrowid
        assert number is not None
        return number

    def runs(self) -> list[Run]:
        """All entries, the oldest first. Raises CatalogueError."""
        with self._errors():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM runs ORDER BY id").fetchall()  # noqa: S608 - no input
        return [self._run(row) for row in rows]

    def find(self, wanted: str) -> Run:
        """The entry of a number, or the newest one of a folder. Raises CatalogueError if there is none."""
        runs = self.runs()
        if wanted.isdecimal():
            found = [run for run in runs if str(run.number) == wanted]
        else:
            folder = Path(wanted).resolve()
            found = [
                run for run in runs if run.entry.folder is not None and run.entry.folder.resolve() == folder
            ]
        if not found:
            raise CatalogueError(f"there is no run {wanted!r} in {self._path}")
        return found[-1]

    def remove(self, numbers: list[int]) -> None:
        """Takes entries out; those that are not there are no matter. Raises CatalogueError."""
        with self._transaction():
            self._database.executemany("DELETE FROM runs WHERE id = ?", [(number,) for number in numbers])

    def _run(self, row: tuple[Any, ...]) -> Run:
        number, kind, folder, started, entered, code, verdict, text, configuration, metrics = row
        try:
            when = datetime.fromisoformat(entered).astimezone(UTC)
            entry = Entry(
                kind=kind,
                folder=None if folder is None else Path(folder),
                started=started,
                code=code,
                verdict=verdict,
                text=text,
                configuration=msgspec.json.decode(configuration, type=dict[str, Any]),
                metrics=msgspec.json.decode(metrics, type=dict[str, Metric]),
            )
        except (ValueError, RecursionError) as error:
            raise CatalogueError(f"{self._path}: entry {number} is damaged: {error}") from error
        return Run(number, when, entry)
