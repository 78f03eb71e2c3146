"""Every bug of the catalogue looked for with its own litmus test: found without its fix, and not found with all fixes.

A bug whose absence is equivalent, or of which no observable is known, must not be found; the search that was spent on
it is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import msgspec

from shadowmmu.explorer.library import bug_test
from shadowmmu.explorer.scenario import Expectation, Scenario
from shadowmmu.explorer.search import Budget, Found, Search
from shadowmmu.explorer.shrink import Shrunk, shrink
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.kvm import BASE_PROFILES, FIXES, Finding, FixStatus, Profile

__all__ = [
    "BugHunt",
    "BugResult",
    "buggy_profile",
    "catalogue_slugs",
    "look_for",
    "look_for_all",
    "showing_profile",
]


class BugHunt(msgspec.Struct, frozen=True):
    """What is spent on one bug: seconds until the first hit, seconds on showing that `fixed` has none.

    `effort`: executions that may be spent on making the failure shorter.
    """

    slug: str
    seconds: float
    fixed_seconds: float
    seed: int = 0
    strategy: Strategy = Strategy.PORTFOLIO
    effort: int = 300


class BugResult(msgspec.Struct, frozen=True):
    """What came of it.

    `found` is the first failure without the fix, `fixed_found` the one with all fixes (there must be none);
    `executions` and `seconds` are those up to the hit, or all that were spent. `missing`: there is no litmus test.
    """

    slug: str
    found: Found | None
    executions: int
    seconds: float
    complete: bool
    fixed_found: Found | None
    fixed_executions: int
    shrunk: Shrunk | None = None
    profile: str = ""
    missing: bool = False

    @property
    def expected(self) -> Finding:
        """What the catalogue says."""
        return FIXES[self.slug].finding

    @property
    def too_little_time(self) -> bool:
        """Not found, though it is to be found and not all was seen."""
        return (
            self.found is None and self.expected is Finding.FOUND and not self.complete and not self.missing
        )

    @property
    def as_expected(self) -> bool:
        """Found if it is to be found, and only then; nothing with all fixes."""
        if self.missing:
            return False
        return (self.found is not None) is (self.expected is Finding.FOUND) and self.fixed_found is None


def catalogue_slugs() -> list[str]:
    """The fixes whose bugs are looked for."""
    return [slug for slug, fix in FIXES.items() if fix.status is not FixStatus.ALTERNATIVE]


def buggy_profile(scenario: Scenario) -> str:
    """The profile in which a test shows its bug: the first that it names itself, or all fixes but that one.

    What must not be found is looked for with no other fix missing: beside another bug it may be a real one.
    """
    if FIXES[scenario.bug].finding is not Finding.FOUND:
        return f"fixed-{scenario.bug}"
    return showing_profile(scenario)


def showing_profile(scenario: Scenario) -> str:
    """The first profile without the fix that the test itself names, or all fixes but that one."""
    for profile, expectation in scenario.expect:
        lacks = scenario.bug not in Profile.parse(profile).fixes
        if lacks and expectation is Expectation.SOMETIMES and profile not in BASE_PROFILES:
            return profile
    return f"fixed-{scenario.bug}"


def look_for(hunt: BugHunt, clock: Callable[[], float] = time.monotonic) -> BugResult:
    """Looks for one bug with its litmus test."""
    scenario = bug_test(hunt.slug)
    if scenario is None:
        return BugResult(hunt.slug, None, 0, 0.0, False, None, 0, missing=True)
    profile = buggy_profile(scenario)
    search = Search(scenario, profile, hunt.strategy, hunt.seed, clock)
    search.run(Budget(seconds=hunt.seconds, first=True))
    found = search.first
    shrunk = None
    if found is not None and hunt.effort:
        shrunk = shrink(scenario, profile, found.failure, found.schedule, effort=hunt.effort)
    fixed = _fixed(scenario, hunt, search, clock)
    return BugResult(
        hunt.slug,
        found,
        search.executions if found is None else found.execution,
        search.seconds if found is None else found.seconds,
        search.complete,
        fixed.first,
        fixed.executions,
        shrunk,
        profile,
    )


def _fixed(scenario: Scenario, hunt: BugHunt, search: Search, clock: Callable[[], float]) -> Search:
    fixed = Search(scenario, "fixed", hunt.strategy, hunt.seed, clock)
    fixed.run(Budget(seconds=max(hunt.fixed_seconds, min(search.seconds, hunt.seconds)), first=True))
    return fixed


def look_for_all(hunts: Sequence[BugHunt], jobs: int) -> Iterator[BugResult]:
    """Looks for several bugs in `jobs` processes; results as they come."""
    if jobs == 1:
        yield from map(look_for, hunts)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(look_for, hunt) for hunt in hunts]):
            yield future.result()
