"""What virtual time costs: the same guest executed with clocks and prices, and in one process without either.

Both runs execute the guest's instructions and KVM's operations; the one without virtual time also draws schedules and
writes a journal, the one with it keeps a queue of what happens when. So the ratio says which is dearer, not which part.
Seconds are the processor's: the two runs are made one after the other, and what else the machine does shall not come
between them.
"""

from __future__ import annotations

import time

from benchmarks.figures import Figure
from shadowmmu.experiments.cost_model import load_cost_model
from shadowmmu.machine.inprocess import run_in_process
from shadowmmu.machine.timed_config import TimedConfig
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol.messages import Audit, RunConfig, Workload

__all__ = ["virtual_time_per_second"]

OPS = 10_000
VCPUS = 4
MODEL = "cascadelake-2019"


def virtual_time_per_second(runs: int) -> list[Figure]:
    """Steps and guest instructions per second in virtual time, and against the same guest without it."""
    costs = load_cost_model(MODEL).costs
    steps, timed, ratios = [], [], []
    for seed in range(runs):
        config = RunConfig(
            workload=Workload.MIXED,
            ops=OPS,
            seed=seed,
            audit=Audit.NEVER,
            check=False,
            host_rate=0.0,
            park_rate=0.0,
        )
        started = time.process_time()
        result = run_timed(TimedConfig(run=config, vcpus=VCPUS), costs)
        seconds = time.process_time() - started
        started = time.process_time()
        plain = run_in_process(config, VCPUS, lambda _: None)
        plain_seconds = time.process_time() - started
        steps.append(result.steps / seconds)
        timed.append(result.counters["vcpu.instructions"] / seconds)
        ratios.append(timed[-1] / (plain.counters["vcpu.instructions"] / plain_seconds))
    what = f"workload mixed, {VCPUS} vCPUs"
    return [
        Figure(f"virtual time, {what}", "steps/s", steps),
        Figure(f"virtual time, {what}", "guest instructions/s", timed),
        Figure("the same against a run without virtual time", "times as many instructions/s", ratios),
    ]
