"""Loads on the machine with shadow paging: coherent, as many iterations as asked for, and the same every time."""

from __future__ import annotations

import pytest

from shadowmmu.checker import Checker
from shadowmmu.cpu.loads import WORK, Load, LoadConfig, memory_needed
from shadowmmu.machine.costs import Costs
from shadowmmu.machine.timed_config import TimedConfig
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol.events import Event
from shadowmmu.protocol.messages import RunConfig

COSTS = Costs(
    **{name: 50 for name in Costs.__struct_fields__ if name != "guest"}, guest=dict.fromkeys(WORK, 500)
)
SMALL = {
    Load.PAGE_FAULT: {"pages": 40},
    Load.MMAP: {"pages": 200},
    Load.TOUCH: {"pages": 64},
    Load.REMAP: {"pages": 64, "tables": 4, "edits": 5},
}


def timed(load: Load, **changes: object) -> TimedConfig:
    config = LoadConfig(**{"load": load, **SMALL.get(load, {}), **changes})  # type: ignore[arg-type]
    run = RunConfig(profile="fixed", memory_pages=memory_needed(config, 2), mmu_pages=256, tlb_sets=16)
    return TimedConfig(run=run, vcpus=2, load=config, warmup=1, iterations=3)


@pytest.mark.parametrize("kpti", [False, True])
@pytest.mark.parametrize("load", list(Load))
def test_every_load_runs_coherently(load: Load, kpti: bool) -> None:
    checker = Checker()
    violations = []

    def check(_: int, event: Event) -> None:
        if (violation := checker.feed(event)) is not None:
            violations.append(violation)

    config = timed(load, kpti=kpti)
    result = run_timed(config, COSTS, check)
    assert not violations
    assert all(len(vcpu.iterations) >= 4 for vcpu in result.vcpus)
    assert run_timed(config, COSTS).digest == result.digest
