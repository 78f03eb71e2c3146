"""What comparisons of all kinds have: names for both sides, settings that differ, counters side by side. Pure.

Counts of runs of different lengths are compared per 1,000 guest instructions. Peaks and levels (`.highest`, `.max`,
`.current`) are no counts, so they have no rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.reports.charts import Bar, ratios, to_spec
from shadowmmu.reports.page import (
    Absent,
    Column,
    Figure,
    Paragraph,
    Part,
    Table,
    code,
    number,
    ratio,
    shown,
)

__all__ = ["Names", "counters_side_by_side", "differences"]

_NO_RATE: Final = (".highest", ".max", ".current")
_SHOWN: Final = 20
"""Bars of the chart of differences."""
_LEAST_COUNT: Final = 20
"""Counters below this in both runs are left out of the chart: their ratio is chance."""
_LEAST_RATIO: Final = 1.05


class Names(msgspec.Struct, frozen=True):
    """What the two sides are called on the page; never the same."""

    this: str
    other: str

    @classmethod
    def of(cls, this: Path, other: Path) -> Names:
        """The last parts of the folders' paths, as many as tell them apart."""
        first, second = this.resolve().parts, other.resolve().parts
        for length in range(1, max(len(first), len(second)) + 1):
            names = "/".join(first[-length:]), "/".join(second[-length:])
            if names[0] != names[1]:
                return cls(*names)
        return cls(f"{this.resolve().name} (first)", f"{other.resolve().name} (second)")


def differences(first: Mapping[str, object], second: Mapping[str, object], names: Names) -> list[Part]:
    """Named settings that are not the same on both sides; one that a side does not have is shown as "-"."""
    rows = [
        [code(name), shown(first.get(name)), shown(second.get(name))]
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name)
    ]
    if not rows:
        return [Paragraph("Their configurations are the same.")]
    columns = [Column("what"), Column(names.this), Column(names.other)]
    return [Table(caption="Differences of the configurations", columns=columns, rows=rows)]


class _Pair(msgspec.Struct, frozen=True):
    """A counter of both runs, and its rates per 1,000 instructions."""

    name: str
    counts: tuple[int, int]
    rates: tuple[float | None, float | None]

    @property
    def ratio(self) -> float | None:
        """Of the rates, or of the counts where there are none; None where it would be divided by 0."""
        first, second = self.rates if None not in self.rates else self.counts
        if first is None or not second:
            return None
        return first / second


def _pairs(this: Mapping[str, int], other: Mapping[str, int]) -> list[_Pair]:
    both = this, other
    pairs = []
    for name in sorted(this.keys() | other.keys()):
        counts = both[0].get(name, 0), both[1].get(name, 0)
        rates = tuple(
            None
            if name.endswith(_NO_RATE) or not one.get("vcpu.instructions")
            else 1000 * n / one["vcpu.instructions"]
            for one, n in zip(both, counts, strict=True)
        )
        pairs.append(_Pair(name, counts, (rates[0], rates[1])))
    return pairs


def counters_side_by_side(this: Mapping[str, int], other: Mapping[str, int], names: Names) -> list[Part]:
    """The largest differences of rates as a chart, and all counters of both as a table."""
    pairs = _pairs(this, other)
    if not pairs:
        return [Absent("Neither run has counters.")]
    parts: list[Part] = []
    chosen = _largest_differences(pairs)
    if chosen:
        title = f"Largest differences: rate in {names.this} / rate in {names.other}"
        values = [Bar(pair.name, value) for pair, value in chosen]
        chart = ratios(values, "ratio of the rates", f"more in {names.this}", f"less in {names.this}")
        spec = to_spec(chart, title)
        caption = f"Counters that reached {_LEAST_COUNT} in one of the runs, without the counters of points."
        parts.append(Figure(title=title, spec=spec, caption=caption, wide=True))
    else:
        parts.append(
            Absent("No plot of differences: no frequent counter has a rate that differs by more than 5 %.")
        )
    columns = [
        Column("counter"),
        Column(names.this, number=True),
        Column(names.other, number=True),
        Column(f"{names.this}, per 1,000 instr.", number=True),
        Column(f"{names.other}, per 1,000 instr.", number=True),
        Column("ratio", number=True),
    ]
    rows = [
        [
            code(pair.name),
            *map(number, pair.counts),
            *(number(rate, 3) for rate in pair.rates),
            ratio(pair.ratio),
        ]
        for pair in pairs
    ]
    caption = "Counters side by side (ratio: of the rates; of levels and peaks, of the values)"
    parts.append(Table(caption=caption, columns=columns, rows=rows, search=True, folded=True))
    return parts


def _largest_differences(pairs: list[_Pair]) -> list[tuple[_Pair, float]]:
    found = []
    for pair in pairs:
        value = pair.ratio
        if value is None or value <= 0 or max(pair.counts) < _LEAST_COUNT or pair.name.startswith("point."):
            continue
        distance = abs(math.log(value))
        if distance >= math.log(_LEAST_RATIO):
            found.append((distance, pair, value))
    found.sort(key=lambda one: (-one[0], one[1].name))
    return [(pair, value) for _, pair, value in found[:_SHOWN]]
