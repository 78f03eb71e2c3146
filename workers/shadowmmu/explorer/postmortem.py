"""What is done about a violation that a recorded run met: a short reproduction, and the bug that explains it.

The stretch of the run before the violation is executed again as a scenario (`journal_window`), longer and longer ones,
until the same rule breaks: instructions in the order of the run, more or less, and what lies between them (walks, host
operations from point to point, kicks) with more and more disorder. That execution is shrunk and attributed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from random import Random
from typing import Final

import msgspec

from shadowmmu.checker import Rule
from shadowmmu.explorer.attribution import Attribution, attribute
from shadowmmu.explorer.execution import Ending, describe
from shadowmmu.explorer.journal_window import Window, journal_window
from shadowmmu.explorer.repro import Repro, make_repro
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.shrink import shrink
from shadowmmu.explorer.world import ScenarioError, World
from shadowmmu.machine import Header, Record

__all__ = ["Postmortem", "Reproduced", "examine", "reproduce"]

WINDOWS: Final = (60, 200, 600, 2000)
"""Messages of vCPUs that are looked at, one length after the other."""
DEGREES: Final = 8
MOST_DISORDER: Final = 0.5
"""The share of steps that others take out of order, at most; it goes up to this in DEGREES steps."""
SHRINK_EFFORT: Final = 400
ATTRIBUTION_RUNS: Final = 20


class Postmortem(msgspec.Struct, frozen=True):
    """A short reproduction of the violation, and what explains it; None where the search did not get there."""

    repro: Repro | None
    attribution: Attribution | None
    executions: int


class Reproduced(msgspec.Struct, frozen=True):
    """An execution in which the rule breaks again, and how many it took to find it; None if none was found."""

    scenario: Scenario
    ending: Ending | None
    executions: int


def examine(
    records: Sequence[Record], rule: Rule, end: int, seconds: float, clock: Callable[[], float]
) -> Postmortem:
    """Looks for a reproduction of the violation of `rule` at record number `end`, for about `seconds`."""
    begin = clock()
    share = [seconds * (1 - 0.5**n) for n in range(1, len(WINDOWS) + 1)]  # each window half of what is left
    found = reproduce(records, rule, end, lambda window, _: clock() - begin < share[window])
    header = records[0]
    assert isinstance(header, Header)
    if found.ending is None:
        return Postmortem(None, None, found.executions)
    return _explain(found.scenario, header.config.profile, found.ending, found.executions)


def reproduce(
    records: Sequence[Record], rule: Rule, end: int, goes_on: Callable[[int, int], bool]
) -> Reproduced:
    """Executes windows before record number `end` until `rule` breaks.

    `goes_on` is asked before each further execution, with the number of the window and of its executions so far.
    """
    header = records[0]
    assert isinstance(header, Header)
    profile = header.config.profile
    executions = 0
    window = journal_window(records, end, WINDOWS[0])
    for number, messages in enumerate(WINDOWS):
        window = journal_window(records, end, messages)
        with suppress(ScenarioError):  # a stretch that cannot be set up: a longer one begins elsewhere
            for done in count():
                if done and not goes_on(number, done):
                    break
                executions += 1
                ending = _in_order(window, profile, done)
                if ending.failure is not None and ending.failure.rule is rule:
                    return Reproduced(window.scenario, ending, executions)
    return Reproduced(window.scenario, None, executions)


def _in_order(window: Window, profile: str, number: int) -> Ending:
    """An execution in the order of the run; in execution `number` others get in between, more and more often."""
    world = World(window.scenario, profile)
    random = Random(number)
    disorder = number % DEGREES / DEGREES * MOST_DISORDER
    for actor in window.order:
        goal = world.executed(actor) + 1
        while world.executed(actor) < goal and (enabled := world.enabled()):
            if actor in enabled and random.random() >= disorder:
                world.step(actor)
            else:
                world.step(random.choice(enabled))
    while enabled := world.enabled():
        world.step(random.choice(enabled))
    return describe(world)


def _explain(scenario: Scenario, profile: str, ending: Ending, executions: int) -> Postmortem:
    assert ending.failure is not None
    shrunk = shrink(scenario, profile, ending.failure, ending.schedule, effort=SHRINK_EFFORT)
    repro = make_repro(shrunk.scenario, profile, shrunk.schedule)
    attribution = attribute(shrunk.scenario, profile, shrunk.failure, shrunk.schedule, runs=ATTRIBUTION_RUNS)
    return Postmortem(repro, attribution, executions + shrunk.executions + attribution.executions)
