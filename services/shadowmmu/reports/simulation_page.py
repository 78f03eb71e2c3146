"""The page of a run in virtual time: where its cycles went, iterations, latencies, the figures it was charged by.

Reads simulation.json (`shadowmmu.experiments.simulation`), and nothing else. Times are cycles of the cost model's
processors, and microseconds by its clock rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from shadowmmu.experiments.simulation import SIMULATION_NAME, Simulation, SimulationError, read_simulation
from shadowmmu.machine.timed_config import TimedResult
from shadowmmu.reports.charts import Bar, LinePoint, lines, stacked, to_spec
from shadowmmu.reports.comparison import Names, counters_side_by_side, differences
from shadowmmu.reports.errors import ReportError
from shadowmmu.reports.measurements import counter_table, distribution_figures, quantity
from shadowmmu.reports.page import (
    Absent,
    Cell,
    Facts,
    Figure,
    Page,
    Paragraph,
    Part,
    Section,
    Tone,
    code,
    number,
    ratio,
    shown,
    table,
    text,
)

__all__ = ["SimulationFolder", "read_simulation_folder", "simulation_page"]

_MOST_BARS: Final = 64
"""vCPUs of which each has a bar of its own."""


class SimulationFolder(msgspec.Struct, frozen=True):
    """A folder with a simulation.json."""

    path: Path
    simulation: Simulation


def read_simulation_folder(path: Path) -> SimulationFolder:
    """The virtual-time run in a folder. Raises ReportError."""
    try:
        return SimulationFolder(path, read_simulation(path))
    except SimulationError as error:
        raise ReportError(str(error)) from error
    except RecursionError as error:
        raise ReportError(f"{path / SIMULATION_NAME} is damaged: {error}") from error
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error


def simulation_page(run: SimulationFolder, against: SimulationFolder | None = None) -> Page:
    """The page of a run in virtual time; with another one, also what differs."""
    one = run.simulation
    names = None if against is None else Names.of(run.path, against.path)
    sections = [Section("summary", "Summary", _summary(one))]
    if against is not None and names is not None:
        sections.append(
            Section("against", f"Against {names.other}", _against(one, against.simulation, names))
        )
    sections += [
        Section("causes", "Where the time went", _causes(one.result)),
        Section("iterations", "Iterations", _iterations(one)),
        Section(
            "latencies", "Latencies", _latencies(one, None if against is None else against.simulation, names)
        ),
        Section("counters", "Counters", _counters(one.result)),
        Section("costs", "Cost model", [_costs(one)]),
    ]
    config = one.config
    what = config.run.workload.value if config.load is None else config.load.load.value
    return Page(
        title=f"Virtual-time run {run.path.resolve().name}"
        + ("" if names is None else f" against {names.other}"),
        subtitle=f"{what}, {config.vcpus} vCPUs, profile {config.run.profile}, cost model {one.cost_model}",
        badge=None,
        sections=sections,
        foot=f"From {one.schema} of shadowmmu {one.version}. Executed again, the run gives the same to the digest, on "
        "any machine. Judge shapes and ratios rather than absolute times.",
    )


def _microseconds(cycles: float, simulation: Simulation) -> str:
    return f"{cycles / (simulation.ghz * 1e3):,.1f} µs" if simulation.ghz > 0 else "-"


def _summary(one: Simulation) -> list[Part]:
    result, config = one.result, one.config
    facts = [
        ("virtual time", text(f"{result.cycles:,} cycles, {_microseconds(result.cycles, one)}")),
        (
            "per iteration",
            text(f"{result.iteration_cycles:,.0f} cycles, {_microseconds(result.iteration_cycles, one)}")
            if config.load is not None
            else number(None),
        ),
        ("virtual CPUs", number(config.vcpus)),
        ("mmu_lock held", text(f"{_share(result.lock_held, result.cycles)} of the time")),
        (
            "waiting for mmu_lock",
            text(f"{_share(result.causes.get('lock_wait', 0), _total(result))} of the vCPUs' time"),
        ),
        ("cost model", text(f"{one.cost_model} ({one.ghz:g} GHz)")),
        ("version", text(one.version)),
        ("digest of the result", code(result.digest)),
        ("steps of the simulator", number(result.steps)),
    ]
    rows = [[code(name), shown(value)] for name, value in _settings(one).items()]
    return [Facts(facts), table("Configuration", ["parameter", "value"], rows, numbers=(), folded=True)]


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 else "-"


def _total(result: TimedResult) -> int:
    return sum(result.causes.values())


def _settings(one: Simulation) -> dict[str, object]:
    """The configuration, flat: `run.vpid`, `load.pages`."""
    flat: dict[str, object] = {"cost_model": one.cost_model}

    def flatten(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    flatten("", msgspec.to_builtins(one.config))
    return flat


def _words(cause: str) -> str:
    return cause.replace("_", " ").replace("tlb", "TLB")


def _causes(result: TimedResult) -> list[Part]:
    total = _total(result)
    if not total:
        return [Absent("No vCPU has spent any time.")]
    rows = [
        [text(_words(name)), number(cycles), Cell(_share(cycles, total), cycles)]
        for name, cycles in result.causes.items()
    ]
    parts: list[Part] = []
    bars = [Bar("all vCPUs", 100 * cycles / total, _words(name)) for name, cycles in _shown(result.causes)]
    title = "Time of all vCPUs by cause"
    parts.append(Figure(title=title, spec=to_spec(stacked(bars, "share of the time, %"), title), wide=True))
    if 1 < len(result.vcpus) <= _MOST_BARS:
        bars = [
            Bar(f"vCPU {place}", cycles, _words(name))
            for place, vcpu in enumerate(result.vcpus)
            for name, cycles in _shown(vcpu.causes)
        ]
        title = "Time of each vCPU by cause"
        parts.append(Figure(title=title, spec=to_spec(stacked(bars, "cycles"), title), wide=True))
    elif len(result.vcpus) > 1:
        parts.append(Absent(f"Bars of each vCPU are not drawn for more than {_MOST_BARS}."))
    parts.append(table("Cycles by cause", ["cause", "cycles", "share"], rows, numbers=(1, 2)))
    return parts


def _shown(causes: Mapping[str, int]) -> list[tuple[str, int]]:
    """Causes with time."""
    return [(name, cycles) for name, cycles in causes.items() if cycles]


def _iterations(one: Simulation) -> list[Part]:
    result = one.result
    if one.config.load is None:
        return [Absent("The run has a workload, and no load: workloads have no iterations.")]
    durations = [
        [b - a for a, b in zip([0, *vcpu.iterations], vcpu.iterations, strict=False)] for vcpu in result.vcpus
    ]
    count = min(map(len, durations), default=0)
    if count < 2:
        return [Absent("No plot: vCPUs made fewer than two iterations.")]
    points = []
    for place in range(count):
        each = [of_vcpu[place] for of_vcpu in durations]
        if len(each) > 1:
            points.append(LinePoint(place + 1, max(each), "slowest vCPU"))
            points.append(LinePoint(place + 1, min(each), "fastest vCPU"))
        points.append(LinePoint(place + 1, sum(each) / len(each), "mean"))
    title = "Cycles of each iteration"
    caption = f"Warm-up, which the mean of the summary leaves out: the first {one.config.warmup}."
    spec = to_spec(lines(points, "iteration", "cycles"), title)
    return [Figure(title=title, spec=spec, caption=caption, wide=True)]


def _latencies(one: Simulation, other: Simulation | None, names: Names | None) -> list[Part]:
    latencies = one.result.latencies
    if not latencies:
        return [Absent("The run has no latencies: nothing had to wait.")]
    rows = [
        [
            text(quantity(name)),
            number(it.count),
            number(it.mean, 1),
            number(it.p50),
            number(it.p99),
            number(it.max),
        ]
        for name, it in latencies.items()
    ]
    columns = ["", "count", "mean", "50 %", "99 %", "largest"]
    parts: list[Part] = [
        table("Latencies (percentiles count a wait of 0 cycles as 1)", columns, rows, numbers=range(1, 6))
    ]
    for name, it in latencies.items():
        runs = [("this run" if names is None else names.this, it.encoded)]
        if other is not None and names is not None and name in other.result.latencies:
            runs.append((names.other, other.result.latencies[name].encoded))
        parts += distribution_figures(name, runs)
    return parts


def _counters(result: TimedResult) -> list[Part]:
    return [counter_table(result.counters)] if result.counters else [Absent("The run has no counters.")]


def _costs(one: Simulation) -> Part:
    rows = [[code(name), number(cycles)] for name, cycles in _flat_costs(one).items()]
    caption = f"Cycles per occurrence, {one.cost_model} (its file names the sources)"
    return table(caption, ["what", "cycles"], rows, numbers=(1,), search=True, folded=True)


def _against(this: Simulation, other: Simulation, names: Names) -> list[Part]:
    both = this.result, other.result
    same = both[0].digest == both[1].digest
    parts: list[Part] = [
        Paragraph("Both have the same result, to the digest.", Tone.GOOD)
        if same
        else Paragraph("They have different results."),
        table("Virtual time", ["", names.this, names.other, "ratio"], _times(both), numbers=(1, 2, 3)),
    ]
    bars = [
        Bar(name, cycles / max(1, len(result.vcpus)), _words(cause))
        for name, result in zip((names.this, names.other), both, strict=True)
        for cause, cycles in _shown(result.causes)
    ]
    if bars:
        title = "Time of a vCPU by cause"
        spec = to_spec(stacked(bars, "cycles, mean of the vCPUs"), title)
        parts.append(Figure(title=title, spec=spec, wide=True))
    costs = [{f"cost.{name}": value for name, value in _flat_costs(one).items()} for one in (this, other)]
    parts += differences(_settings(this) | costs[0], _settings(other) | costs[1], names)
    parts += counters_side_by_side(both[0].counters, both[1].counters, names)
    return parts


def _flat_costs(one: Simulation) -> dict[str, int]:
    """The model's figures by name; those of the guest's own work with `guest.` before theirs."""
    figures: dict[str, Any] = msgspec.to_builtins(one.costs)
    guest: dict[str, int] = figures.pop("guest")
    return figures | {f"guest.{name}": cycles for name, cycles in guest.items()}


def _times(both: tuple[TimedResult, TimedResult]) -> Sequence[Sequence[Cell]]:
    lines_: list[tuple[str, float, float]] = [
        ("virtual time, cycles", both[0].cycles, both[1].cycles),
        ("cycles per iteration", both[0].iteration_cycles, both[1].iteration_cycles),
        ("mmu_lock held, cycles", both[0].lock_held, both[1].lock_held),
        *(
            (
                f"{_words(cause)}, cycles of all vCPUs",
                both[0].causes.get(cause, 0),
                both[1].causes.get(cause, 0),
            )
            for cause in dict.fromkeys([*both[0].causes, *both[1].causes])
        ),
    ]
    return [[text(name), number(a, 0), number(b, 0), ratio(a / b if b else None)] for name, a, b in lines_]
