"""Shrinking keeps the failure and drops everything that it does not need."""

import msgspec
import pytest

from shadowmmu.explorer.actors import host, parse_schedule, vcpu
from shadowmmu.explorer.choosers import RandomChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.scenario import HostStep, Scenario
from shadowmmu.explorer.shrink import ShrinkError, Shrunk, shrink, switches
from shadowmmu.explorer.trail import follow_schedule
from shadowmmu.protocol import messages as m
from tests.explorer.failing import Failing, failing, search

EFFORT = 300


def shrunk(found: Failing, effort: int = EFFORT) -> Shrunk:
    return shrink(found.scenario, found.profile, found.failure, found.schedule, effort=effort)


def fails(small: Shrunk, profile: str) -> bool:
    return small.failure.same_kind(follow_schedule(small.scenario, profile, small.schedule).ending.failure)


def texts(scenario: Scenario) -> list[str]:
    steps = [setup.step.text for setup in scenario.setup]
    for program in (*scenario.programs, *scenario.handlers):
        steps += [step.text for step in program]
    for operations in scenario.hosts:
        steps += [operation.text for operation in operations]
    return steps


def test_what_is_left_still_fails_in_the_same_way() -> None:
    found = failing()
    small = shrunk(found)
    assert found.failure.same_kind(small.failure)
    assert fails(small, found.profile)
    assert small.scenario.size < found.scenario.size
    assert small.executions <= EFFORT


def test_no_operation_that_is_left_can_be_dropped() -> None:
    """The missed flush needs the stale translation, the table dropped and synced, and the new table."""
    small = shrunk(failing(), 700)
    assert small.scenario.size <= 6
    assert {"store @T[9] = 0", "load y", "store @L2[2] = G wua", "store x[5] = 0"} <= set(
        texts(small.scenario)
    )


def test_the_same_input_gives_the_same_result() -> None:
    assert shrunk(failing(), 100) == shrunk(failing(), 100)


def test_a_schedule_that_shows_nothing_cannot_be_shrunk() -> None:
    found = failing()
    with pytest.raises(ShrinkError, match="does not lead to rule 4"):
        shrink(found.scenario, "fixed", found.failure, found.schedule)


def padded(found: Failing, operations: int) -> Scenario:
    """The scenario with as many operations that have nothing to do with the failure, and an idle vCPU and host."""
    noise = parse_litmus(
        """
        [tables]
        root = {0 = "L3 wua"}
        [[vcpu]]
        program = '''
        load @other[1]
        store @other[2] = 5
        load @P1[3]
        '''
        [frames]
        other = 56
        P1 = 64
        """,
        "noise",
    ).programs[0]
    programs = []
    for program in found.scenario.programs:
        steps = list(program)
        for n in range(operations):
            steps.insert((n * 7) % (len(steps) + 1), noise[n % len(noise)])
        programs.append(tuple(steps))
    machine = found.scenario.machine
    return msgspec.structs.replace(
        found.scenario,
        machine=msgspec.structs.replace(machine, registers=(*machine.registers, machine.registers[0])),
        programs=(*programs, ()),
        hosts=((HostStep("shrink 0", m.Shrink(0)),),),
    )


def test_hundreds_of_operations_come_down_to_a_few() -> None:
    scenario = padded(failing(), 100)
    assert scenario.size > 200
    small = shrunk(search(scenario, "linux-3.1"))
    assert small.scenario.size <= 8
    assert fails(small, "linux-3.1")


def test_vcpus_hosts_and_memory_that_do_nothing_go() -> None:
    scenario = padded(failing(), 2)
    small = shrunk(search(scenario, "linux-3.1"), 600)
    assert small.scenario.vcpus == len(small.scenario.programs) == 2
    assert small.scenario.hosts == ()
    assert len(small.scenario.words) < len(scenario.words)


def test_a_schedule_full_of_switches_becomes_calm() -> None:
    found = failing("invlpg-noremote", "fixed-invlpg-noremote")
    restless = next(
        ending
        for seed in range(400)
        if found.failure.same_kind(
            (ending := execute(found.scenario, found.profile, RandomChooser(seed))).failure
        )
    )
    assert restless.failure is not None
    small = shrink(found.scenario, found.profile, restless.failure, restless.schedule, effort=EFFORT)
    assert switches(restless.schedule) > 4
    assert small.switches == switches(small.schedule) <= 3


def test_switches_are_counted_between_actors() -> None:
    assert switches(parse_schedule("v0*3 h0 v0*2")) == 2
    assert switches([vcpu(0), vcpu(0)]) == 0
    assert switches([host(0)]) == 0


CONDITION = """
forbidden = "v1:r0 == 5"
[machine]
vcpus = 3
[tables.root]
0 = "L3 wua"
[[vcpu]]
program = "load @root[5]"
[[vcpu]]
program = '''
load @root[6]
r0 = load @root[7]
'''
[[vcpu]]
program = '''
store @root[7] = 5
load @root[6]
'''
"""


def test_the_step_that_loads_a_register_of_the_condition_stays() -> None:
    small = shrunk(search(parse_litmus(CONDITION, "condition"), "fixed"))
    assert sorted(texts(small.scenario)) == ["r0 = load @root[7]", "store @root[7] = 5"]


def test_a_condition_follows_the_vcpus_that_move_up() -> None:
    small = shrunk(search(parse_litmus(CONDITION, "condition"), "fixed"))
    assert small.scenario.vcpus == 2
    assert small.scenario.forbidden == "v0:r0 == 5"
    assert fails(small, "fixed")
