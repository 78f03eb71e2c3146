"""Whoever waits for somebody else in a loop lets him go on, and whoever has nobody to wait for does not."""

from __future__ import annotations

from shadowmmu.explorer.actors import host, kick, parse_schedule, vcpu
from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.turns import Turns
from shadowmmu.protocol.events import Exited, FrameBacked, LockReleased, LockTaken
from tests.explorer.guests import ONE_PAGE

ZERO, ONE, HOST = vcpu(0), vcpu(1), host(0)


def fault(number: int, gva: int = 0x9000) -> Exited:
    return Exited(number, 1, "page_fault", gva, 2)


def after_the_same_fault_twice() -> Turns:
    turns = Turns()
    for _ in range(2):
        turns.look(ZERO, [fault(0), LockTaken(1), LockReleased(1)])
    return turns


def test_who_faults_again_lets_the_others_go_on() -> None:
    assert after_the_same_fault_twice().of([ZERO, ONE, HOST]) == [ONE, HOST]


def test_who_is_alone_goes_on() -> None:
    assert after_the_same_fault_twice().of([ZERO]) == [ZERO]


def test_a_kick_is_delivered_to_who_is_passed_over() -> None:
    assert after_the_same_fault_twice().of([ZERO, kick(0)]) == [kick(0)]


def test_a_step_of_the_host_ends_it() -> None:
    turns = after_the_same_fault_twice()
    turns.look(HOST, [LockTaken(2)])
    assert turns.of([ZERO, ONE]) == [ZERO, ONE]


def test_two_who_fault_again_do_not_help_each_other() -> None:
    turns = after_the_same_fault_twice()
    for _ in range(2):
        turns.look(ONE, [fault(1)])
    assert turns.of([ZERO, ONE, HOST]) == [HOST]


def test_what_may_explain_the_fault_ends_it() -> None:
    turns = after_the_same_fault_twice()
    turns.look(ONE, [FrameBacked(9, 9)])
    assert turns.of([ZERO, ONE]) == [ZERO, ONE]


def test_a_fault_elsewhere_is_another_one() -> None:
    turns = Turns()
    turns.look(ZERO, [fault(0)])
    turns.look(ZERO, [fault(0, 0xA000)])
    assert turns.of([ZERO, ONE]) == [ZERO, ONE]


RANGE = f"""
setup = "v0: store x = 1"
[machine]
vcpus = 1
{ONE_PAGE}
[[vcpu]]
program = "store x = 2"
[[host]]
program = "unmap_range G 1"
"""


def test_a_vcpu_that_is_preferred_does_not_wait_for_ever_for_the_end_of_a_range() -> None:
    begun = FollowChooser(parse_schedule("h0*3 k0 h0 v0"))  # and vCPU 0 as long as possible
    ending = execute(parse_litmus(RANGE, "range"), "fixed", begun)
    assert ending.failure is None
