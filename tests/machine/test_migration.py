"""vCPUs that the host moves between physical processors, message by message and in whole runs."""

from __future__ import annotations

from collections import Counter

from shadowmmu.checker import Rule
from shadowmmu.machine import HostProgram
from shadowmmu.protocol import messages as m
from tests.machine.guest import WRITE, Driven
from tests.machine.test_inprocess import Run, config


def test_a_vcpu_begins_on_the_processor_of_its_own_number() -> None:
    driven = Driven(2)
    for vcpu in (0, 1):
        (entered,) = driven.send(vcpu, m.Enter())
        assert isinstance(entered, m.Entered)
        assert entered.processor == vcpu


def test_a_vcpu_that_is_moved_leaves_the_guest_and_flushes_on_the_new_processor() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.host(m.Migrate(0, 3))
    assert driven.kicks(0) == [driven.entry(0)]
    assert not driven.done
    (entered,) = driven.send(0, m.Exit(driven.entry(0), m.ExternalInterruptExit()))
    assert isinstance(entered, m.Entered)
    assert (entered.processor, entered.flush) == (3, True)
    assert len(driven.done) == 1


def test_a_vcpu_that_is_there_already_is_not_disturbed() -> None:
    driven = Driven(1)
    driven.enter(0)
    driven.host(m.Migrate(0, 0))
    assert driven.kicks(0) == []
    assert len(driven.done) == 1


def test_only_vcpus_that_exist_are_moved() -> None:
    machine = Driven(1).runner.machine
    assert machine.host_refusal(m.Migrate(0, 5)) is None
    assert machine.host_refusal(m.Migrate(1, 5)) == "there is no vCPU 1"


def test_the_host_moves_vcpus_now_and_then() -> None:
    program = HostProgram(config(), 3)
    operations = [program.next_operation() for _ in range(2000)]
    moves = Counter(
        (operation.vcpu, operation.processor) for operation in operations if isinstance(operation, m.Migrate)
    )
    assert set(moves) == {(vcpu, processor) for vcpu in range(3) for processor in range(3)}
    assert 0 < moves.total() < 200


def test_a_run_whose_vcpus_move_is_clean() -> None:
    run = Run(config(ops=20_000, host_rate=20.0), 3)
    assert run.violation is None
    assert run.result.counters["vcpu.migrations"] > 0


def test_without_the_flush_translations_of_an_earlier_stay_reach_frames_that_are_gone() -> None:
    changes = {"ops": 20_000, "host_rate": 60.0, "park_rate": 0.2, "seed": 5}
    violation = Run(config(profile="fixed-stale-on-old-pcpu", **changes), 3).violation
    assert violation is not None
    assert violation.rule in (Rule.HOST_FRAME_USE_AFTER_REVOKE, Rule.STALE_TRANSLATION)
    assert Run(config(**changes), 3).violation is None
