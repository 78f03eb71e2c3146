"""The figures that several pages have: distributions, alone or of two runs one over the other. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shadowmmu.reports.charts import density, percentiles, to_spec
from shadowmmu.reports.distributions import Distribution, DistributionError, decode_distribution
from shadowmmu.reports.page import Absent, Figure, Part

__all__ = ["distribution_figures", "quantity"]

_UNITS = {"us": "microseconds", "steps": "scheduler steps", "cycles": "cycles", "seconds": "seconds"}


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
