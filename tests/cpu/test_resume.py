"""A processor that takes a lost one's place goes on with its program as that one would have."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shadowmmu.cpu import VcpuCore
from shadowmmu.cpu.execution import Execution
from shadowmmu.cpu.program import Halt, Invlpg, LockedAccess, Op, UsedLoad, WriteRegister
from shadowmmu.cpu.resume import load_state, resume
from shadowmmu.cpu.vcpu_core import STATE_INTERVAL
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import RemoteProtocolError
from shadowmmu.protocol.messages import Asked, Resumption, TrailStep
from tests.cpu.test_vcpu_core import RIGHTS, WRITE, Bench, Script, page, touches

LOCKED = LockedAccess(0x1000, m.LockedOp.XCHG, 1)
RUN = touches(page(1), page(2, WRITE), page(3))


def entered(**what: Any) -> m.Entered:
    return m.Entered(1, **what)


def followed(
    *ops: Op, trail: tuple[TrailStep, ...] = (), accesses: int = 0, share: int = 1 << 20
) -> Execution:
    """A program of these instructions, after this trail. Runs are copied: a program writes in them."""
    program = Script(*(msgspec.structs.replace(op) for op in ops))
    execution = Execution(program, share)
    resume(execution, Resumption(None, list(trail), accesses))
    return execution


def told(execution: Execution) -> list[object]:
    assert isinstance(execution.program, Script)
    return execution.program.told


def test_accesses_are_skipped_and_values_are_told() -> None:
    trail = (TrailStep(3, Asked.LOAD, m.Loaded(1, 7)), TrailStep(0, Asked.LOCKED, m.Loaded(1, 8)))
    execution = followed(RUN, UsedLoad(0x1000), LOCKED, RUN, trail=trail, accesses=2)
    assert told(execution) == [("retired", "UsedLoad", 7), ("retired", "LockedAccess", 8)]
    assert execution.instructions == 7
    assert execution.fetch().position == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "answer, position, heard",
    [
        (entered(), 1, []),
        (entered(inject=m.InjectedFault(7, 0x2008)), 1, [("page_fault", 7, 0x2008)]),
        (entered(completed=m.Completed()), 2, []),
    ],
    ids=["executed again", "injected", "emulated"],
)
def test_a_page_fault_ends_in_one_of_three_ways(
    answer: m.Entered, position: int, heard: list[object]
) -> None:
    execution = followed(RUN, trail=(TrailStep(1, Asked.PAGE_FAULT, answer),))
    assert execution.fetch().position == execution.instructions == position  # type: ignore[union-attr]
    assert told(execution) == heard


def test_an_instruction_that_exits_is_executed_by_its_exit() -> None:
    trail = (
        TrailStep(0, Asked.INVLPG, entered(completed=m.Completed())),
        TrailStep(0, Asked.REGISTER_WRITE, entered(general_protection=True)),
        TrailStep(0, Asked.HALT, entered(interrupts=[40])),
    )
    write = WriteRegister(m.ControlRegister.CR3, 0)
    execution = followed(Invlpg(0x1000), write, Halt(), trail=trail)
    assert told(execution) == [
        ("retired", "Invlpg", 0),
        ("retired", "WriteRegister", 0),
        "general_protection",
        ("retired", "Halt", 0),
        ("interrupt", 40),
    ]


def test_a_fault_without_an_exit_is_that_of_the_next_access() -> None:
    execution = followed(RUN, trail=(TrailStep(2, Asked.WALK, m.WalkFault(1, 1, 6)),))
    assert told(execution) == [("page_fault", 6, 0x3008)]


def test_the_program_idles_at_the_same_instruction() -> None:
    step = TrailStep(2, Asked.EXTERNAL_INTERRUPT, entered(interrupts=[40]))
    assert told(followed(RUN, trail=(step,), share=2)) == ["idle", ("interrupt", 40)]
    assert told(followed(RUN, trail=(step,), share=3)) == [("interrupt", 40)]


@pytest.mark.parametrize(
    "trail, accesses",
    [
        ([TrailStep(0, Asked.LOAD, m.Loaded(1, 7))], 0),
        ([TrailStep(3, Asked.LOCKED, m.Loaded(1, 7))], 0),
        ([TrailStep(3, Asked.LOAD, entered())], 0),
        ([TrailStep(3, Asked.PAGE_FAULT, m.Loaded(1, 7))], 0),
        ([TrailStep(3, Asked.EXTERNAL_INTERRUPT, entered(inject=m.InjectedFault(0, 0)))], 0),
        ([TrailStep(3, Asked.INVLPG, entered())], 0),
        ([], 4),
    ],
)
def test_a_trail_of_another_program_is_refused(trail: list[TrailStep], accesses: int) -> None:
    with pytest.raises(RemoteProtocolError, match="does not fit the program"):
        followed(RUN, UsedLoad(0x1000), trail=tuple(trail), accesses=accesses)


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="does not fit the program"):
        resume(Execution(Script(), 1), Resumption(b"\xc1"))


# --- the core -------------------------------------------------------------------------------------------------------


def replacement(*ops: Op, resumption: Resumption) -> VcpuCore:
    core = VcpuCore(m.RunConfig(ops=1 << 20), 0, 1, Script(*ops))
    core.start()
    core.take_output()
    core.receive(m.Entered(1, resume=resumption, interrupts=[41]))
    return core


def test_a_core_follows_the_trail_before_it_takes_the_rest_of_the_entry() -> None:
    trail = [TrailStep(0, Asked.LOAD, m.Loaded(1, 7))]
    core = replacement(UsedLoad(0x1000), RUN, Halt(), resumption=Resumption(None, trail, 2))
    assert core.program.told == [("retired", "UsedLoad", 7), ("interrupt", 41)]  # type: ignore[attr-defined]
    assert core.instructions == 3
    assert core.in_guest
    core.run(100)
    assert core.take_output() == [m.Walk(1, 1, 0x3008, 0)]


def test_the_first_request_of_a_resumed_program_brings_its_state() -> None:
    core = replacement(UsedLoad(0x1000), Invlpg(0x5000), resumption=Resumption(None, [], 0))
    core.tlb.insert(0x1000, 1, 1, RIGHTS)
    core.run(100)
    (load,) = core.take_output()
    assert isinstance(load, m.Load)
    assert load.state is not None
    assert load_state(load.state).instructions == 0


def test_only_a_program_that_was_not_begun_is_resumed() -> None:
    bench = Bench(Invlpg(0x1000))
    bench.run()
    with pytest.raises(RemoteProtocolError, match="resumes a program that is being executed"):
        bench.enter(resume=Resumption())


def test_every_so_many_requests_one_brings_the_state_of_before_its_instruction() -> None:
    bench = Bench(*[Invlpg(0x1000)] * (2 * STATE_INTERVAL))
    states = []
    for _ in range(2 * STATE_INTERVAL):
        (exit_,) = bench.run()
        assert isinstance(exit_, m.Exit)
        states.append(exit_.state)
        bench.enter()
    sent = [(number, load_state(state)) for number, state in enumerate(states) if state is not None]
    assert [number for number, _ in sent] == [STATE_INTERVAL - 1, 2 * STATE_INTERVAL - 1]
    assert [state.instructions for _, state in sent] == [STATE_INTERVAL - 1, 2 * STATE_INTERVAL - 1]
    assert sent[0][1].counts["exits.invlpg"] == STATE_INTERVAL - 1


def test_who_abandons_a_walk_whose_fault_might_not_exit_says_where_its_program_is() -> None:
    """The service cannot know whether the program has taken the fault that it sent."""
    for mask, match, says in ((0, 0, False), (1, 1, True)):
        bench = Bench(RUN)
        bench.core.receive(m.Attached(0, 1, vpid=True, heartbeat=1.0, pfec_mask=mask, pfec_match=match))
        walk = bench.walk()
        bench.core.receive(m.Kick(1))
        (exit_,) = bench.core.take_output()
        assert isinstance(exit_, m.Exit)
        assert (exit_.state is not None) is says
        bench.core.receive(m.WalkFault(walk.entry, walk.walk, 0))
        assert bench.program.told == []


def test_an_interrupt_finds_the_program_at_its_next_instruction_whether_or_not_it_was_fetched_before() -> (
    None
):
    """Nobody can know it, so it must make no difference."""
    fetches: list[list[object]] = []
    for runs in (0, 100):

        class Noting(Script):
            def fetch(self) -> Op:
                if "fetched" not in self.told:
                    self.told.append("fetched")
                return super().fetch()

        core = VcpuCore(m.RunConfig(ops=1 << 20), 0, 1, program := Noting(UsedLoad(0x1000)))
        core.start()
        core.receive(m.Entered(1))
        core.run(runs)
        core.receive(m.Kick(1))
        core.receive(m.Entered(2, interrupts=[40]))
        fetches.append(program.told)
    assert fetches == [["fetched", ("interrupt", 40)]] * 2
