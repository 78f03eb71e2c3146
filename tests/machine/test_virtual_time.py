from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.checker import Checker
from shadowmmu.cpu.loads import Load, LoadConfig, memory_needed
from shadowmmu.machine.timed_config import Cause, HostActor, HostActorKind, TimedConfig
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol import events as ev
from shadowmmu.protocol.messages import RunConfig, Workload
from tests.machine.costs import COSTS, FREE, multiplied

WORKLOADS = [workload for workload in Workload if workload is not Workload.MODES]
DIRTY_LOG = HostActor(kind=HostActorKind.DIRTY_LOG, interval=50_000)
MIXED_HOST = HostActor(kind=HostActorKind.MIXED, interval=20_000)


def workload(
    which: Workload = Workload.MIXED, vcpus: int = 3, profile: str = "fixed", seed: int = 1, **more: object
) -> TimedConfig:
    """A run of a stress run's workload."""
    run = RunConfig(workload=which, profile=profile, ops=1500 * vcpus, seed=seed, mmu_pages=256)
    return msgspec.convert({"run": run, "vcpus": vcpus, "start_spread": 0, **more}, TimedConfig, strict=False)


def load(
    which: Load = Load.FORK, vcpus: int = 2, pages: int = 0, profile: str = "linux-3.1", **more: object
) -> TimedConfig:
    """A run of a load."""
    config = LoadConfig(load=which, pages=pages)
    memory = max(1024, memory_needed(config, vcpus))
    run = RunConfig(profile=profile, memory_pages=memory, mmu_pages=128 * vcpus)
    given = {"run": run, "vcpus": vcpus, "load": config, "iterations": 2, "start_spread": 0, **more}
    return msgspec.convert(given, TimedConfig, strict=False)


def events_of(config: TimedConfig) -> list[tuple[int, ev.Event]]:
    events: list[tuple[int, ev.Event]] = []
    run_timed(config, COSTS, lambda cycles, event: events.append((cycles, event)))
    return events


@pytest.mark.parametrize("which", WORKLOADS)
def test_a_run_executed_again_gives_the_same_and_breaks_no_rule(which: Workload) -> None:
    config = workload(which, host=[MIXED_HOST])
    checker = Checker()
    violations = []

    def check(_: int, event: ev.Event) -> None:
        violation = checker.feed_all([event])
        if violation is not None:
            violations.append(violation)

    assert run_timed(config, COSTS, check) == run_timed(config, COSTS)
    assert violations == []


def test_a_run_does_not_depend_on_the_process_that_executes_it() -> None:
    config = load(Load.FORK, vcpus=3)
    script = (
        "import msgspec, sys; from shadowmmu.machine.virtual_time import run_timed;"
        "from shadowmmu.machine.timed_config import TimedConfig; from tests.machine.costs import COSTS;"
        "print(run_timed(msgspec.json.decode(sys.argv[1], type=TimedConfig), COSTS).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, msgspec.json.encode(config).decode()],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert digests == {run_timed(config, COSTS).digest}


@given(st.sampled_from(WORKLOADS), st.integers(1, 5), st.integers(0, 1000), st.integers(2, 50))
@settings(max_examples=12, deadline=None)
def test_if_everything_costs_so_many_times_as_much_a_run_takes_so_many_times_as_long(
    which: Workload, vcpus: int, seed: int, factor: int
) -> None:
    config = workload(which, vcpus, "linux-3.1", seed)
    once = run_timed(config, COSTS)
    scaled = run_timed(config, multiplied(COSTS, factor))
    assert scaled.cycles == factor * once.cycles
    assert scaled.causes == {name: factor * cycles for name, cycles in once.causes.items()}
    assert scaled.lock_held == factor * once.lock_held
    assert scaled.counters == once.counters


@pytest.mark.parametrize("config", [load(vcpus=1), workload(vcpus=1)], ids=["load", "workload"])
def test_a_vcpu_alone_waits_for_nobody(config: TimedConfig) -> None:
    result = run_timed(config, COSTS)
    for cause in (Cause.LOCK_WAIT, Cause.KICK, Cause.KICK_WAIT, Cause.INTERRUPTED, Cause.WAIT, Cause.IDLE):
        assert result.causes[cause.value] == 0
    assert result.vcpus[0].cycles == result.cycles


@pytest.mark.parametrize("which", Load)
def test_every_vcpus_time_is_accounted_for(which: Load) -> None:
    result = run_timed(load(which, vcpus=4, host=[DIRTY_LOG]), COSTS)
    longest = max(latency.max for latency in result.latencies.values())
    for vcpu in result.vcpus:
        # Whoever waits at the end has not been told yet for how long.
        assert result.cycles - 2 * longest <= vcpu.cycles <= result.cycles + 2 * longest


def test_nothing_takes_time_if_nothing_costs_anything() -> None:
    result = run_timed(load(vcpus=3), FREE)
    assert result.cycles == 0
    assert result.counters["kvm.pf_fixed"] > 0


def test_mmu_lock_has_one_holder_at_a_time_and_goes_to_who_waits_longest() -> None:
    free_at = 0
    holder = None
    waiting: list[int] = []
    waited = 0
    for cycles, event in events_of(load(Load.FORK, vcpus=5, iterations=1)):
        match event:
            case ev.LockWaited(op):
                waiting.append(op)
            case ev.LockTaken(op):
                assert holder is None
                assert cycles >= free_at
                if op in waiting:  # else it was free when this one came
                    assert waiting.pop(0) == op
                    waited += 1
                holder = op
            case ev.LockReleased(op):
                assert holder == op
                holder, free_at = None, cycles
            case _:
                pass
    assert waited > 100


def test_the_times_of_a_vcpu_do_not_decrease() -> None:
    last: defaultdict[int, int] = defaultdict(int)
    for cycles, event in events_of(workload(Workload.MIXED, 4, host=[MIXED_HOST])):
        vcpu = getattr(event, "vcpu", None)
        if vcpu is not None and vcpu >= 0 and not isinstance(event, ev.OperationStarted):
            assert cycles >= last[vcpu], event
            last[vcpu] = cycles
    assert len(last) == 4


def test_a_flush_lasts_at_least_as_long_as_its_kicks_and_their_answers() -> None:
    flushes = run_timed(load(Load.REMAP, vcpus=3), COSTS).latencies["flush_cycles"]
    assert flushes.count > 10
    assert flushes.p50 >= COSTS.kick + COSTS.kick_send + COSTS.kick_acknowledge


def test_a_kick_interrupts_the_guests_own_work() -> None:
    longest = 1_000_000
    busy = msgspec.structs.replace(COSTS, guest=dict.fromkeys(COSTS.guest, longest))
    flushes = run_timed(load(Load.FORK, vcpus=4), busy).latencies["flush_cycles"]
    assert flushes.count > 10
    assert flushes.max < longest


def test_without_oos_shadow_tables_stay_in_sync_and_stores_to_them_are_emulated() -> None:
    with_it = run_timed(load(Load.REMAP), COSTS).counters
    without = run_timed(load(Load.REMAP, oos_shadow=False), COSTS).counters
    assert with_it["kvm.mmu_unsync.highest"] > 0
    assert without["kvm.mmu_unsync.highest"] == 0
    assert without["kvm.mmu_pte_write"] > with_it["kvm.mmu_pte_write"]


def test_a_dirty_log_that_is_read_more_often_costs_more_write_faults() -> None:
    def faults(interval: int) -> float:
        host = [HostActor(kind=HostActorKind.DIRTY_LOG, interval=interval)]
        counters = run_timed(load(Load.TOUCH, 2, pages=64, host=host, iterations=20), COSTS).counters
        return counters["exits.page_fault"]

    assert faults(100_000) > faults(1_000_000)


def test_host_threads_do_what_they_are_there_for() -> None:
    host = [HostActor(kind=kind, interval=30_000) for kind in HostActorKind]
    names = Counter(
        event.name
        for _, event in events_of(load(Load.TOUCH, 2, pages=64, host=host, iterations=10))
        if isinstance(event, ev.OperationStarted) and event.vcpu < 0
    )
    assert {"host.get_dirty_log", "host.unmap", "host.age"} <= set(names)


def test_vcpus_begin_at_times_that_the_seed_draws() -> None:
    def begins(seed: int) -> list[int]:
        config = load(Load.FORK, vcpus=4, start_spread=50_000)
        run = msgspec.structs.replace(config.run, seed=seed)
        config = msgspec.structs.replace(config, run=run)
        return [vcpu.causes[Cause.IDLE.value] for vcpu in run_timed(config, COSTS).vcpus]

    assert begins(1) == begins(1)
    assert begins(1) != begins(2)
    assert max(begins(1)) <= 50_000


def test_256_vcpus_run() -> None:
    result = run_timed(load(Load.TOUCH, vcpus=256, pages=4, warmup=0, iterations=1), COSTS)
    assert len(result.vcpus) == 256
    assert all(vcpu.iterations for vcpu in result.vcpus)


def test_the_workloads_of_stress_runs_end_when_their_instructions_are_executed() -> None:
    result = run_timed(workload(Workload.ANON, 3), COSTS)
    assert result.counters["vcpu.instructions"] >= 4500
    assert result.iteration_cycles == 0
