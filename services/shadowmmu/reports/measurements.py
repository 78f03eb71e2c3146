"""What several pages show of a run: its counters, its distributions alone or over those of another run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shadowmmu.reports.charts import density, percentiles, to_spec
from shadowmmu.reports.distributions import Distribution, DistributionError, decode_distribution
from shadowmmu.reports.page import Absent, Figure, Part, Table, code, number, table

__all__ = ["counter_table", "distribution_figures", "quantity"]

_UNITS = {"us": "microseconds", "steps": "scheduler steps", "cycles": "cycles", "seconds": "seconds"}


def counter_table(counters: Mapping[str, int]) -> Table:
    """All counters by name, each also per 1,000 guest instructions."""
    instructions = counters.get("vcpu.instructions", 0)
    rows = [
        [code(name), number(value), number(1000 * value / instructions if instructions else None, 3)]
        for name, value in sorted(counters.items())
    ]
    columns = ["counter", "value", "per 1,000 instructions"]
    return table("All counters", columns, rows, numbers=(1, 2), search=True, folded=True)


def quantity(name: str) -> str:
    """A histogram's name in words, with its unit: `lock_wait_steps` is "lock wait, scheduler steps"."""
    words, _, unit = name.rpartition("_")
    if not words or unit not in _UNITS:
        return name.replace("_", " ")
    return f"{words.replace('_', ' ')}, {_UNITS[unit]}"


def distribution_figures(name: str, encoded: Sequence[tuple[str, str]]) -> list[Part]:
    """The figures of a histogram that several runs have: (name of the run, HdrHistogram in base64) pairs."""
    parts: list[Part] = []
    curves: list[tuple[str, Distribution]] = []
    for run, one in encoded:
        try:
            distribution = decode_distribution(one)
        except DistributionError as error:
            parts.append(Absent(f"{name} of {run}: {error}."))
            continue
        if distribution.count:
            curves.append((run, distribution))
        else:
            parts.append(Absent(f"{name} of {run} is empty: nothing of the kind happened."))
    if curves:
        what = quantity(name)
        titles = f"{what}: percentiles", f"{what}: distribution"
        parts.append(Figure(title=titles[0], spec=to_spec(percentiles(curves, what), titles[0])))
        parts.append(Figure(title=titles[1], spec=to_spec(density(curves, what), titles[1])))
    return parts
