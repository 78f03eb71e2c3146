"""The fuzz targets by name, where each begins, and the committed inputs of each.

A target's module has `run(data)`, which raises if the input shows a defect, and may return words for what became of it. `corpus/NAME.hex` holds inputs that campaigns have found, one a line in hexadecimal, fewest that reach
the same code; `findings/NAME.hex` those that once showed a defect, kept by hand, each below a comment (#) that says which.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

__all__ = ["TARGETS", "committed", "corpus_file", "runner", "write_corpus"]

TARGETS: Final = ("decode", "session", "service", "journal")

_HERE: Final = Path(__file__).parent


def runner(target: str) -> Callable[[bytes], list[str] | None]:
    """The function that takes one input of a target."""
    run: Callable[[bytes], list[str] | None] = importlib.import_module(f"tests.fuzz.{target}_target").run
    return run


def corpus_file(target: str) -> Path:
    return _HERE / "corpus" / f"{target}.hex"


def committed(target: str) -> list[bytes]:
    """The inputs of a target: what once was a finding first, then the corpus."""
    files = (_HERE / "findings" / f"{target}.hex", corpus_file(target))
    lines = [line for file in files if file.exists() for line in file.read_text("ascii").splitlines()]
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def write_corpus(target: str, inputs: Iterable[bytes]) -> None:
    """Replaces a target's corpus; short inputs first."""
    lines = sorted({data.hex() for data in inputs}, key=lambda line: (len(line), line))
    corpus_file(target).write_text("".join(f"{line}\n" for line in lines), "ascii")
