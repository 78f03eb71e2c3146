"""How many executions per second a search makes, on one core."""

from __future__ import annotations

import time

from benchmarks.figures import Figure
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.search import Budget, Search
from shadowmmu.explorer.strategy import Strategy

__all__ = ["executions_per_second"]

SECONDS = 3.0
TEST = "tlbs-dirty-missed-wp"


def executions_per_second(runs: int) -> list[Figure]:
    """Executions per second of PCT, and of the exhaustive search, on one litmus test under `fixed`."""
    return [_figure(strategy, runs) for strategy in (Strategy.PCT, Strategy.EXHAUSTIVE)]


def _figure(strategy: Strategy, runs: int) -> Figure:
    scenario = find_test(TEST)
    values = []
    for seed in range(runs):
        search = Search(scenario, "fixed", strategy, seed, time.perf_counter)
        search.run(Budget(seconds=SECONDS))
        values.append(search.executions / search.seconds)
    return Figure(f"exploration of {TEST}, {strategy.value}", "executions/s, one core", values)
