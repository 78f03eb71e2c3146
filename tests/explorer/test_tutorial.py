"""docs/TUTORIAL.md: its litmus test shows what the page says."""

import re
from pathlib import Path

import pytest

from shadowmmu.checker import Rule
from shadowmmu.explorer.attribution import attribute
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.search import Budget, Found, Search
from shadowmmu.explorer.strategy import Strategy

PAGE = (Path(__file__).parents[2] / "docs" / "TUTORIAL.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    listing = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert listing is not None
    return parse_litmus(listing[1], "lost")


def searched(scenario: Scenario, profile: str) -> Search:
    search = Search(scenario, profile, Strategy.EXHAUSTIVE, 0, lambda: 0.0)
    search.run(Budget(executions=2000))
    assert search.complete
    return search


@pytest.fixture(scope="module")
def found(scenario: Scenario) -> Found:
    found = searched(scenario, "linux-3.1").first
    assert found is not None
    return found


def test_the_exhaustive_search_ends_with_rule_4(found: Found) -> None:
    assert found.failure.rule is Rule.WRITE_PROTECTION_BREACH


def test_the_fix_of_2021_explains_it(scenario: Scenario, found: Found) -> None:
    attribution = attribute(scenario, "linux-3.1", found.failure, found.schedule, runs=10)
    assert attribution.fixes == ("tlbs-dirty-missed-wp",)


def test_nothing_is_left_with_all_fixes(scenario: Scenario) -> None:
    assert not searched(scenario, "fixed").found
