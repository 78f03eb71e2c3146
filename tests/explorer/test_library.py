"""The litmus tests that come with the program say what happens, as far as a short search can tell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.library import LIBRARY, library_files
from shadowmmu.explorer.litmus import load_litmus
from shadowmmu.explorer.outcome import holds, parse_condition
from shadowmmu.explorer.scenario import Expectation, Scenario
from shadowmmu.explorer.search import Budget, Search
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.kvm import FIXES

FILES = library_files()
NAMES = [path.stem for path in FILES]
CLASSIC = sorted((LIBRARY / "classic").glob("*.toml"))
"""Small enough for the exhaustive search; the others may be larger."""

NEVER_EXECUTIONS = 12
SOMETIMES_EXECUTIONS = 300
EXHAUSTIVE_EXECUTIONS = 150


def search(scenario: Scenario, profile: str, strategy: Strategy, executions: int) -> Search:
    search = Search(scenario, profile, strategy, 1, time.monotonic)
    search.run(Budget(executions=executions, first=True))
    return search


def profiles(scenario: Scenario, expectation: Expectation) -> list[str]:
    return [profile for profile, expected in scenario.expect if expected is expectation]


def test_there_are_tests_of_both_kinds() -> None:
    assert {path.parent.name for path in FILES} == {"bugs", "classic"}
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_what_it_is_about_and_what_is_expected(path: Path) -> None:
    scenario = load_litmus(path)
    assert scenario.title and scenario.text
    assert scenario.forbidden or scenario.exists or scenario.bug
    assert dict(scenario.expect)["fixed"] is Expectation.NEVER
    if path.parent.name == "bugs":
        assert path.stem in FIXES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_is_never_expected_is_not_found(path: Path) -> None:
    scenario = load_litmus(path)
    for profile in profiles(scenario, Expectation.NEVER):
        found = search(scenario, profile, Strategy.PORTFOLIO, NEVER_EXECUTIONS).first
        assert found is None, (profile, found)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_is_sometimes_expected_is_found(path: Path) -> None:
    scenario = load_litmus(path)
    for profile in profiles(scenario, Expectation.SOMETIMES):
        strategies = (Strategy.PORTFOLIO, Strategy.EXHAUSTIVE)
        searches = (search(scenario, profile, strategy, SOMETIMES_EXECUTIONS) for strategy in strategies)
        assert any(search.found for search in searches), profile


@pytest.mark.parametrize("path", CLASSIC, ids=[path.stem for path in CLASSIC])
def test_what_is_legal_is_seen_and_what_is_not_is_nowhere(path: Path) -> None:
    scenario = load_litmus(path)
    exists = parse_condition(scenario.exists) if scenario.exists else None
    seen = exists is None
    source = DepthFirst(scenario, "fixed")
    while not source.complete and source.executions < EXHAUSTIVE_EXECUTIONS:
        ending = source.next()
        if ending is None:
            continue
        assert ending.failure is None, ending
        seen = seen or (exists is not None and holds(exists, dict(ending.outcome)))
    if source.complete:
        assert seen
