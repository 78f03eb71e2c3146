"""What a vCPU's next worker is told of the program: the state that took effect last, and what has happened since."""

from __future__ import annotations

import pytest

from shadowmmu.machine import Attached, GivenUp, VcpuSent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.messages import TRAIL_LIMIT, Asked, TrailStep
from tests.machine.guest import FIRST_PFN, WRITE, Driven


def lose(driven: Driven, vcpu: int = 0) -> None:
    driven.submit(GivenUp(vcpu, "given-up", "silent"))


def entered_again(driven: Driven, vcpu: int = 0, *, resume: bool = True) -> m.Entered:
    """Another worker's first entry."""
    driven.take(vcpu)
    driven.submit(Attached(vcpu, 9, resume=resume))
    (entered,) = (body for body in driven.send(vcpu, m.Enter()) if isinstance(body, m.Entered))
    return entered


def resumption(driven: Driven, vcpu: int = 0) -> m.Resumption:
    lose(driven, vcpu)
    resumed = entered_again(driven, vcpu).resume
    assert resumed is not None
    return resumed


def load(driven: Driven, page: int, state: bytes | None = None) -> m.Load:
    return m.Load(driven.entry(0), (0, page << 12, FIRST_PFN + page, 8, 0), state)


def mapped(vcpus: int = 1) -> Driven:
    """Page 7 is mapped: that was a page fault that was executed again, of which the program has not heard."""
    driven = Driven(vcpus)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    return driven


def test_a_program_that_was_told_nothing_begins_at_its_beginning() -> None:
    assert resumption(mapped()) == m.Resumption()


def test_without_resume_the_program_begins_anew() -> None:
    driven = mapped()
    driven.send(0, driven.log(0, 7, 5), load(driven, 7))
    lose(driven)
    assert entered_again(driven, resume=False).resume is None
    assert resumption(driven) == m.Resumption()


def test_accesses_that_were_applied_are_counted_and_values_that_were_loaded_are_kept() -> None:
    driven = mapped()
    driven.send(0, driven.log(0, 7, 5), driven.log(0, 7, 6), load(driven, 7), driven.log(0, 7, 7))
    assert resumption(driven) == m.Resumption(None, [TrailStep(2, Asked.LOAD, m.Loaded(2, 6))], 1)


def test_of_a_log_that_was_applied_in_part_that_part_counts() -> None:
    driven = mapped()
    accesses = [(WRITE, 7 << 12, FIRST_PFN + 7, 8, value) for value in range(1, 65)]
    driven.submit(VcpuSent(0, m.Log(driven.entry(0), accesses)))
    driven.runner.step(1)
    assert 0 < driven.word(7) < 64
    assert resumption(driven).accesses == driven.word(7)


def test_what_was_not_applied_has_not_happened() -> None:
    driven = mapped()
    for body in (driven.log(0, 7, 5), load(driven, 7), m.Exit(driven.entry(0), m.InvlpgExit(0x1000))):
        driven.submit(VcpuSent(0, body))
    assert resumption(driven) == m.Resumption()


def test_a_state_takes_the_place_of_what_was_before_it_when_it_takes_effect() -> None:
    driven = mapped()
    driven.send(0, driven.log(0, 7, 5), load(driven, 7, b"state"), driven.log(0, 7, 6))
    driven.submit(VcpuSent(0, load(driven, 7, b"never applied")))
    assert resumption(driven) == m.Resumption(b"state", [TrailStep(0, Asked.LOAD, m.Loaded(2, 5))], 1)


def test_a_trail_goes_on_over_several_incarnations() -> None:
    driven = mapped()
    driven.send(0, driven.log(0, 7, 5), load(driven, 7))
    first = resumption(driven)
    assert resumption(driven) == first
    driven.send(0, driven.log(0, 7, 6), load(driven, 7))
    assert resumption(driven).trail == [*first.trail, TrailStep(1, Asked.LOAD, m.Loaded(1, 6))]


def test_the_result_of_an_exit_that_was_under_way_is_told_to_the_next_worker() -> None:
    driven = Driven(1, park_rate=1.0, park_steps=100)
    driven.enter(0)
    driven.submit(VcpuSent(0, m.Exit(1, m.RegisterWriteExit(m.ControlRegister.CR0, 1 << 31))))
    driven.runner.step(3, resume_parked=False)
    assert driven.runner.machine.operations_under_way()
    lose(driven)
    entered = entered_again(driven)
    assert not entered.general_protection
    assert entered.resume is not None
    (step,) = entered.resume.trail
    assert (step.accesses, step.asked) == (0, Asked.REGISTER_WRITE)
    assert isinstance(step.answer, m.Entered)
    assert step.answer.general_protection


def test_a_new_program_hears_nothing_of_an_exit_of_the_old_one() -> None:
    driven = Driven(1, park_rate=1.0, park_steps=100)
    driven.enter(0)
    driven.submit(VcpuSent(0, m.Exit(1, m.InvlpgExit(0x1000))))
    driven.runner.step(2, resume_parked=False)
    assert driven.runner.machine.operations_under_way()
    lose(driven)
    assert entered_again(driven, resume=False).resume is None
    assert resumption(driven) == m.Resumption()


def test_an_interrupt_that_nobody_was_there_to_take_is_taken_by_the_next_worker() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    lose(driven)
    driven.send(1, m.Exit(1, m.SendIpiExit([0], 40)))
    assert entered_again(driven).interrupts == [40]


def test_an_interrupt_that_was_told_is_in_the_trail() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    driven.send(1, m.Exit(1, m.SendIpiExit([0], 40)))
    driven.send(0, m.Exit(1, m.ExternalInterruptExit()))
    (step,) = resumption(driven).trail
    assert step.asked is Asked.EXTERNAL_INTERRUPT
    assert isinstance(step.answer, m.Entered)
    assert step.answer.interrupts == [40]


def test_a_halted_program_halts_again() -> None:
    driven = Driven(2)
    driven.enter(0)
    driven.enter(1)
    driven.send(0, m.Exit(1, m.HaltExit(), b"before HLT"))
    lose(driven)
    assert entered_again(driven).resume == m.Resumption(b"before HLT")
    assert driven.send(0, m.Exit(1, m.HaltExit())) == []
    driven.send(1, m.Exit(1, m.SendIpiExit([0], 40)))
    (entered,) = driven.take(0)
    assert isinstance(entered, m.Entered)
    assert entered.interrupts == [40]


@pytest.mark.parametrize("bypass", [True, False])
def test_a_fault_that_does_not_exit_is_a_step_and_one_that_does_is_none(bypass: bool) -> None:
    driven = Driven(1, profile="pre-patch+fixed", bypass_guest_pf=bypass)
    driven.enter(0)
    not_mapped = 0x7F << 39
    fault = m.PageFaultExit(not_mapped, 0, m.Instruction(0))
    driven.send(0, m.Exit(1, fault))  # the shadow tables know by now that the guest maps nothing there
    lose(driven)
    entered_again(driven, resume=False)
    (answer,) = driven.send(0, m.Walk(1, 1, not_mapped, 0))
    assert isinstance(answer, m.WalkFault)
    assert driven.runner.machine.page_fault_filter.exits(answer.error_code) is not bypass
    assert resumption(driven).trail == ([TrailStep(0, Asked.WALK, answer)] if bypass else [])


@pytest.mark.parametrize("state", [None, b"late"])
def test_a_program_whose_state_was_not_sent_for_too_long_cannot_be_resumed(state: bytes | None) -> None:
    driven = mapped()
    for _ in range(TRAIL_LIMIT + 1):
        driven.submit(VcpuSent(0, load(driven, 7)))
    driven.settle()
    driven.send(0, load(driven, 7, state))
    lose(driven)
    driven.settle()
    driven.take(0)
    driven.submit(Attached(0, 9, resume=True))
    driven.settle()
    ended = [body.code for body in driven.take(0) if isinstance(body, m.Ended)]
    assert ended == (["not-resumable"] if state is None else [])
