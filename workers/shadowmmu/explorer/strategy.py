"""How the schedules of a search are chosen.

| strategy | executions |
| --- | --- |
| exhaustive | all, depth first, with reductions |
| bounded | all with 0 delays, then with 1, 2, ... |
| pct | PCT with 1 to 4 priority changes in turn |
| random | any actor, evenly |
| portfolio | bounded, pct and random in turn |
"""

from __future__ import annotations

import enum

__all__ = ["Strategy"]


class Strategy(enum.Enum):
    """How schedules are chosen."""

    EXHAUSTIVE = "exhaustive"
    BOUNDED = "bounded"
    PCT = "pct"
    RANDOM = "random"
    PORTFOLIO = "portfolio"
