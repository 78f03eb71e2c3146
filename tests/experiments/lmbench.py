"""LMbench's figures for one process, by a cost model, beside those that were published for the machine.

`python -m tests.experiments.lmbench` prints the table of docs/COST_MODELS.md.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from shadowmmu.cpu.loads import Load, LoadConfig, load_boot_image, make_load, memory_needed
from shadowmmu.experiments.cost_model import CostModel, load_cost_model
from shadowmmu.machine.timed_config import TimedConfig
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol.messages import RunConfig
from tests.cpu.plain import PlainMmu

WALK_LEVELS = 4


class Line(msgspec.Struct, frozen=True):
    """A line of the published table: microseconds with EPT and with shadow paging, at one process.

    `per`: of what an iteration consists so many. `without`: work that the benchmark takes off. `ept_for`, `shadow_for`:
    the constants that the figure was used for; empty: it was used for none, and checks the model.
    """

    title: str
    load: LoadConfig
    ept: float
    shadow: float
    ept_for: str
    shadow_for: str
    iterations: int = 5
    per: int = 1
    without: Counter[str] = Counter()


PAGE_FAULT = LoadConfig(load=Load.PAGE_FAULT)
LINES = (
    Line("getpid", LoadConfig(load=Load.GETPID), 0.06, 0.06, "guest.syscall", "", 2000),
    Line(
        "getpid, isolation",
        LoadConfig(load=Load.GETPID, kpti=True),
        0.22,
        2.09,
        "guest.kpti",
        "register_write + root_load",
        500,
    ),
    Line(
        "protection fault",
        LoadConfig(load=Load.PROTECTION_FAULT),
        0.66,
        3.17,
        "guest.fault_handler + guest.signal",
        "page_fault",
        500,
    ),
    Line(
        "page fault",
        PAGE_FAULT,
        0.15,
        0.93,
        "guest.pte_map + guest.pte_clear",
        "spte_set, spte_dropped, spte_synced, rmap_entry",
        per=PAGE_FAULT.size,
        without=Counter(syscall=2, mmap=1, munmap=1),
    ),
    Line("fork", LoadConfig(load=Load.FORK), 82, 505, "guest.fork + guest.exit", ""),
)
"""PVM (SOSP 2023), tables 1 to 4, the columns EPT and kvm-spt."""
WARMUP = 3


def machine(load: LoadConfig) -> RunConfig:
    """One vCPU with more shadow pages than it needs."""
    return RunConfig(profile="linux-3.1", memory_pages=memory_needed(load, 1), mmu_pages=1 << 12)


def per_unit(line: Line, model: CostModel, cycles: float) -> float:
    """Microseconds of one of what the line is about, from the cycles of an iteration."""
    guest = model.costs.guest
    taken_off = sum(guest[name] * count for name, count in line.without.items())
    return model.microseconds((cycles - taken_off) / line.per)


def with_shadow_paging(line: Line, model: CostModel) -> float:
    """The figure by virtual time."""
    config = TimedConfig(run=machine(line.load), load=line.load, warmup=WARMUP, iterations=line.iterations)
    return per_unit(line, model, run_timed(config, model.costs).iteration_cycles)


def without_exits(line: Line, model: CostModel) -> float:
    """The figure for EPT: the guest's own work, its faults and its TLB misses, without any exit."""
    run = machine(line.load)
    program = make_load(line.load, run, 0, 1)
    mmu = PlainMmu(load_boot_image(line.load, run, 1))
    costs = model.costs
    while program.iterations < WARMUP + line.iterations:
        if program.iterations < WARMUP:
            program.work.clear()
            mmu.counts.clear()
        mmu.step(program)
    cycles = sum(costs.guest[name] * count for name, count in program.work.items())
    cycles += mmu.counts["touch"] * costs.tlb_hit + mmu.counts["fault"] * costs.fault_delivery
    cycles += mmu.counts["walk"] * (costs.tlb_miss + WALK_LEVELS * costs.tlb_miss_level)
    return per_unit(line, model, cycles / line.iterations)


def figures(model: CostModel) -> dict[str, tuple[float, float]]:
    """Both figures of each line, by its title."""
    return {line.title: (without_exits(line, model), with_shadow_paging(line, model)) for line in LINES}


def table(computed: dict[str, tuple[float, float]]) -> str:
    """Markdown: each figure as published, by the model, and the model's error; what it was used for."""
    rows = [
        "| one process, us | EPT | model | error | used for | shadow paging | model | error | used for |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for line in LINES:
        cells = [line.title]
        published = ((line.ept, line.ept_for), (line.shadow, line.shadow_for))
        for (figure, used_for), by_model in zip(published, computed[line.title], strict=True):
            error = f"{by_model / figure - 1:+.0%}"
            cells += [f"{figure:g}", f"{by_model:.3g}", error, used_for or "nothing: a check"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(figures(load_cost_model("cascadelake-2019"))))  # noqa: T201
