"""PCT with change points by actor, or by place: whoever takes few steps, and the rare places, are not passed over."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from shadowmmu.explorer.actors import Actor, host, kick, vcpu
from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.hunt_chooser import ActorPctChooser, PlacePctChooser, StopCounter, place_of
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.world import World
from tests.explorer.guests import ONE_PAGE

STEPS = {vcpu(0): 200, vcpu(1): 200, host(0): 5}


def _run(seed: int, changes: int, steps: dict[Actor, int]) -> list[Actor]:
    """The actors' turns when each has that many steps to take and nobody waits for anybody."""
    chooser = ActorPctChooser(seed, changes, steps)
    left = Counter(steps)
    schedule = []
    while left := +left:
        actor = chooser.choose(sorted(left))
        left[actor] -= 1
        schedule.append(actor)
    return [actor for actor, _ in groupby(schedule)]


def test_without_changes_everybody_goes_on_to_the_end() -> None:
    turns = {tuple(_run(seed, 0, STEPS)) for seed in range(100)}
    assert all(len(order) == 3 for order in turns)
    assert len(turns) == 6


def test_a_change_stops_at_most_one_actor() -> None:
    assert {len(_run(seed, 1, STEPS)) for seed in range(100)} == {3, 4}


def test_the_actor_with_few_steps_is_stopped_often() -> None:
    stopped = Counter(
        actor for seed in range(300) for actor, turns in Counter(_run(seed, 1, STEPS)).items() if turns > 1
    )
    assert stopped[host(0)] > 25
    assert stopped[vcpu(0)] > 25


def test_the_same_seed_chooses_the_same() -> None:
    assert _run(5, 3, STEPS) == _run(5, 3, STEPS)


def test_no_change_is_spent_on_kicks() -> None:
    """They are one step: there is nothing to be stopped in."""
    kicks = {kick(number): 1 for number in range(20)}
    stopped = [seed for seed in range(60) if len(_run(seed, 1, {vcpu(0): 20, vcpu(1): 20, **kicks})) > 22]
    assert len(stopped) > 10


# --- by the kind of place --------------------------------------------------------------------------------------------

COMMON, RARE = "READ_GUEST_MEMORY", "PTE_WRITE_LOCK"
STOPS = {(vcpu(0), COMMON): 99, (vcpu(0), RARE): 1, (vcpu(1), COMMON): 100}


def _stopped(seed: int, stops: dict[tuple[Actor, str], int]) -> list[tuple[Actor, str]]:
    """Who was stopped where, with one change, when everybody is at the rare places last."""
    where: dict[Actor, list[str]] = {}
    for (actor, place), times in stops.items():
        where.setdefault(actor, []).extend([place] * times)
    position: Counter[Actor] = Counter()
    chooser = PlacePctChooser(seed, 1, stops, lambda actor: where[actor][position[actor]])
    schedule: list[Actor] = []
    found = []
    while left := [actor for actor in sorted(where) if position[actor] < len(where[actor])]:
        actor = chooser.choose(left)
        if schedule and actor != schedule[-1] and schedule[-1] in left:
            found.append((schedule[-1], where[schedule[-1]][position[schedule[-1]]]))
        position[actor] += 1
        schedule.append(actor)
    return found


def test_an_actor_is_stopped_as_easily_at_a_rare_place_as_at_a_common_one() -> None:
    stopped = Counter(stop for seed in range(400) for stop in _stopped(seed, STOPS))
    assert stopped[vcpu(0), RARE] > 25
    assert stopped[vcpu(0), COMMON] > 25
    assert stopped[vcpu(1), COMMON] > 50


def test_no_change_of_place_is_spent_on_kicks() -> None:
    kicks = {(kick(number), "start"): 1 for number in range(20)}
    stopped = [stop for seed in range(100) for stop in _stopped(seed, {**STOPS, **kicks})]
    assert len(stopped) > 30
    assert all(actor in {vcpu(0), vcpu(1)} for actor, _ in stopped)


STORE = f"""
setup = "v0: load x"
[machine]
vcpus = 1
{ONE_PAGE}
[[vcpu]]
program = "store @L2[0] = 0"
[[host]]
program = "unmap T"
"""


def test_where_actors_stand_is_told_by_the_preemption_point() -> None:
    world = World(parse_litmus(STORE, "a store to a table"), "linux-3.1")
    counter = StopCounter(FollowChooser(()), lambda actor: place_of(world, actor))
    while enabled := world.enabled():
        world.step(counter.choose(enabled))
    assert counter.stood[vcpu(0), "PTE_WRITE_LOCK"] == 1
    assert counter.stood[host(0), "start"] == 1
    assert {place for actor, place in counter.stood if actor == vcpu(0)} >= {"guest", "walk", "BEFORE_LOCK"}
