"""How figures are taken and printed."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "print_figures"]


class Figure(msgspec.Struct, frozen=True):
    """Some measurements of one thing: `values` in `unit`, and what was aimed at."""

    name: str
    unit: str
    values: Sequence[float]
    aim: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_figures(figures: Sequence[Figure]) -> None:
    """A table: median, least and most of each figure, and its aim."""
    table = Table(
        title=f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    )
    table.add_column("figure")
    for column in ("median", "min", "max", "aim"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for figure in figures:
        aim = "" if figure.aim is None else _number(figure.aim)
        table.add_row(
            figure.name,
            _number(figure.median),
            _number(min(figure.values)),
            _number(max(figure.values)),
            aim,
            figure.unit,
        )
    Console(width=120).print(table)
