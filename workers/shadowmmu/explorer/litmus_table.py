"""Typed access to the tables of a litmus file: everything that is wrong in one is a LitmusError that says where.

Relies on nothing but what `tomllib` returns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final

__all__ = ["NAME", "LitmusError", "Table", "parse_number"]

NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
"""A name of a frame or of an address."""


class LitmusError(ValueError):
    """A litmus test is wrong: `where` in it, and `what`."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


def parse_number(text: str, where: str) -> int:
    """A number as people write it: `12`, `0xc`. It is not negative, and fits into 64 bits."""
    try:
        number = int(text, 0)
    except ValueError:
        raise LitmusError(where, f"{text!r} is no number") from None
    if not 0 <= number < 1 << 64:
        raise LitmusError(where, f"{text} is no number of 64 bits")
    return number


class Table:
    """A table of the file. `where` it is, for messages; each key may be asked for once its names were checked."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise LitmusError(where, f"must be a table, not {data!r}")
        self._data: dict[str, Any] = data
        self.where = where

    def place(self, key: str) -> str:
        """Where a key is, for messages."""
        return f"{self.where}.{key}"

    def check(self, known: Collection[str]) -> None:
        """Raises LitmusError if there is a key that is not `known`."""
        for key in self._data:
            if key not in known:
                raise LitmusError(self.place(key), f"unknown key; known are {', '.join(sorted(known))}")

    def names(self) -> list[str]:
        """All keys."""
        return list(self._data)

    def items(self) -> Iterator[tuple[str, object]]:
        """All keys with their values."""
        yield from self._data.items()

    def _get(self, key: str, default: object, kind: type, what: str) -> Any:
        value = self._data.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise LitmusError(self.place(key), f"must be {what}, not {value!r}")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        text: str = self._get(key, default, str, "a string")
        return text

    def number(self, key: str, default: int | None, low: int, high: int) -> int:
        """A number from `low` to `high`; without a default it must be there."""
        if default is None and key not in self._data:
            raise LitmusError(self.place(key), "is missing")
        number: int = self._get(key, default, int, "a number")
        if not low <= number <= high:
            raise LitmusError(self.place(key), f"must be from {low} to {high}, not {number}")
        return number

    def switch(self, key: str, default: bool) -> bool:
        """True or false."""
        value: bool = self._get(key, default, bool, "true or false")
        return value

    def choice(self, key: str, default: str, among: Collection[str]) -> str:
        """One of some words."""
        word = self.text(key, default)
        if word not in among:
            raise LitmusError(self.place(key), f"{word!r} is not one of {', '.join(among)}")
        return word

    def table(self, key: str) -> Table:
        """A table within, empty if it is not there."""
        return Table(self._data.get(key, {}), self.place(key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables, empty if it is not there."""
        tables: list[object] = self._get(key, [], list, f"an array of tables, [[{key}]]")
        return [Table(table, f"{self.place(key)} {number}") for number, table in enumerate(tables)]

    def lines(self, key: str) -> list[str]:
        """The lines of a string or of an array of strings, without comments (from `#` on) and empty ones."""
        value = self._data.get(key, "")
        lines = value.splitlines() if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise LitmusError(
                self.place(key), f"must be a string of lines, or an array of them, not {value!r}"
            )
        stripped = (line.split("#")[0].strip() for line in lines)
        return [line for line in stripped if line]
