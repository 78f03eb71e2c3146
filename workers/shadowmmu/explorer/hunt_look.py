"""One scenario of a hunt: executed some dozens of times, and its failure is traced to a cause.

Plain data in and out, so that it can be done in any process: what comes out depends on what goes in alone.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import random
import re
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from shadowmmu.checker import Rule
from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.attribution import attribute
from shadowmmu.explorer.choosers import Chooser, FollowChooser, PctChooser, RandomChooser
from shadowmmu.explorer.execution import Ending, Failure, describe, execute
from shadowmmu.explorer.generate import generate
from shadowmmu.explorer.hunt_chooser import ActorPctChooser, PlacePctChooser, Stop, StopCounter, place_of
from shadowmmu.explorer.hunt_run import execute_run
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.scenario import HostStep, Scenario
from shadowmmu.explorer.shrink import ShrinkError, shrink
from shadowmmu.explorer.trail import Trail, follow_schedule, follow_trail
from shadowmmu.explorer.world import ScenarioError, StepLimitError, World
from shadowmmu.protocol import messages as m

__all__ = ["Caught", "Cause", "CauseKind", "Look", "Looked", "Quarry", "Smaller", "look_at", "make_smaller"]

EXECUTIONS: Final = 16
"""Executions of a scenario that shows nothing new."""
MOST_EXECUTIONS: Final = 64
"""Executions of one that goes on showing new pairs of points."""
PCT_DEPTHS: Final = 4
RANDOM_EVERY: Final = 8
PCT_EVERY: Final = 5
PLACE_CHANGES: Final = 3
RUN_PERIOD: Final = 60
"""Of so many scenarios ..."""
RUNS_AT_ONCE: Final = 2
"""... the last are long runs of a workload."""
LAST_STEPS: Final = 320
"""Steps in which an access has faulted for ever, at most."""
FAIR_RUNS: Final = 3
RUNS: Final = 24
"""Executions by which a fix shows that it prevents a failure."""
FIRST_EFFORT: Final = 150
"""Executions that make a failure smaller before its cause is looked for."""
SHRINK_EFFORT: Final = 800

PAIR_BITS: Final = 1 << 13
"""Pairs of points are remembered by this many bits; few of them share one."""
_NUMERAL: Final = re.compile(r"\b(0x[0-9a-f]+|\d+)(th|st|nd|rd)?\b")


class CauseKind(enum.Enum):
    """What explains a failure."""

    FIXES = "fixes"  # these fixes of the catalogue, together, prevent it
    DEVICE_STORE = (
        "device store"  # it takes a host that stores to the guest's tables, of which KVM is not told
    )
    UNKNOWN = "not attributed"
    CRASH = "crash"  # the program itself failed


class Cause(msgspec.Struct, frozen=True):
    """What explains a failure; `detail` tells those apart that nothing explains."""

    kind: CauseKind
    fixes: tuple[str, ...] = ()
    detail: str = ""


class Look(msgspec.Struct, frozen=True):
    """Scenario `number` of a hunt, that of `seed`, is to be executed under `profile`.

    `known` has a bit for each pair of points (`pairs`) that was seen before, as a hexadecimal number; `often` are
    unexplained causes that were met often enough, and are passed over.
    """

    number: int
    seed: int
    profile: str
    known: str = "0"
    often: tuple[Cause, ...] = ()


class Caught(msgspec.Struct, frozen=True):
    """A failure, made smaller a little, with its cause: the scenario, the profile and the schedule that show it."""

    scenario: Scenario
    profile: str
    schedule: tuple[Actor, ...]
    rule: Rule | None
    text: str
    cause: Cause

    @property
    def failure(self) -> Failure:
        """The failure, without the violation's details."""
        return Failure(self.rule, self.text)


class Looked(msgspec.Struct, frozen=True):
    """What came of it: how many executions there were, a bit for each pair of points seen, and the first failure."""

    number: int
    seed: int
    executions: int
    pairs: str
    caught: Caught | None = None


def look_at(look: Look) -> Looked:
    """Executes a small guest, more often if it shows something new, until it fails; or a long run, once."""
    is_run = look.number % RUN_PERIOD >= RUN_PERIOD - RUNS_AT_ONCE
    try:
        return _look_at_run(look) if is_run else _look_at_guest(look)
    except Exception:  # noqa: BLE001 - whatever fails in a process of its own has to be told
        text = traceback.format_exc(limit=-4)
        cause = Cause(CauseKind.CRASH, detail=text.rstrip().rpartition("\n")[2])
        crash = Caught(generate(look.seed), look.profile, (), None, text, cause)
        return Looked(look.number, look.seed, 1, "0", crash)


def _look_at_run(look: Look) -> Looked:
    ran = execute_run(look.seed, look.profile)
    caught = None
    if ran.scenario is not None and ran.failure is not None:
        caught = _catch(look, ran.scenario, ran.failure, ran.schedule)
    return Looked(look.number, look.seed, ran.executions, "0", caught)


def _look_at_guest(look: Look) -> Looked:
    coverage = PairCoverage()
    known = int(look.known, 16)
    executions, wanted = 0, EXECUTIONS
    steps: Counter[Actor] = Counter()
    stops: Counter[Stop] = Counter()
    caught = None
    scenario = generate(look.seed)
    try:
        while executions < wanted and caught is None:
            world = World(scenario, look.profile, coverage=coverage)
            place = functools.partial(place_of, world)
            chooser = StopCounter(_chooser(look.seed, executions, steps, stops, place), place)
            ending = _finish(world, chooser)
            executions += 1
            steps |= Counter(ending.schedule)
            stops |= chooser.stood
            if ending.failure is not None:
                caught = _catch(look, scenario, ending.failure, ending.schedule)
            seen = _bits(coverage)
            if seen & ~known:
                known |= seen
                wanted = min(executions + EXECUTIONS, MOST_EXECUTIONS)
    except ScenarioError:
        pass  # a guest that cannot even be set up shows nothing
    return Looked(look.number, look.seed, executions, f"{_bits(coverage):x}", caught)


def _finish(world: World, chooser: Chooser) -> Ending:
    """Runs an execution to its end, as `execute` does; of one that has begun a chooser can see where actors stand."""
    try:
        while enabled := world.enabled():
            world.step(chooser.choose(enabled))
    except StepLimitError as error:
        return Ending(world.outcome(), Failure(Rule.NO_PROGRESS, str(error)), tuple(world.schedule))
    return describe(world)


def _chooser(
    seed: int,
    execution: int,
    steps: Mapping[Actor, int],
    stops: Mapping[Stop, int],
    place: Callable[[Actor], str],
) -> Chooser:
    """Nobody interrupted first, then PCT of several kinds and depths, and now and then no priorities at all.

    `steps` and `stops` are what was met until now: of each actor, and where it stood.
    """
    number = seed << 16 | execution
    if not steps:
        return FollowChooser(())
    if execution % RANDOM_EVERY == 0:
        return RandomChooser(number)
    if execution % PCT_EVERY == 0:
        return PctChooser(number, 1 + execution % PCT_DEPTHS, sum(steps.values()))
    if execution % 2:
        return PlacePctChooser(number, 1 + execution // 2 % PLACE_CHANGES, stops, place)
    return ActorPctChooser(number, (execution + 1) % PCT_DEPTHS, steps)


def _bits(coverage: PairCoverage) -> int:
    bits = 0
    for standing, going in coverage.pairs:
        bits |= 1 << zlib.crc32(f"{standing} {going}".encode()) % PAIR_BITS
    return bits


# --- causes ----------------------------------------------------------------------------------------------------------


def _catch(look: Look, scenario: Scenario, failure: Failure, schedule: tuple[Actor, ...]) -> Caught | None:
    """The failure with its cause; None if it is none, or one that needs no more examples.

    Causes are looked for in a smaller scenario: in a large one other things go wrong as well.
    """
    profile = look.profile
    if _is_starvation(scenario, profile, failure, schedule):
        return None
    with contextlib.suppress(ShrinkError):
        shrunk = shrink(scenario, profile, failure, schedule, effort=FIRST_EFFORT)
        scenario, failure, schedule = shrunk.scenario, shrunk.failure, shrunk.schedule
    unexplained = Cause(CauseKind.UNKNOWN, detail=_detail(scenario, profile, failure, schedule))
    if unexplained in look.often:
        return None
    trail = follow_schedule(scenario, profile, schedule).trail
    if _needs_device_stores(scenario, profile, failure, trail):
        cause = Cause(CauseKind.DEVICE_STORE)
    elif _recurs(scenario, "fixed", failure, trail):
        cause = unexplained
    else:
        attribution = attribute(scenario, profile, failure, schedule, runs=RUNS)
        cause = Cause(CauseKind.FIXES, attribution.fixes) if attribution.attributed else unexplained
    return Caught(scenario, profile, schedule, failure.rule, failure.text, cause)


def _is_starvation(scenario: Scenario, profile: str, failure: Failure, schedule: tuple[Actor, ...]) -> bool:
    """Whether an access faults for ever only because somebody never gets a turn: a fair scheduler lets it go on."""
    if failure.rule is not Rule.NO_PROGRESS:
        return False
    begin = schedule[: max(len(schedule) - LAST_STEPS, 0)]
    return not all(
        failure.same_kind(execute(scenario, profile, FollowChooser(begin, RandomChooser(turn))).failure)
        for turn in range(FAIR_RUNS)
    )


def _recurs(scenario: Scenario, profile: str, failure: Failure, trail: Trail) -> bool:
    """Whether the same access, or a failure of the same kind that is no access's, is met near the trail."""
    chance = random.Random(0)
    for turn in range(RUNS):
        begin = trail if turn == 0 else trail[: chance.randint(len(trail) // 2, len(trail))]
        pct = PctChooser(turn, 1 + turn % PCT_DEPTHS, len(trail) - len(begin))
        found = follow_trail(scenario, profile, begin, pct).ending.failure
        if found is not None and failure.same_kind(found) and _page(found) == _page(failure):
            return True
    return False


def _page(failure: Failure) -> tuple[int, int] | None:
    """Whose access to which page was at fault."""
    access = None if failure.violation is None else failure.violation.access
    return None if access is None else (access.vcpu, access.gva >> 12)


def _needs_device_stores(scenario: Scenario, profile: str, failure: Failure, trail: Trail) -> bool:
    """Whether the failure is gone with the host's stores to guest memory: the control for what KVM is not told of."""
    hosts = tuple(tuple(step for step in host if not _is_device_store(step)) for host in scenario.hosts)
    if hosts == scenario.hosts:
        return False
    without = msgspec.structs.replace(scenario, hosts=hosts)
    # With all fixes too: what takes a bug as well is the bug's.
    return not _recurs(without, profile, failure, trail) and _recurs(scenario, "fixed", failure, trail)


def _is_device_store(step: HostStep) -> bool:
    return isinstance(step.operation, m.WritePhys)


def _detail(scenario: Scenario, profile: str, failure: Failure, schedule: tuple[Actor, ...]) -> str:
    """A failure in words without its numbers: whom it blames, or for a broken structure what is broken.

    And where others stood meanwhile: that is where the race is.
    """
    violation = failure.violation
    text = failure.text if violation is None or failure.rule is Rule.BROKEN_STRUCTURE else violation.blame
    world = World(scenario, profile)
    for actor in schedule:
        world.step(actor)
    points = {task.point.name for task in world.machine.tasks() if task.point is not None}
    return _NUMERAL.sub("#", f"{text} (meanwhile at {', '.join(sorted(points))})" if points else text)


# --- shrinking -------------------------------------------------------------------------------------------------------


class Quarry(msgspec.Struct, frozen=True):
    """A failure to be made smaller: that of finding `number`."""

    number: int
    caught: Caught


class Smaller(msgspec.Struct, frozen=True):
    """The smallest scenario that was found for it, and what shows the failure in it."""

    number: int
    scenario: Scenario
    profile: str
    schedule: tuple[Actor, ...]


def make_smaller(quarry: Quarry) -> Smaller:
    """Shrinks a failure further, if possible under a profile that has no other bug than its cause."""
    caught = quarry.caught
    scenario = caught.scenario
    fixed = "fixed" + "".join(f"-{slug}" for slug in caught.cause.fixes)
    profiles = (fixed, caught.profile)
    for profile in dict.fromkeys(profiles):
        try:
            shrunk = shrink(scenario, profile, caught.failure, caught.schedule, effort=SHRINK_EFFORT)
        except (ShrinkError, ScenarioError):
            continue
        trail = follow_schedule(shrunk.scenario, profile, shrunk.schedule).trail
        if caught.cause.fixes and _recurs(shrunk.scenario, "fixed", shrunk.failure, trail):
            continue  # it has slipped to another cause
        return Smaller(quarry.number, shrunk.scenario, profile, shrunk.schedule)
    return Smaller(quarry.number, scenario, caught.profile, caught.schedule)
