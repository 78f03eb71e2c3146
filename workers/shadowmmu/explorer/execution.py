"""Running one execution of a scenario to its end, and saying what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from shadowmmu.checker import Rule, Violation
from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.choosers import Chooser
from shadowmmu.explorer.outcome import Outcome
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.world import StepLimitError, World
from shadowmmu.protocol.events import Event

__all__ = ["Ending", "Failure", "describe", "execute", "failure_of"]


class Failure(msgspec.Struct, frozen=True):
    """What must not happen, and did: a rule that was broken, or the scenario's own condition (`rule` None)."""

    rule: Rule | None
    text: str
    violation: Violation | None = None

    def same_kind(self, other: Failure | None) -> bool:
        """Whether the other is of the same rule, or of the condition too."""
        return other is not None and self.rule is other.rule

    @property
    def kind(self) -> str:
        """`rule 4 (write-protection breach)`, or `condition`."""
        return "condition" if self.rule is None else f"rule {self.rule.value} ({self.rule.title})"


class Ending(msgspec.Struct, frozen=True):
    """How an execution ended: its final state, its failure if it failed, and the schedule that it followed."""

    outcome: Outcome
    failure: Failure | None
    schedule: tuple[Actor, ...]


def failure_of(world: World) -> Failure | None:
    """The failure of an execution that has ended, None if it is as it should be."""
    violation = world.violation
    if violation is not None:
        return Failure(violation.rule, violation.text, violation)
    if world.condition_holds():
        return Failure(None, f"the final state has {world.scenario.forbidden}")
    return None


def describe(world: World) -> Ending:
    """The ending of an execution in which nobody can take a step any more."""
    world.end()
    return Ending(world.outcome(), failure_of(world), tuple(world.schedule))


def execute(
    scenario: Scenario,
    profile: str,
    chooser: Chooser,
    listener: Callable[[Actor, list[Event]], Any] | None = None,
    coverage: PairCoverage | None = None,
) -> Ending:
    """Runs one execution to its end. Raises ScenarioError if the set-up does not come to an end."""
    world = World(scenario, profile, listener, coverage)
    choose = chooser.choose
    try:
        while enabled := world.enabled():
            world.step(choose(enabled))  # also if there is only one: a schedule to be followed names it too
    except StepLimitError as error:
        return Ending(world.outcome(), Failure(Rule.NO_PROGRESS, str(error)), tuple(world.schedule))
    return describe(world)
