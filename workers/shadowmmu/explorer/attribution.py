"""Which bug of the catalogue a failure comes from: the scenario is run again with fixes switched in.

Closed loop: programs and processors run again, nothing is played back. Of the `runs` executions of a profile the first
follows the recorded trail as far as it applies, the others follow it for a while and then go on by a seeded PCT
scheduler. A fix *explains* the failure if it recurs without the fix and in none of the runs with it, nor in a small
search (few delays, PCT) that comes after them, while unrelated fixes leave it recurring.

What is found is checked from the other side: under a profile that lacks nothing but the fix, the failure must recur. If
it does not, the bug needs others beside it, and all of them are named. If no single fix prevents the failure but
several together do, each of the bugs is enough for it, and a smallest such set is named.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.choosers import PctChooser
from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.execution import Failure, execute
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.trail import Trail, follow_schedule, follow_trail
from shadowmmu.explorer.world import ScenarioError
from shadowmmu.kvm import FIXES, Profile
from shadowmmu.kvm.fixes import FixStatus
from shadowmmu.kvm.profiles import ALL_FIXES, KernelTree

__all__ = ["DEFAULT_RUNS", "Attribution", "Explanation", "Trial", "attribute", "lacking"]

DEFAULT_RUNS: Final = 40
PCT_DEPTHS: Final = 3
MOST_DELAYS: Final = 2


class Explanation(enum.Enum):
    """How fixes explain a failure."""

    ONE_BUG = "one fix prevents it"
    BUGS_TOGETHER = "each of several fixes prevents it: it takes all these bugs together"
    ANY_OF_SEVERAL = "only several fixes together prevent it: each of these bugs is enough"
    NOT_ATTRIBUTED = "no fixes of the catalogue prevent it"
    NOT_REPRODUCED = "it does not recur"


class Trial(msgspec.Struct, frozen=True):
    """Executions under `profile`, with `fixes` switched in: how many there were, and how many failed likewise.

    With fixes switched in they end at the first failure. `at_once`: the first of them failed, which follows the
    recorded trail.
    """

    profile: str
    fixes: tuple[str, ...]
    failures: int
    runs: int
    at_once: bool


class Attribution(msgspec.Struct, frozen=True):
    """The explanation, the slugs of the fixes that give it, and what was tried, in order.

    Of several fixes those come first with which the recorded trail, as far as it applies, does not lead to the failure.
    """

    explanation: Explanation
    fixes: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def attributed(self) -> bool:
        """Some bug of the catalogue explains the failure."""
        return bool(self.fixes)

    @property
    def executions(self) -> int:
        """How many executions it took."""
        return sum(trial.runs for trial in self.trials)


def lacking(profile: str) -> tuple[str, ...]:
    """The fixes that a profile does not have, alternatives apart, in the catalogue's order."""
    fixes = Profile.parse(profile).fixes
    return tuple(
        slug for slug, fix in FIXES.items() if slug not in fixes and fix.status is not FixStatus.ALTERNATIVE
    )


def attribute(
    scenario: Scenario,
    profile: str,
    failure: Failure,
    schedule: Sequence[Actor],
    *,
    runs: int = DEFAULT_RUNS,
    seed: int = 0,
) -> Attribution:
    """Finds the fixes that explain the failure which `schedule` shows under `profile`.

    Costs about one execution for each unrelated fix that the profile lacks, 2 * `runs` for each that prevents the
    failure. Raises ScenarioError if the set-up does not come to an end under `profile`.
    """
    trail = follow_schedule(scenario, profile, schedule).trail
    return _Attributor(scenario, profile, failure, trail, runs, seed).run()


class _Attributor:
    def __init__(  # noqa: PLR0917 - what an attribution is about
        self, scenario: Scenario, profile: str, failure: Failure, trail: Trail, runs: int, seed: int
    ) -> None:
        self._scenario = scenario
        self._profile = profile
        self._failure = failure
        self._trail = trail
        self._runs = runs
        self._seed = seed
        self._trials: list[Trial] = []

    def run(self) -> Attribution:
        if not self._recurs(self._profile, (), all_runs=True):
            return self._result(Explanation.NOT_REPRODUCED, ())
        candidates = lacking(self._profile)
        alone = tuple(slug for slug in candidates if not self._recurs_with((slug,)))
        if not alone:
            return self._several(candidates)
        if len(alone) == 1 and len(candidates) == 1:
            return self._result(Explanation.ONE_BUG, alone)
        enough = tuple(slug for slug in alone if self._recurs(_only(self._profile, (slug,)), ()))
        if len(enough) == 1 or len(alone) == 1:
            return self._result(Explanation.ONE_BUG, enough or alone)
        return self._result(Explanation.BUGS_TOGETHER, alone)

    def _several(self, candidates: tuple[str, ...]) -> Attribution:
        """No fix prevents it alone: a smallest set that does, if all together do."""
        needed = candidates
        if len(candidates) < 2 or self._recurs_with(candidates):
            return self._result(Explanation.NOT_ATTRIBUTED, ())
        size = len(candidates) // 2
        while size:
            for start in range(0, len(needed), size):
                part = needed[start : start + size]
                rest = tuple(slug for slug in needed if slug not in part)
                if part and rest and not self._recurs_with(rest):
                    needed = rest
                    break
            else:
                size //= 2
        at_once = {trial.fixes for trial in self._trials if trial.at_once}
        needed = tuple(sorted(needed, key=lambda slug: (slug,) in at_once))
        return self._result(Explanation.ANY_OF_SEVERAL, needed)

    def _result(self, explanation: Explanation, fixes: tuple[str, ...]) -> Attribution:
        return Attribution(explanation, fixes, tuple(self._trials))

    # --- executions ----------------------------------------------------------------------------------------------

    def _recurs_with(self, fixes: tuple[str, ...]) -> bool:
        return self._recurs(self._profile + "".join(f"+{slug}" for slug in fixes), fixes)

    def _recurs(self, profile: str, fixes: tuple[str, ...], *, all_runs: bool = False) -> bool:
        """Whether the failure recurs under a profile, which becomes a trial; ends at the first failure if it may."""
        failures = count = 0
        at_once = False
        try:
            for found in self._executions(profile, search=not all_runs):
                count += 1
                failures += self._failure.same_kind(found)
                at_once = at_once or failures == count == 1
                if failures and not all_runs:
                    break
        except ScenarioError:
            pass  # with the fix the set-up cannot come to its end: it does not fail either
        self._trials.append(Trial(profile, fixes, failures, count, at_once))
        return failures > 0

    def _executions(self, profile: str, *, search: bool) -> Iterator[Failure | None]:
        """The failures of executions near the trail and, with `search`, of as many anywhere."""
        scenario, trail = self._scenario, self._trail
        yield follow_trail(scenario, profile, trail).ending.failure
        chance = random.Random(self._seed)
        length = max(len(trail), 1)
        for turn in range(1, self._runs):
            begin = trail[: chance.randrange(length)]
            pct = PctChooser(self._seed << 32 | turn, 1 + turn % PCT_DEPTHS, length - len(begin))
            yield follow_trail(scenario, profile, begin, pct).ending.failure
        if search:
            yield from self._search(profile, length)

    def _search(self, profile: str, length: int) -> Iterator[Failure | None]:
        each = max(self._runs // (2 * (MOST_DELAYS + 1)), 1)
        for delays in range(MOST_DELAYS + 1):
            bounded = DepthFirst(self._scenario, profile, delays)
            for _ in range(each):
                if bounded.complete:
                    break
                ending = bounded.next()
                yield None if ending is None else ending.failure
        for turn in range(self._runs // 2):
            pct = PctChooser(self._seed << 32 | self._runs + turn, 1 + turn % PCT_DEPTHS, length)
            yield execute(self._scenario, profile, pct).failure


def _only(profile: str, slugs: Iterable[str]) -> str:
    """The profile of the same kernel that lacks nothing but these fixes."""
    pre_patch = Profile.parse(profile).kernel is KernelTree.PRE_PATCH
    base = f"{KernelTree.PRE_PATCH.value}+{ALL_FIXES}" if pre_patch else ALL_FIXES
    return base + "".join(f"-{slug}" for slug in slugs)
