"""PCT with change points by actor: an actor is stopped as easily in its few steps as another in its many."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from shadowmmu.explorer.actors import Actor, host, kick, vcpu
from shadowmmu.explorer.hunt_chooser import ActorPctChooser

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
