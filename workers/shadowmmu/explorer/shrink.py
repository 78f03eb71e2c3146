"""Makes a failing execution smaller: fewer operations, then a smaller machine, then a schedule with fewer switches.

Delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input", IEEE TSE 2002) over the
operations of programs, host threads and set-up. A candidate counts as failing if its failure is of the same kind when
the trail known so far is followed as far as it applies; later, when little is left, also if a small search finds one.
Effort is counted in executions, and every random choice is seeded, so the same input gives the same result.

A smaller scenario may fail by another bug than the one that was met, if the profile has several: shrinking under a
profile that lacks nothing but the fix in question (`fixed-SLUG`) cannot slip like that.
"""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, TypeVar

import msgspec

from shadowmmu.explorer.actors import KIND, Actor, number
from shadowmmu.explorer.choosers import PctChooser
from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.execution import Failure
from shadowmmu.explorer.scenario import HostStep, Scenario, SendIpi, Step
from shadowmmu.explorer.trail import HANDLER, Followed, Place, Trail, follow_schedule, follow_trail
from shadowmmu.explorer.world import ScenarioError
from shadowmmu.protocol import messages as m

__all__ = ["DEFAULT_EFFORT", "ShrinkError", "Shrunk", "shrink", "switches"]

DEFAULT_EFFORT: Final = 1500
SEARCH_PER_CANDIDATE: Final = 200
"""Most executions that one candidate is searched for a failure."""
MOST_DELAYS: Final = 3

T = TypeVar("T")


class ShrinkError(ValueError):
    """The schedule does not show the failure, so there is nothing to make smaller."""


class Shrunk(msgspec.Struct, frozen=True):
    """The smallest scenario, schedule and failure that were found, after so many executions."""

    scenario: Scenario
    schedule: tuple[Actor, ...]
    failure: Failure
    executions: int

    @property
    def switches(self) -> int:
        """How often the schedule goes from one actor to another."""
        return switches(self.schedule)


def switches(schedule: Sequence[Actor]) -> int:
    """How often a schedule goes from one actor to another."""
    return sum(a != b for a, b in pairwise(schedule))


def shrink(
    scenario: Scenario,
    profile: str,
    failure: Failure,
    schedule: Sequence[Actor],
    *,
    effort: int = DEFAULT_EFFORT,
    seed: int = 0,
) -> Shrunk:
    """Makes the failing execution smaller, by at most `effort` further executions.

    Raises ShrinkError if the schedule does not show a failure of the same kind.
    """
    first = follow_schedule(scenario, profile, schedule)
    if first.ending.failure is None or not failure.same_kind(first.ending.failure):
        raise ShrinkError(f"{scenario.name}: the schedule does not lead to {failure.kind}")
    if failure.rule is not None and scenario.forbidden:
        scenario = msgspec.structs.replace(scenario, forbidden="", expect=())
    shrinker = _Shrinker(scenario, profile, first, effort, seed)
    shrinker.run()
    return shrinker.result()


class _Section(enum.Enum):
    SETUP = "setup"
    PROGRAM = "programs"
    HANDLER = "handlers"
    HOST = "hosts"


class _Part(msgspec.Struct, frozen=True):
    """An operation that may be dropped: of which section, of which vCPU or host thread there, and its number."""

    section: _Section
    owner: int
    index: int


def _parts(scenario: Scenario) -> list[_Part]:
    """Every operation that may be dropped, set-up first."""
    kept = set(re.findall(r"v(\d+):(r\d+)", scenario.forbidden))

    def parts(section: _Section, owner: int, steps: Iterable[tuple[int, Step | HostStep]]) -> Iterator[_Part]:
        for index, (vcpu, step) in enumerate(steps):
            # Without the step that loads a register of the condition, the condition would mean nothing.
            if isinstance(step, HostStep) or (str(vcpu), step.into) not in kept:
                yield _Part(section, owner, index)

    found = list(parts(_Section.SETUP, 0, ((setup.vcpu, setup.step) for setup in scenario.setup)))
    for section, programs in ((_Section.PROGRAM, scenario.programs), (_Section.HANDLER, scenario.handlers)):
        for vcpu, program in enumerate(programs):
            found += parts(section, vcpu, ((vcpu, step) for step in program))
    for host, steps in enumerate(scenario.hosts):
        found += parts(_Section.HOST, host, ((-1, step) for step in steps))
    return found


def _without(scenario: Scenario, dropped: set[_Part]) -> Scenario:
    def keep(section: _Section, owner: int, steps: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(step for i, step in enumerate(steps) if _Part(section, owner, i) not in dropped)

    handlers = tuple(keep(_Section.HANDLER, n, steps) for n, steps in enumerate(scenario.handlers))
    return msgspec.structs.replace(
        scenario,
        setup=keep(_Section.SETUP, 0, scenario.setup),
        programs=tuple(keep(_Section.PROGRAM, n, steps) for n, steps in enumerate(scenario.programs)),
        handlers=handlers if any(handlers) else (),
        hosts=tuple(keep(_Section.HOST, n, steps) for n, steps in enumerate(scenario.hosts)),
    )


def _part_of(place: Place) -> _Part | None:
    """The operation that the actor was in."""
    match place.actor // KIND:
        case 0:
            section = _Section.HANDLER if place.in_handler else _Section.PROGRAM
        case 2:
            section = _Section.HOST
        case _:
            return None
    return _Part(section, number(place.actor), place.position % HANDLER)


def _trail_without(trail: Trail, dropped: set[_Part]) -> Trail:
    """The trail without the steps of dropped operations; the later ones of their program move up."""
    places = []
    up: dict[_Part, int] = {}
    for place in trail:
        part = _part_of(place)
        if part is None:
            places.append(place)
        elif part not in dropped:
            if part not in up:
                up[part] = sum(
                    (other.section, other.owner) == (part.section, part.owner) and other.index < part.index
                    for other in dropped
                )
            places.append(place._replace(position=place.position - up[part]))
    return tuple(places)


class _Shrinker:
    def __init__(self, scenario: Scenario, profile: str, first: Followed, effort: int, seed: int) -> None:
        self._scenario = scenario
        self._profile = profile
        assert first.ending.failure is not None
        self._best = first
        self._kind: Failure = first.ending.failure
        self._effort = effort
        self._seed = seed
        self._used = 0
        self._tried: set[bytes] = set()  # scenarios whose trail did not fail
        self._searched: set[bytes] = set()  # scenarios in which the search found nothing

    def result(self) -> Shrunk:
        ending = self._best.ending
        assert ending.failure is not None
        return Shrunk(self._scenario, ending.schedule, ending.failure, self._used)

    def run(self) -> None:
        self._drop_what_did_not_happen()
        self._drop_operations(search=False, until=self._effort // 2)
        self._calm(until=self._used + self._effort // 10)
        self._drop_operations(search=True, until=self._effort * 7 // 10)
        self._drop_actors()
        self._drop_words(until=self._effort * 17 // 20)
        self._calm(until=self._effort)
        self._drop_operations(search=False, until=self._effort)

    # --- executions ----------------------------------------------------------------------------------------------

    def _failing(self, followed: Followed) -> bool:
        return self._kind.same_kind(followed.ending.failure)

    def _left(self, until: int) -> bool:
        return self._used < min(until, self._effort)

    def _follow(self, scenario: Scenario, trail: Trail) -> Followed | None:
        """The execution along the trail, None if it does not fail."""
        self._used += 1
        try:
            followed = follow_trail(scenario, self._profile, trail)
        except ScenarioError:
            return None
        return followed if self._failing(followed) else None

    def _search(self, scenario: Scenario, trail: Trail, limit: int) -> Followed | None:
        """A failing execution that a small search finds: near the trail, by PCT, and with few delays."""
        chance = random.Random(self._seed)
        length = max(len(trail), 1)
        bounded = self._bounded(scenario, limit // 3)
        for turn in range(limit):
            if self._used >= self._effort:
                return None
            if turn % 3 == 2 and (schedule := next(bounded, None)) is not None:
                if schedule:
                    return self._record(scenario, schedule)
                continue
            self._used += 1
            depth = 2 + turn % 2
            begin = trail[: chance.randrange(length)] if turn % 3 == 0 else ()
            pct = PctChooser(self._seed << 32 | turn, depth, length - len(begin))
            found = follow_trail(scenario, self._profile, begin, pct)
            if self._failing(found):
                return found
        return None

    def _bounded(self, scenario: Scenario, limit: int) -> Iterator[tuple[Actor, ...]]:
        """Executions with few delays: the schedule of each that fails, and () for each that does not."""
        for delays in range(MOST_DELAYS):
            search = DepthFirst(scenario, self._profile, delays)
            for _ in range(max(limit // MOST_DELAYS, 1)):
                if search.complete:
                    break
                self._used += 1
                ending = search.next()
                yield ending.schedule if ending is not None and self._kind.same_kind(ending.failure) else ()

    def _record(self, scenario: Scenario, schedule: Sequence[Actor]) -> Followed:
        self._used += 1
        return follow_schedule(scenario, self._profile, schedule)

    def _accept(self, scenario: Scenario, followed: Followed) -> bool:
        self._scenario = scenario
        self._best = followed
        return True

    def _try(self, scenario: Scenario, trail: Trail, search: int = 0) -> bool:
        """Takes the candidate if it fails, along the trail, without delays, or (`search` executions) otherwise."""
        key = msgspec.msgpack.encode(scenario)
        if key not in self._tried:
            followed = self._follow(scenario, trail)
            if followed is not None:
                return self._accept(scenario, followed)
            self._tried.add(key)
        if search and key not in self._searched:
            self._searched.add(key)
            try:
                followed = self._search(scenario, trail, search)
            except ScenarioError:
                return False
            if followed is not None and self._failing(followed):
                return self._accept(scenario, followed)
        return False

    # --- operations ----------------------------------------------------------------------------------------------

    def _drop_what_did_not_happen(self) -> None:
        """Operations that no step of the trail was in."""
        begun = {_part_of(place) for place in self._best.trail}
        parts = _parts(self._scenario)
        idle = {part for part in parts if part.section is not _Section.SETUP and part not in begun}
        if idle:
            self._try(_without(self._scenario, idle), _trail_without(self._best.trail, idle))

    def _drop_operations(self, *, search: bool, until: int) -> None:
        """Chunks of operations, half of them first, single ones at last until none can go any more."""
        size = max(1, len(_parts(self._scenario)) // 2)
        while self._left(until):
            dropped = False
            end = len(_parts(self._scenario))
            while end > 0 and self._left(until):
                gone = set(_parts(self._scenario)[max(0, end - size) : end])
                candidate = _without(self._scenario, gone)
                executions = 0
                if search:
                    executions = min(SEARCH_PER_CANDIDATE, (until - self._used) // (2 * end) + 1)
                dropped |= self._try(candidate, _trail_without(self._best.trail, gone), executions)
                end -= size
            if size > 1:
                size //= 2
            elif not dropped:
                return

    # --- the machine ---------------------------------------------------------------------------------------------

    def _drop_actors(self) -> None:
        """Whoever has nothing to do goes: host threads, and vCPUs that nobody names."""
        for index in reversed(range(len(self._scenario.hosts))):
            if not self._scenario.hosts[index]:
                self._without_actor(2 * KIND + index, _without_host(self._scenario, index))
        for index in reversed(range(self._scenario.vcpus)):
            if self._scenario.vcpus > 1 and not _is_needed(self._scenario, index):
                self._without_actor(index, _without_vcpu(self._scenario, index))

    def _without_actor(self, actor: Actor, scenario: Scenario) -> None:
        kinds = {actor // KIND} if actor >= 2 * KIND else {0, 1, 3}
        index = number(actor)
        trail = []
        for place in self._best.trail:
            if place.actor // KIND in kinds and number(place.actor) >= index:
                if number(place.actor) == index:
                    continue
                trail.append(place._replace(actor=place.actor - 1))
            else:
                trail.append(place)
        self._try(scenario, tuple(trail))

    def _drop_words(self, until: int) -> None:
        """Words of memory, most of which are entries of page tables that nobody looks at."""
        size = max(1, len(self._scenario.words) // 2)
        while self._left(until):
            dropped = False
            end = len(self._scenario.words)
            while end > 0 and self._left(until):
                words = self._scenario.words
                rest = words[: max(0, end - size)] + words[end:]
                dropped |= self._try(msgspec.structs.replace(self._scenario, words=rest), self._best.trail)
                end -= size
            if size > 1:
                size //= 2
            elif not dropped:
                return

    # --- the schedule --------------------------------------------------------------------------------------------

    def _calm(self, until: int) -> None:
        """The fewest switches: what a search with few delays finds, then runs of one actor moved together."""
        for delays in range(MOST_DELAYS + 1):
            if switches(self._best.ending.schedule) <= delays:
                break
            search = DepthFirst(self._scenario, self._profile, delays)
            limit = self._used + (until - self._used) // 4 + 1
            while self._left(min(limit, until)) and not search.complete:
                self._used += 1
                ending = search.next()
                if ending is None or not self._kind.same_kind(ending.failure):
                    continue
                if _calmness(ending.schedule) < _calmness(self._best.ending.schedule):
                    self._best = self._record(self._scenario, ending.schedule)
        self._merge_runs(until)

    def _merge_runs(self, until: int) -> None:
        improved = True
        while improved and self._left(until):
            improved = False
            for candidate in _merged(self._best.trail):
                if not self._left(until):
                    break
                followed = self._follow(self._scenario, candidate)
                if followed and _calmness(followed.ending.schedule) < _calmness(self._best.ending.schedule):
                    self._best = followed
                    improved = True
                    break


def _calmness(schedule: Sequence[Actor]) -> tuple[int, int]:
    return switches(schedule), len(schedule)


def _runs(trail: Trail) -> list[list[Place]]:
    runs: list[list[Place]] = []
    for place in trail:
        if runs and runs[-1][0].actor == place.actor:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _merged(trail: Trail) -> Iterator[Trail]:
    """Trails in which a run of one actor comes at another run of it, or is left out."""
    runs = _runs(trail)
    for i, run in enumerate(runs):
        same = [j for j, other in enumerate(runs) if other[0].actor == run[0].actor]
        rest = [other for j, other in enumerate(runs) if j != i]
        after = min((j - 1 for j in same if j > i), default=None)
        before = max((j + 1 for j in same if j < i), default=None)
        for at in (after, before):
            if at is not None:
                yield _joined([*rest[:at], run, *rest[at:]])
        yield _joined(rest)


def _joined(runs: list[list[Place]]) -> Trail:
    return tuple(place for run in runs for place in run)


def _is_needed(scenario: Scenario, vcpu: int) -> bool:
    """Whether the vCPU has operations, or some operation names it or one behind it by number."""
    if scenario.workload is not None or scenario.programs[vcpu]:
        return True
    if any(setup.vcpu == vcpu for setup in scenario.setup):
        return True
    named = [-1]
    for step in _all_steps(scenario):
        if isinstance(step, HostStep):
            if isinstance(step.operation, m.Migrate):
                named.append(step.operation.vcpu)
        elif isinstance(step.instruction, SendIpi):
            named += step.instruction.targets
    return max(named) >= vcpu


def _all_steps(scenario: Scenario) -> Iterator[Step | HostStep]:
    for setup in scenario.setup:
        yield setup.step
    for program in (*scenario.programs, *scenario.handlers):
        yield from program
    for steps in scenario.hosts:
        yield from steps


def _without_host(scenario: Scenario, index: int) -> Scenario:
    return msgspec.structs.replace(scenario, hosts=scenario.hosts[:index] + scenario.hosts[index + 1 :])


def _without_vcpu(scenario: Scenario, index: int) -> Scenario:
    """The vCPUs behind it move up, in the condition too."""
    registers = scenario.machine.registers
    machine = msgspec.structs.replace(scenario.machine, registers=registers[:index] + registers[index + 1 :])
    return msgspec.structs.replace(
        scenario,
        machine=machine,
        programs=scenario.programs[:index] + scenario.programs[index + 1 :],
        handlers=scenario.handlers[:index] + scenario.handlers[index + 1 :],
        setup=tuple(
            msgspec.structs.replace(setup, vcpu=setup.vcpu - 1) if setup.vcpu > index else setup
            for setup in scenario.setup
        ),
        forbidden=re.sub(
            r"v(\d+)(?=:r)",
            lambda match: f"v{int(match[1]) - (int(match[1]) > index)}",
            scenario.forbidden,
        ),
    )
