"""While admission is closed nothing begins that could not be copied; what waits begins, in order, when it is opened."""

from __future__ import annotations

import pytest

from shadowmmu.machine import Admission, Attached, HostAsked, HostDone, HostRefused, ToVcpu, VcpuSent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import OperationStarted
from tests.machine.guest import PAGING_ON, TABLES, Driven


def close(driven: Driven) -> None:
    driven.submit(Admission(open=False))
    driven.settle()


def reopen(driven: Driven) -> None:
    driven.submit(Admission(open=True))
    driven.settle()


def quiet(driven: Driven) -> bool:
    return driven.runner.machine.quiet


def started(driven: Driven) -> list[str]:
    return [event.name for event in driven.events if isinstance(event, OperationStarted)]


def test_a_vcpu_that_wants_to_enter_waits() -> None:
    driven = Driven()
    close(driven)
    before = started(driven)
    assert driven.send(0, m.Enter()) == []
    assert started(driven) == before
    assert quiet(driven) and not driven.runner.machine.idle
    reopen(driven)
    (entered,) = driven.take(0)
    assert isinstance(entered, m.Entered)
    assert driven.runner.machine.idle


def test_an_exit_takes_effect_and_its_operation_waits() -> None:
    driven = Driven()
    driven.enter(0)
    page = driven.map_page(0, 7)
    close(driven)
    sent = driven.send(0, driven.log(0, 7, 5, page.pfn), m.Exit(driven.entry(0), m.InvlpgExit(7 << 12)))
    assert sent == [m.Applied(1)]
    assert driven.word(7) == 5
    assert quiet(driven)
    reopen(driven)
    (entered,) = driven.take(0)
    assert isinstance(entered, m.Entered)
    assert entered.completed is not None


def test_a_walk_waits_and_one_that_an_exit_abandons_is_never_made() -> None:
    driven = Driven()
    driven.enter(0)
    close(driven)
    walk = m.Walk(driven.entry(0), 1, 7 << 12, 0)
    assert driven.send(0, walk) == []
    assert quiet(driven)
    reopen(driven)
    (answer,) = driven.take(0)
    assert isinstance(answer, m.WalkFault)
    close(driven)
    assert driven.send(0, walk, m.Exit(driven.entry(0), m.InvlpgExit(7 << 12))) == []
    reopen(driven)
    (entered,) = driven.take(0)
    assert isinstance(entered, m.Entered)


def test_a_walk_that_is_under_way_ends() -> None:
    driven = Driven()
    driven.enter(0)
    driven.submit(VcpuSent(0, m.Walk(driven.entry(0), 1, 7 << 12, 0)))
    assert driven.runner.step(1)
    driven.submit(Admission(open=False))
    assert not quiet(driven)
    driven.settle()
    assert quiet(driven)
    assert len(driven.take(0)) == 1


def test_operations_under_way_end_by_the_answers_to_their_kicks() -> None:
    driven = Driven()
    for vcpu in (0, 1):
        driven.enter(vcpu)
    driven.map_page(0, 7)
    driven.host(m.Unmap(7))
    close(driven)
    assert not quiet(driven)
    (kick,) = (body for body in driven.take(0) if isinstance(body, m.Kick))
    driven.send(0, m.Walk(kick.entry, 9, 8 << 12, 0), m.Exit(kick.entry, m.ExternalInterruptExit()))
    for entry in driven.kicks(1):
        driven.send(1, m.Exit(entry, m.ExternalInterruptExit()))
    assert quiet(driven)
    assert driven.done[-1].ticket == 1
    reopen(driven)
    assert any(isinstance(body, m.Entered) for body in driven.take(0))


def test_host_operations_wait_in_their_order_and_paced_ones_go_on_being_paced() -> None:
    driven = Driven()
    close(driven)
    driven.submit(HostAsked(1, m.Unmap(7), paced=True))
    driven.submit(HostAsked(2, m.TestAge(7)))
    driven.submit(HostAsked(3, m.TestAge(8)))
    driven.submit(HostAsked(4, m.Shrink(1), paced=True))
    driven.settle()
    assert driven.done == []
    before = len(started(driven))
    driven.submit(Admission(open=True))
    driven.runner.take_outputs()
    assert started(driven)[before:] == ["host.unmap", "host.test_age", "host.test_age"]
    driven.settle()
    assert sorted(done.ticket for done in driven.done) == [1, 2, 3, 4]


def test_registers_are_set_before_the_vcpu_enters_that_asked_later() -> None:
    driven = Driven()
    close(driven)
    registers = m.SetRegisters(0, PAGING_ON, TABLES + 1 << 12, 0x20, 0xD00)
    driven.submit(HostAsked(5, registers))
    driven.submit(VcpuSent(0, m.Enter()))
    driven.submit(HostAsked(6, registers))
    driven.settle()
    (refused,) = driven.refused
    assert (refused.ticket, driven.done) == (6, [])
    assert "entered already" in refused.text
    reopen(driven)
    assert driven.done == [HostDone(5, 0, [])]
    assert driven.runner.machine.kvm.vcpus[0].cr3 == TABLES + 1 << 12
    assert isinstance(driven.take(0)[0], m.Entered)


def test_an_interrupt_for_a_halted_vcpu_waits_with_it() -> None:
    driven = Driven()
    for vcpu in (0, 1):
        driven.enter(vcpu)
    driven.send(0, m.Exit(driven.entry(0), m.HaltExit()))
    close(driven)
    assert driven.send(1, m.Exit(driven.entry(1), m.SendIpiExit([0], 33))) == []
    assert driven.take(0) == []
    reopen(driven)
    (entered,) = driven.take(0)
    assert isinstance(entered, m.Entered)
    assert entered.interrupts == [33]


def test_an_incarnation_that_ends_while_its_exit_waits_is_followed_by_another() -> None:
    driven = Driven()
    driven.enter(0)
    close(driven)
    driven.send(0, m.Exit(driven.entry(0), m.InvlpgExit(7 << 12)))
    driven.give_up(0)
    assert [type(body) for body in driven.take(0)] == [m.Ended]
    driven.submit(Attached(0, 9))
    assert driven.send(0, m.Enter()) == []
    reopen(driven)
    entered = [body for body in driven.take(0) if isinstance(body, m.Entered)]
    assert len(entered) == 1
    assert driven.runner.machine.idle


@pytest.mark.parametrize("paced", [True, False])
def test_a_host_operation_that_makes_no_sense_is_refused_in_its_turn(paced: bool) -> None:
    driven = Driven()
    before = started(driven)
    driven.host(m.TestAge(1 << 30), paced=paced)
    (refused,) = driven.refused
    assert refused == HostRefused(1, f"gfn {1 << 30} is in no memory slot")
    assert started(driven) == before and driven.done == []
    assert not any(isinstance(output, ToVcpu) for output in driven.runner.machine.outputs)
