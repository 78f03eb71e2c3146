"""Plans of faults, and the command lines of a chaos run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.cli.options import make_config
from shadowmmu.coordinator.chaos import LONGEST_STOP, MOST_KILLS, FaultKind, plan
from shadowmmu.coordinator.commands import config_options
from shadowmmu.coordinator.supervisor import HUNG_SECONDS, RESTARTS
from shadowmmu.protocol.messages import GuestMode, MemoryModel, Mutant, RunConfig, Tdp, Workload

TARGETS = {"mmu", "coordinator", "worker-0", "worker-1", "host-0"}


@given(seed=st.integers(0, 1 << 32), faults=st.integers(0, 60))
def test_a_plan_is_one_that_a_run_can_survive(seed: int, faults: int) -> None:
    planned = plan(seed, 10_000, 2, 1, faults)
    assert len(planned) == faults
    assert planned == plan(seed, 10_000, 2, 1, faults)
    assert [fault.at for fault in planned] == sorted(fault.at for fault in planned)
    assert all(0 < fault.at < 10_000 and fault.target in TARGETS for fault in planned)
    kills = Counter(fault.target for fault in planned if fault.kind is FaultKind.KILL)
    assert all(count <= MOST_KILLS < RESTARTS for count in kills.values())
    assert all(
        0 < fault.seconds <= LONGEST_STOP < HUNG_SECONDS for fault in planned if fault.kind is FaultKind.STOP
    )


def test_all_kinds_of_faults_and_all_targets_come_up() -> None:
    planned = [fault for seed in range(40) for fault in plan(seed, 10_000, 2, 1, 5)]
    assert {fault.kind for fault in planned} == set(FaultKind)
    assert {fault.target for fault in planned} == TARGETS


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(workload=Workload.FORK, seed=9, ops=77, vpid=False, check=False, host_rate=0.0),
        RunConfig(workload=Workload.MODES, mode=GuestMode.PAE, memory_model=MemoryModel.TSO),
        RunConfig(workload=Workload.MODES, mode=GuestMode.NONPAGING, tdp=Tdp.EPT),
        RunConfig(profile="pre-patch+fixed", bypass_guest_pf=True, mutant=Mutant.FLUSH_NOT_AWAITED),
    ],
)
def test_the_options_of_a_configuration_make_it(config: RunConfig) -> None:
    values: dict[str, object] = {}
    for option in config_options(config):
        name, _, text = option.removeprefix("--").partition("=")
        field = name.removeprefix("no-").replace("-", "_")
        values[field] = text or not name.startswith("no-")
    given_values = msgspec.convert(values, RunConfig, strict=False)
    fields = {name: getattr(given_values, name) for name in values}
    assert make_config(2, **fields) == config


def test_what_no_option_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="tlb_ways"):
        config_options(RunConfig(tlb_ways=8))


def test_a_run_of_faults_needs_processes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from shadowmmu.cli.main import app

    result = CliRunner().invoke(app, ["stress", "--chaos", "1", "--in-process", "--out", str(tmp_path)])
    assert result.exit_code != 0
