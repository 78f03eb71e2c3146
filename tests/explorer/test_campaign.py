"""Searches in processes find what they would find alone, and end when they are told to."""

from __future__ import annotations

from shadowmmu.explorer.campaign import SearchSpec, merge, run_all, run_search
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.search import Budget
from shadowmmu.explorer.strategy import Strategy


def _specs(budget: Budget) -> list[SearchSpec]:
    test = find_test("notifier-retry")
    return [SearchSpec(test, "fixed-notifier-retry", Strategy.PCT, seed, budget) for seed in (3, 4)]


def test_processes_find_what_is_found_alone() -> None:
    specs = _specs(Budget(executions=40))
    counts: list[int] = []

    def note(executions: int) -> bool:
        counts.append(executions)
        return True

    together = run_all(specs, 2, note)
    alone = [run_search(spec) for spec in specs]
    assert [(r.seed, r.digest, r.executions) for r in together] == [(r.seed, r.digest, 40) for r in alone]
    assert merge(together).executions == 80
    assert counts == sorted(counts)


def test_searches_end_when_they_are_told_to() -> None:
    reports = run_all(_specs(Budget(executions=1 << 40)), 2, lambda executions: executions < 20)
    assert 20 <= merge(reports).executions < 1 << 20
