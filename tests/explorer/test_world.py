"""An execution is decided by its schedule, and by nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.explorer import actors
from shadowmmu.explorer.choosers import FollowChooser, PctChooser, RandomChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.fingerprint import fingerprint
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.world import World
from shadowmmu.protocol.events import Event
from tests.explorer.guests import ONE_PAGE

NAMES = ["dirty-bit-lost", "host-frame-reused", "pte-store-then-ipi", "tlbs-dirty-missed-wp"]
some_actor = st.builds(
    lambda kind, n: kind * actors.KIND + n, st.integers(0, 3), st.integers(0, actors.KIND - 1)
)


@given(st.lists(some_actor, max_size=40))
def test_a_schedule_that_was_formatted_and_parsed_is_the_same(schedule: list[int]) -> None:
    assert actors.parse_schedule(actors.format_schedule(schedule)) == schedule


def test_a_schedule_counts_runs() -> None:
    schedule = [actors.vcpu(0)] * 3 + [actors.host(1), actors.kick(0), actors.drain(2)]
    assert actors.format_schedule(schedule) == "v0*3 h1 k0 d2"
    assert [actors.number(actor) for actor in schedule] == [0, 0, 0, 1, 0, 2]


@pytest.mark.parametrize("text", ["x0", "v", "v64", "v0*", "v0**2", "v-1", "v0,v1"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no step of a schedule"):
        actors.parse_schedule(text)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 1 << 30), st.booleans())
def test_a_schedule_replays(name: str, seed: int, pct: bool) -> None:
    test = find_test(name)
    events: list[list[Event]] = [[], []]
    chooser = PctChooser(seed, 3, 100) if pct else RandomChooser(seed)
    first = execute(test, "linux-3.1", chooser, lambda _, new: events[0].extend(new))
    again = execute(test, "linux-3.1", FollowChooser(first.schedule), lambda _, new: events[1].extend(new))
    assert again == first
    assert events[0] == events[1]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 1 << 30))
def test_the_enabled_actors_are_in_order_and_asking_changes_nothing(name: str, seed: int) -> None:
    test = find_test(name)
    world, unasked = World(test, "linux-3.1"), World(test, "linux-3.1")
    chooser = RandomChooser(seed)
    while enabled := world.enabled():
        assert enabled == world.enabled() == sorted(set(enabled))
        before = fingerprint(world)
        assert fingerprint(world) == before == fingerprint(unasked)
        actor = chooser.choose(enabled)
        world.step(actor)
        unasked.step(actor)
    assert world.schedule == unasked.schedule
    assert world.outcome() == unasked.outcome()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 1 << 30))
def test_a_step_disables_nobody_else_but_who_was_answered_or_must_wait(name: str, seed: int) -> None:
    world = World(find_test(name), "fixed")
    chooser = RandomChooser(seed)
    while enabled := world.enabled():
        actor = chooser.choose(enabled)
        world.step(actor)
        after = world.enabled()
        if world.machine.at_memory_point or world.violation is not None:
            continue  # only the hardware goes on
        holder = [task for task in world.machine.tasks() if world.machine.owns_mmu_lock(task)]
        for other in set(enabled) - set(after) - {actor}:
            vcpu = actors.number(other)
            kicked = other == actors.kick(vcpu) and not world.cores[vcpu].in_guest
            waits = bool(world.machine.tasks()) and bool(holder)
            left = actor == actors.kick(vcpu) or world.machine.lanes[vcpu].task is not None
            assert kicked or waits or left, (actors.actor_name(actor), actors.actor_name(other))


@pytest.mark.parametrize("name", NAMES)
def test_an_execution_ends_with_everything_done(name: str) -> None:
    test = find_test(name)
    for seed in range(5):
        world = World(test, "fixed")
        chooser = RandomChooser(seed)
        while enabled := world.enabled():
            world.step(chooser.choose(enabled))
        world.end()
        assert world.violation is None and not world.stuck and not world.waiting
        assert all(program.done for program in world.programs)
        assert world.host_progress()[: len(test.hosts)] == tuple(len(host) for host in test.hosts)


def test_the_listener_sees_every_event_once_and_whose_it_is() -> None:
    seen: Counter[int] = Counter()
    ending = execute(
        find_test("dirty-bit-lost"),
        "fixed",
        RandomChooser(1),
        lambda actor, new: seen.update({actor: len(new)}),
    )
    assert seen.pop(-1) > 0  # the set-up
    assert set(seen) <= set(ending.schedule)


def test_nothing_is_enabled_after_a_violation() -> None:
    world = World(find_test("tlbs-dirty-missed-wp"), "linux-3.1")
    chooser = FollowChooser([])
    while enabled := world.enabled():
        world.step(chooser.choose(enabled))
    assert world.violation is not None
    assert world.enabled() == []


def test_a_wait_for_what_never_comes_ends_the_execution_without_a_failure() -> None:
    test = parse_litmus("[tables.root]\n[[vcpu]]\nprogram = 'await @root[9] = 5'", "test")
    world = World(test, "fixed")
    assert world.enabled() == []
    world.end()
    assert world.waiting and world.violation is None


def test_a_condition_that_holds_is_a_failure() -> None:
    text = "forbidden = 'v0:r0 == 5 or F[0] == 9'\n[memory]\n'F[0]' = 5\n[tables.root]\n[[vcpu]]\nprogram = 'r0 = load @F'"
    ending = execute(parse_litmus(text, "test"), "fixed", RandomChooser(1))
    assert ending.failure is not None and ending.failure.kind == "condition"
    assert ending.outcome == (("v0:r0", 5), ("F[0]", 5))


DELETED_TWICE = f"""
[machine]
vcpus = 1
slots = [{{ gfn = 1024, pages = 8 }}]
{ONE_PAGE}
[[vcpu]]
program = "store x = 2"
[[host]]
program = '''
delete_slot 1
dirty_log 1 on
unmap 1024
'''
[[host]]
program = "delete_slot 1"
"""


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30))
def test_what_a_host_asks_of_a_slot_that_is_gone_is_refused_and_its_program_goes_on(seed: int) -> None:
    world = World(parse_litmus(DELETED_TWICE, "test"), "fixed")
    chooser = RandomChooser(seed)
    while actors_enabled := world.enabled():
        world.step(chooser.choose(actors_enabled))
    assert world.host_position == [3, 1]
