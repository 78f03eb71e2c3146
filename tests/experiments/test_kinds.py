"""Each kind of run measures what it says, the same for the same seed where it is repeatable."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shadowmmu.experiments.kinds.kind import Kind
from shadowmmu.experiments.parameters import ParameterError
from shadowmmu.experiments.point import KINDS
from shadowmmu.experiments.values import Value

EXPLORE: dict[str, Value] = {"test": "cr3-global", "executions": 20, "strategy": "random"}
HUNT: dict[str, Value] = {"scenarios": 1}
VIRTUAL: dict[str, Value] = {
    "load.load": "touch",
    "load.pages": 32,
    "vcpus": 2,
    "iterations": 2,
    "host.unmap": 5000,
    "profile": "linux-3.1",
    "mmu_pages_per_vcpu": 64,
}


def test_an_exploration_counts_its_executions() -> None:
    metrics = KINDS[Kind.EXPLORE].run(EXPLORE, 1)
    assert metrics["executions_made"] == 20
    assert metrics == KINDS[Kind.EXPLORE].run(EXPLORE, 1)
    assert metrics["digest"] != KINDS[Kind.EXPLORE].run(EXPLORE, 2)["digest"]


def test_an_exploration_says_when_it_has_found_something() -> None:
    found = KINDS[Kind.EXPLORE].run({"test": "unexpected-gfn", "first": True}, 1)
    assert found["found"] is True and found["failures"] == 1
    assert found["first_execution"] == found["executions_made"]


def test_an_exploration_of_a_workload() -> None:
    metrics = KINDS[Kind.EXPLORE].run({"workload": "fork", "ops": 20, "executions": 2, "vcpus": 2}, 1)
    assert metrics["executions_made"] == 2


def test_a_hunt_counts_its_guests() -> None:
    metrics = KINDS[Kind.HUNT].run(HUNT, 1)
    assert metrics["scenarios_made"] == 1
    assert metrics == KINDS[Kind.HUNT].run(HUNT, 1)


def test_a_run_in_virtual_time_has_cycles_by_cause() -> None:
    metrics = KINDS[Kind.VIRTUAL].run(VIRTUAL, 1)
    causes = [cycles for name, cycles in metrics.items() if name.startswith("cause.")]
    assert isinstance(metrics["cycles"], int) and metrics["cycles"] > 0
    assert metrics["cause.handler"] in causes and all(isinstance(cycles, int) for cycles in causes)
    assert isinstance(metrics["timed.host.unmap"], int) and metrics["timed.host.unmap"] > 0
    assert metrics == KINDS[Kind.VIRTUAL].run(VIRTUAL, 1)


def test_a_factor_on_a_cost_is_a_factor_on_that_cost() -> None:
    alone = VIRTUAL | {"vcpus": 1, "host.unmap": 0}  # where nothing depends on who is first
    once = KINDS[Kind.VIRTUAL].run(alone, 1)["cause.tlb_miss"]
    tenfold = KINDS[Kind.VIRTUAL].run(alone | {"cost.tlb_miss": 10.0, "cost.tlb_miss_level": 10.0}, 1)[
        "cause.tlb_miss"
    ]
    assert isinstance(once, int) and once > 0
    assert tenfold == 10 * once


@pytest.mark.parametrize(
    "values, key, why",
    [
        ({"cost_model": "abacus-1900"}, "cost_model", "abacus-1900"),
        ({"profile": "linux-9"}, "profile", "linux-9"),
        ({"bypass_guest_pf": True}, "bypass_guest_pf", "profile pre-patch"),
        ({"mode": "pae"}, "mode", "workload modes only"),
        ({"tdp": "ept"}, "tdp", "mode nonpaging"),
        ({"vcpus": 257}, "vcpus", "<= 256"),
        ({"vcpus": 200}, "vcpus", ""),
        ({"load.fault_around": 3}, "", "a power of two"),
        ({"seed": 3}, "seed", "no such parameter"),
        ({"vpid": True, "run.vpid": False}, "run.vpid", "given twice, by two of its names"),
        ({"park_rate": 0.1}, "park_rate", "no such parameter"),
        ({"cost.warp": 1.0}, "cost.warp", "no such parameter"),
        ({"cost.exit": -1.0}, "cost.exit", ">= 0.0"),
    ],
)
def test_a_run_in_virtual_time_that_there_cannot_be(values: dict[str, Value], key: str, why: str) -> None:
    with pytest.raises(ParameterError) as error:
        KINDS[Kind.VIRTUAL].check(values)
    assert error.value.name == key
    assert why in error.value.text


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_several_machines_at_once_are_measured_together() -> None:
    metrics = KINDS[Kind.STRESS].run(
        {"machines": 2, "vcpus": 1, "ops": 2000, "check": False, "vpid": True}, 1
    )
    executed = metrics["vcpu.instructions"]
    assert isinstance(executed, int) and executed >= 4000
    assert (
        isinstance(metrics["seconds"], float)
        and metrics["instructions_per_second"] == executed / metrics["seconds"]
    )
    assert isinstance(metrics["cores"], int) and metrics["cores"] >= 1


@pytest.mark.processes
def test_a_machine_that_does_not_pass_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match=r"'shadowmmu stress' ended with status 64: .*--vcpus"):
        KINDS[Kind.STRESS].run({"vcpus": 200, "ops": 100, "in_process": True}, 1)


@pytest.mark.processes
def test_stress_has_an_option_for_every_parameter() -> None:
    options = subprocess.run(
        [sys.executable, "-m", "shadowmmu.cli", "stress", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "300", "PATH": ""},
    ).stdout
    for name in KINDS[Kind.STRESS].parameters.all:
        assert name == "machines" or f"--{name.replace('_', '-')}" in options
