"""The machine, message by message: entries, kicks and answers, logs, interrupts, parked operations, incarnations."""

from __future__ import annotations

import pytest

from shadowmmu.machine import Attached, GivenUp, HostAsked, VcpuSent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Accesses, Entered, FlushAnswered, FlushRequested, FrameRevoked
from tests.machine.guest import FIRST_PFN, WRITE, Driven


def test_a_page_fault_maps_the_page_and_the_walk_then_succeeds() -> None:
    driven = Driven(1)
    driven.enter(0)
    walked = driven.map_page(0, 7, WRITE)
    assert (walked.pfn, walked.level) == (FIRST_PFN + 7, 1)
    assert driven.runner.machine.kvm.stat.pf_fixed == 1


def test_a_logged_store_happens_when_it_is_applied_and_gives_its_credit_back() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    assert driven.send(0, driven.log(0, 7, 42)) == [m.Applied(1)]
    assert driven.word(7) == 42


def test_a_load_sees_the_stores_logged_before_it() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    load = m.Load(driven.entry(0), (0, 7 << 12, FIRST_PFN + 7, 8, 0))
    assert driven.send(0, driven.log(0, 7, 42), load) == [m.Applied(1), m.Loaded(driven.entry(0), 42)]


@pytest.mark.parametrize(
    "op, expected, memory",
    [
        (m.LockedOp.XCHG, 0, 5),
        (m.LockedOp.XADD, 0, 47),
        (m.LockedOp.CMPXCHG, 42, 5),
        (m.LockedOp.CMPXCHG, 1, 42),
    ],
)
def test_a_locked_operation_returns_the_old_value(op: m.LockedOp, expected: int, memory: int) -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.send(0, driven.log(0, 7, 42))
    locked = m.Locked(driven.entry(0), (WRITE, 7 << 12, FIRST_PFN + 7, 8, 5), op, expected)
    assert driven.send(0, locked) == [m.Loaded(driven.entry(0), 42)]
    assert driven.word(7) == memory


def test_a_flush_waits_until_every_vcpu_in_guest_mode_has_left_its_entry() -> None:
    driven = Driven(2)
    for vcpu in (0, 1):
        driven.enter(vcpu)
        driven.map_page(vcpu, 7, WRITE)
    entries = [driven.entry(0), driven.entry(1)]
    driven.host(m.Unmap(7))
    assert [driven.kicks(0), driven.kicks(1)] == [[entries[0]], [entries[1]]]
    assert not driven.done
    driven.send(0, m.Exit(entries[0], m.ExternalInterruptExit()))
    assert not driven.done
    driven.send(1, m.Exit(entries[1], m.InvlpgExit(0)))  # any exit of that entry is the answer
    assert len(driven.done) == 1


def test_what_was_logged_before_the_answer_is_applied_before_the_flush_returns() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.host(m.Unmap(7))
    entry = driven.entry(0)
    driven.send(0, driven.log(0, 7, 42), m.Exit(entry, m.ExternalInterruptExit()))
    names = [
        type(event) for event in driven.events if isinstance(event, Accesses | FlushAnswered | FrameRevoked)
    ]
    assert names == [Accesses, FlushAnswered, FrameRevoked]
    assert driven.word(7) == 42


def test_a_kicked_vcpu_flushes_when_it_enters_again() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7)
    driven.host(m.Unmap(7))
    driven.take(0)
    (entered,) = driven.send(0, m.Exit(driven.entry(0), m.ExternalInterruptExit()))
    assert isinstance(entered, m.Entered) and entered.flush


def test_a_vcpu_outside_guest_mode_is_not_kicked() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.map_page(0, 7)
    driven.host(m.Unmap(7))
    assert driven.kicks(1) == []
    assert [event.targets for event in driven.events if isinstance(event, FlushRequested)] == [
        [(0, driven.entry(0))]
    ]


def test_an_exit_abandons_the_walk_before_it() -> None:
    driven = Driven(1)
    driven.enter(0)
    entry = driven.entry(0)
    (answer,) = driven.send(0, m.Walk(entry, 1, 7 << 12, 0), m.Exit(entry, m.ExternalInterruptExit()))
    assert isinstance(answer, m.Entered)


def test_an_interrupt_kicks_its_target_and_is_taken_at_the_next_entry() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    (sender,) = driven.send(0, m.Exit(driven.entry(0), m.SendIpiExit([1], 0xF0)))
    assert isinstance(sender, m.Entered)
    assert driven.kicks(1) == [driven.entry(1)]
    (target,) = driven.send(1, m.Exit(driven.entry(1), m.ExternalInterruptExit()))
    assert isinstance(target, m.Entered) and target.interrupts == [0xF0]


def test_a_halted_vcpu_is_entered_when_an_interrupt_comes() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    assert driven.send(1, m.Exit(driven.entry(1), m.HaltExit())) == []
    driven.send(0, m.Exit(driven.entry(0), m.SendIpiExit([1], 0xF0)))
    (entered,) = driven.take(1)
    assert isinstance(entered, m.Entered) and entered.interrupts == [0xF0]


def test_halting_with_an_interrupt_pending_does_not_wait() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    driven.send(0, m.Exit(driven.entry(0), m.SendIpiExit([1], 0xF0)))
    driven.take(1)
    (entered,) = driven.send(1, m.Exit(driven.entry(1), m.HaltExit()))
    assert isinstance(entered, m.Entered) and entered.interrupts == [0xF0]


def test_a_guest_fault_is_injected() -> None:
    driven = Driven(1)
    driven.enter(0)
    beyond = 1 << 30
    exit_ = m.PageFaultExit(beyond, 0, m.Instruction(0))
    (entered,) = driven.send(0, m.Exit(driven.entry(0), exit_))
    assert isinstance(entered, m.Entered) and entered.inject == m.InjectedFault(0, beyond)


def test_a_refused_register_write_is_a_general_protection_fault() -> None:
    driven = Driven(1)
    driven.enter(0)
    write = m.RegisterWriteExit(m.ControlRegister.CR3, 1 << 50)
    (entered,) = driven.send(0, m.Exit(driven.entry(0), write))
    assert isinstance(entered, m.Entered) and entered.general_protection and entered.completed is None


def test_giving_a_vcpu_up_releases_who_waits_for_it_and_drops_its_log() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.host(m.Unmap(7))
    assert not driven.done
    driven.submit(VcpuSent(0, driven.log(0, 7, 42)))
    driven.give_up(0)
    assert len(driven.done) == 1
    assert driven.word(7) == 0
    assert isinstance(driven.take(0)[-1], m.Ended)


def test_messages_of_a_given_up_vcpu_change_nothing() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.give_up(0)
    driven.take(0)
    log = m.Log(1, [(WRITE, 7 << 12, FIRST_PFN + 7, 8, 42)])
    assert driven.send(0, log, m.Enter()) == []
    assert driven.word(7) == 0


def test_a_vcpu_attaches_again_with_an_empty_tlb_and_its_registers() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7)
    driven.give_up(0)
    driven.take(0)
    driven.submit(Attached(0, 9))
    driven.enter(0)
    assert driven.entry(0) == 1
    assert driven.map_page(0, 7).pfn == FIRST_PFN + 7


def test_a_detach_after_an_exit_takes_effect_when_the_exit_is_handled() -> None:
    driven = Driven(1)
    driven.enter(0)
    (ended,) = driven.send(0, m.Exit(driven.entry(0), m.ExternalInterruptExit()), m.Detach())
    assert ended == m.Ended("detached")
    assert driven.runner.machine.idle


def test_a_halted_vcpu_can_detach() -> None:
    driven = Driven(1)
    driven.enter(0)
    assert driven.send(0, m.Exit(driven.entry(0), m.HaltExit()), m.Detach()) == [m.Ended("detached")]


def test_a_guest_without_a_root_table_shuts_down() -> None:
    driven = Driven(1)
    driven.host(m.SetRegisters(0, 0x80010011, 1 << 40, 0x20, 0xD00))
    (ended,) = driven.send(0, m.Enter())
    assert isinstance(ended, m.Ended) and ended.code == "shutdown"


def test_paced_host_operations_wait_for_the_guest_and_an_unpaced_one_starts_them() -> None:
    driven = Driven(1, host_rate=100.0)
    driven.enter(0)
    driven.host(m.TestAge(3), paced=True)
    assert not driven.done
    driven.map_page(0, 7, WRITE)
    for _ in range(10):
        driven.send(0, driven.log(0, 7, 1))
    assert len(driven.done) == 1
    driven.host(m.TestAge(3), paced=True)
    assert len(driven.done) == 1
    driven.host(m.TestAge(3))
    assert len(driven.done) == 3


def test_a_parked_operation_goes_on_when_nothing_else_is_ready() -> None:
    driven = Driven(1, park_rate=1.0, park_steps=1_000_000)
    driven.enter(0)
    assert driven.map_page(0, 7).pfn == FIRST_PFN + 7
    parked = [
        name
        for name, count in driven.runner.machine.coverage.counters().items()
        if "parked" in name and count
    ]
    assert len(parked) > 3


def test_a_memory_point_lets_only_the_hardware_act() -> None:
    driven = Driven(2, park_rate=1.0, park_steps=1)
    driven.enter(0)
    driven.enter(1)
    driven.map_page(1, 9, WRITE)
    # vCPU 0 faults while vCPU 1 has much to store: stores fall into the fault's memory points.
    for _ in range(4):
        driven.submit(VcpuSent(1, m.Log(driven.entry(1), [(WRITE, 9 << 12, FIRST_PFN + 9, 8, 2)] * 64)))
    fault = m.PageFaultExit(11 << 12, 4, m.Instruction(0))
    driven.submit(VcpuSent(0, m.Exit(driven.entry(0), fault)))
    driven.settle()
    counters = driven.runner.machine.coverage.counters()
    assert counters["point.GPTE_READ.store"] or counters["point.READ_GUEST_MEMORY.store"]
    assert counters["point.GPTE_READ.operation"] == counters["point.READ_GUEST_MEMORY.operation"] == 0


@pytest.mark.parametrize(
    "body, complaint",
    [
        (m.Log(1, [(WRITE, 0, 5, 8, 0)]), "host frame 5"),
        (m.Load(1, (0, 0, 1 << 39, 8, 0)), "host frame"),
        (m.Log(1, [(WRITE, 0xFFC, FIRST_PFN, 8, 0)]), "crosses a page"),
        (m.Load(1, (0, 0, FIRST_PFN, 3, 0)), "not 3"),
        (m.Exit(1, m.PageFaultExit(0xFFF, 0, m.Instruction(0, 8))), "crosses a page"),
        (m.Walk(1, 1, 0, 0), None),
    ],
)
def test_an_access_to_what_is_not_there_is_refused(body: m.VcpuMessage, complaint: str | None) -> None:
    refusal = Driven(1).runner.machine.refusal(0, body)
    if complaint is None:
        assert refusal is None
    else:
        assert refusal is not None and complaint in refusal[1]


def test_a_flush_that_is_not_awaited_returns_at_once() -> None:
    driven = Driven(1, mutant=m.Mutant.FLUSH_NOT_AWAITED)
    driven.enter(0)
    driven.map_page(0, 7)
    driven.host(m.Unmap(7))
    assert len(driven.done) == 1


def test_entries_are_numbered_from_one_in_each_incarnation() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.send(0, m.Exit(1, m.ExternalInterruptExit()))
    driven.give_up(0)
    driven.submit(Attached(0, 5))
    driven.take(0)
    driven.enter(0)
    assert [event.entry for event in driven.events if isinstance(event, Entered)] == [1, 2, 1]


def test_the_operations_under_way_are_named() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7)
    driven.submit(HostAsked(3, m.Unmap(7)))
    driven.settle()
    (operation,) = driven.runner.machine.operations_under_way()
    assert (operation["name"], operation["at"]) == ("host.unmap", "KICK")


def test_an_operation_that_waits_for_another_one_is_not_ready() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7)
    # The first waits for the kicked vCPU, the others for the first.
    for operation in (m.Move(7, writable=False), m.Move(7, writable=True), m.Move(7, writable=True)):
        driven.submit(HostAsked(1, operation))
    driven.settle()
    assert not driven.done
    driven.send(0, m.Exit(driven.entry(0), m.ExternalInterruptExit()))
    assert len(driven.done) == 3


def test_an_incarnation_enters_when_the_operation_of_the_one_before_has_returned() -> None:
    driven = Driven(1, park_rate=1.0, park_steps=100)
    driven.enter(0)
    fault = m.Exit(1, m.PageFaultExit(7 << 12, 4, m.Instruction(0)))
    driven.submit(VcpuSent(0, fault))
    driven.runner.step(5, resume_parked=False)
    assert driven.runner.machine.operations_under_way()
    driven.submit(GivenUp(0, "given-up", "silent"))
    driven.submit(Attached(0, 9))
    driven.submit(VcpuSent(0, m.Enter()))
    driven.settle()
    entered = [body for body in driven.take(0) if isinstance(body, m.Entered)]
    assert [body.entry for body in entered] == [1]
    assert driven.map_page(0, 7).pfn == FIRST_PFN + 7


def test_registers_are_set_before_the_first_entry_only() -> None:
    driven = Driven(1)
    registers = m.SetRegisters(0, 0x80010011, 0, 0x20, 0xD00)
    assert driven.runner.machine.host_refusal(registers) is None
    driven.enter(0)
    assert "entered already" in (driven.runner.machine.host_refusal(registers) or "")
    driven.give_up(0)
    assert "entered already" in (driven.runner.machine.host_refusal(registers) or "")
