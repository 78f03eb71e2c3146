"""The campaigns: searches by strategy and hunts by seed, each from one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowmmu.experiments.analyses.strategies import analyse
from shadowmmu.experiments.design import check_points
from shadowmmu.experiments.spec import load_spec
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("strategies")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def row(strategy: str, first: int | None, replicate: int = 0) -> dict[str, object]:
    return {
        "test": "bug",
        "strategy": strategy,
        "replicate": replicate,
        "executions": 600,
        "executions_made": 600 if first is None else first,
        "found": first is not None,
        "first_execution": first,
    }


def test_bounded_search_finds_the_first_bug() -> None:
    said = analyse(few_runs(SPEC, [0]))
    assert said.answer.startswith("bounded found each bug from every seed")
    [(_, medians)] = said.tables
    assert medians.select("found", "seeds").rows() == [(1, 1)]


def test_a_median_is_missing_where_half_of_the_seeds_found_nothing() -> None:
    said = analyse(
        table_of([row("pct", 5, 0), row("pct", None, 1), row("bounded", 36, 0), row("bounded", 36, 1)])
    )
    [(_, medians)] = said.tables
    assert medians.select("strategy", "found", "median").rows() == [("pct", 1, None), ("bounded", 2, 36.0)]
    assert said.answer.startswith(
        "bounded found each bug from every seed; in the fewest executions (median): `bug` bounded"
    )


def test_bugs_that_nobody_found_are_named() -> None:
    said = analyse(table_of([row("pct", None), row("bounded", None)]))
    assert said.answer.startswith("No strategy found every bug from every seed")
    assert "`bug` none within 600" in said.answer


@pytest.mark.parametrize("name", ["hunt-seeds.toml"])
def test_examples_can_be_run(name: str) -> None:
    spec = load_spec(EXAMPLES / name)
    check_points(spec, name)
    assert few_runs(spec, [0], scenarios=1)["scenarios_made"].to_list() == [1]
