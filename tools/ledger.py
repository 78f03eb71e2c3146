"""What a long campaign has found so far: a line of JSON per result, so that it can go on where it was stopped.

A result is written at once, whole. A campaign that was killed in the middle of a line has lost that result only: the
torn line is cut off when the ledger is opened again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from rich.console import Console
from rich.progress import Progress

__all__ = ["Ledger", "LedgerError", "run_all"]

R = TypeVar("R")
T = TypeVar("T")


class LedgerError(Exception):
    """The file holds something else; the message says where."""


class Ledger(Generic[R]):
    """The results of type `kind` in `path`, in the order in which they came. `fresh`: those of before are forgotten.

    Raises LedgerError.
    """

    def __init__(self, path: Path, kind: type[R], *, fresh: bool = False) -> None:
        self._path = path
        self.results: list[R] = []
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self.results.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as error:
                raise LedgerError(f"{path}, line {number}, is no result: {error}") from None

    def add(self, result: R) -> None:
        """Note a result, at once."""
        self.results.append(result)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")


def run_all(
    missing: Iterable[T], work: Callable[[T], R], jobs: int, ledger: Ledger[R], name: Callable[[R], str]
) -> None:
    """Does the missing work in `jobs` processes, and notes each result as it comes; `name` is for the progress line."""
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(work, one) for one in missing]
        task = progress.add_task("begun", total=len(futures))
        for future in as_completed(futures):
            result = future.result()
            ledger.add(result)
            progress.update(task, advance=1, description=name(result))
