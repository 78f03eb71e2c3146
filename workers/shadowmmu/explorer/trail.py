"""A trail: a schedule that also says where each actor stood, so that it can be followed through changed code.

A schedule counts steps. When an operation is dropped from the scenario, a fix is switched in, or a later version of the
model has a point more, its counts mean something else. A trail names for every step the place at which the actor
stood: how many of its instructions were done, and where in the next it was (in guest mode, in a walk, at a named
point). Following it means: an actor that stands before the place goes on until it is there; one that is past it waits.

As text a trail has a line for each stay of an actor in one instruction: `v0 2: guest walk*4 BEFORE_LOCK MMU_LOCK`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Final, NamedTuple, TypeAlias

import msgspec

from shadowmmu.checker import Rule
from shadowmmu.explorer.actors import KIND, Actor, actor_name, number, parse_schedule
from shadowmmu.explorer.choosers import Chooser, FollowChooser
from shadowmmu.explorer.execution import Ending, Failure, describe
from shadowmmu.explorer.program import LitmusProgram
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.world import StepLimitError, World
from shadowmmu.machine import Task
from shadowmmu.machine.task import Stop
from shadowmmu.protocol.events import Event

__all__ = [
    "HANDLER",
    "Divergence",
    "Followed",
    "Place",
    "Trail",
    "follow_schedule",
    "follow_trail",
    "format_trail",
    "host_task",
    "parse_trail",
    "standing",
    "trail_schedule",
]

_GUEST: Final = "guest"
_WALK: Final = "walk"
HANDLER: Final = 1 << 16
"""Positions from here on are in the interrupt handler."""


class Place(NamedTuple):
    """Where an actor stood before a step: after `position` instructions, at `name`, for the `turn`-th time (from 0).

    In an interrupt handler `position` is HANDLER more than the number of its instructions that are done.
    """

    actor: Actor
    position: int
    name: str
    turn: int

    @property
    def in_handler(self) -> bool:
        """It is a place in an interrupt handler."""
        return self.position >= HANDLER

    def __str__(self) -> str:
        again = f" (time {self.turn + 1})" if self.turn else ""
        handler = "its handler's " if self.in_handler else ""
        where = f"in {handler}instruction {self.position % HANDLER + 1}"
        return f"{actor_name(self.actor)} {where} at {self.name}{again}"


Trail: TypeAlias = tuple[Place, ...]


class Divergence(msgspec.Struct, frozen=True):
    """The first step that was another than the trail's: step number `step` (from 0), what it named, what was taken."""

    step: int
    expected: Place | None
    taken: Place

    def __str__(self) -> str:
        if self.expected is None:
            return f"step {self.step}: {self.taken}, where the recording had ended"
        return f"step {self.step}: {self.taken}, recorded was {self.expected}"


class Followed(msgspec.Struct, frozen=True):
    """An execution along a trail: how it ended, its own trail, how many places were not met, and where it diverged."""

    ending: Ending
    trail: Trail
    skipped: int = 0
    divergence: Divergence | None = None


def host_task(world: World, index: int) -> Task | None:
    """The operation of a host thread that is under way."""
    return next((t for t in world.machine.tasks() if t.lane is None and t.ticket == index + 1), None)


def standing(world: World, actor: Actor) -> tuple[int, str]:
    """How many instructions the actor has done, and where in the next one it stands."""
    index = number(actor)
    match actor // KIND:
        case 0:
            program = world.programs[index]
            handling = isinstance(program, LitmusProgram) and program.handling
            position = program.position + HANDLER * handling
            lane = world.machine.lanes[index]
            if isinstance(lane.task, Task):
                return position, _stop(lane.task)
            return position, _WALK if lane.runnable else _GUEST
        case 2:
            task = host_task(world, index)
            return world.host_position[index], "begin" if task is None else _stop(task)
        case 1:
            return 0, "kick"
        case _:
            return 0, "store"


def _stop(task: Task) -> str:
    if task.stop is Stop.BUSY:
        return "BUSY"
    return task.name if task.point is None else task.point.name


class _Recorder:
    """Gives the places of an execution their turns."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._turns: Counter[tuple[Actor, int, str]] = Counter()
        self.trail: list[Place] = []

    def here(self, actor: Actor) -> Place:
        """Where the actor stands."""
        place = (actor, *standing(self._world, actor))
        return Place(*place, self._turns[place])

    def note(self, actor: Actor) -> Place:
        """The actor is about to take a step."""
        place = self.here(actor)
        self._turns[place[:3]] += 1
        self.trail.append(place)
        return place


class _Guide:
    """Chooses along a trail."""

    def __init__(self, trail: Sequence[Place], then: Chooser | None) -> None:
        self._trail = trail
        self._index = {place: i for i, place in enumerate(trail)}
        self._next = 0
        self._then = then
        self._last: Actor = -1
        self.skipped = 0

    def choose(self, enabled: Sequence[Actor], here: Callable[[Actor], Place]) -> Actor:
        """The actor whose step brings the execution on along the trail."""
        self._last = self._choose(enabled, here)
        return self._last

    def _choose(self, enabled: Sequence[Actor], here: Callable[[Actor], Place]) -> Actor:
        trail = self._trail
        while self._next < len(trail):
            goal = trail[self._next]
            if goal.actor in enabled:
                stands = here(goal.actor)
                if (
                    stands == goal or goal.actor // KIND % 2
                ):  # a kick or a store is the next one, whatever its number
                    self._next += 1
                    return goal.actor
                if self._is_before(stands, goal):
                    return goal.actor
            self.skipped += 1
            self._next += 1
        if self._then is not None:
            return self._then.choose(enabled)
        return self._last if self._last in enabled else enabled[0]

    def _is_before(self, stands: Place, goal: Place) -> bool:
        """Whether the actor has yet to come to its goal; a place that the trail does not have is judged by position."""
        known = self._index.get(stands)
        if known is not None:
            return known < self._next
        return stands.in_handler or stands.position <= goal.position


def follow_trail(
    scenario: Scenario,
    profile: str,
    trail: Sequence[Place],
    then: Chooser | None = None,
    listener: Callable[[Actor, list[Event]], None] | None = None,
) -> Followed:
    """Executes along a trail as far as it applies; then `then` chooses, without it whoever ran last goes on.

    Raises ScenarioError if the set-up does not come to an end.
    """
    world = World(scenario, profile, listener)
    guide = _Guide(trail, then)
    recorder = _Recorder(world)
    ending = _run(world, recorder, lambda enabled: guide.choose(enabled, recorder.here))
    taken = tuple(recorder.trail)
    divergence = next(
        (Divergence(step, a, b) for step, (a, b) in enumerate(zip(trail, taken, strict=False)) if a != b),
        None,
    )
    if divergence is None and len(taken) > len(trail):
        divergence = Divergence(len(trail), None, taken[len(trail)])
    return Followed(ending, taken, guide.skipped, divergence)


def follow_schedule(
    scenario: Scenario,
    profile: str,
    schedule: Sequence[Actor],
    listener: Callable[[Actor, list[Event]], None] | None = None,
) -> Followed:
    """Executes a schedule as far as it applies, by counting steps; gives it its trail."""
    world = World(scenario, profile, listener)
    recorder = _Recorder(world)
    return Followed(_run(world, recorder, FollowChooser(schedule).choose), tuple(recorder.trail))


def _run(world: World, recorder: _Recorder, choose: Callable[[Sequence[Actor]], Actor]) -> Ending:
    try:
        while enabled := world.enabled():
            actor = choose(enabled)
            recorder.note(actor)
            world.step(actor)
    except StepLimitError as error:
        return Ending(world.outcome(), Failure(Rule.NO_PROGRESS, str(error)), tuple(world.schedule))
    return describe(world)


def trail_schedule(trail: Iterable[Place]) -> tuple[Actor, ...]:
    """Who took the steps."""
    return tuple(place.actor for place in trail)


# --- as text ---------------------------------------------------------------------------------------------------------

_LINE: Final = re.compile(r"(\w+) (i?)(\d+): (.+)", re.ASCII)
_STOP: Final = re.compile(r"([^*]+)(?:\*(\d+))?")


def format_trail(trail: Iterable[Place]) -> list[str]:
    """A line for each stay of an actor in one instruction: `v0 2: guest walk*4 BEFORE_LOCK`; i2 is in a handler."""
    lines = []
    for (actor, position), stay in groupby(trail, key=lambda place: place[:2]):
        names = []
        for name, run in groupby(place.name for place in stay):
            count = len(list(run))
            names.append(name + (f"*{count}" if count > 1 else ""))
        handler = "i" if position >= HANDLER else ""
        lines.append(f"{actor_name(actor)} {handler}{position % HANDLER}: {' '.join(names)}")
    return lines


def parse_trail(lines: Iterable[str]) -> Trail:
    """The trail that `format_trail` wrote. Raises ValueError."""
    turns: Counter[tuple[Actor, int, str]] = Counter()
    trail = []
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{line!r} is no line of a trail")
        (actor,) = parse_schedule(match[1])
        position = int(match[3]) + HANDLER * bool(match[2])
        for word in match[4].split():
            stop = _STOP.fullmatch(word)
            if stop is None:
                raise ValueError(f"{word!r} is no place of a trail")
            place = (actor, position, stop[1])
            for _ in range(int(stop[2] or 1)):
                trail.append(Place(*place, turns[place]))
                turns[place] += 1
    return tuple(trail)
