"""`shadowmmu simulate`: one run in virtual time, by a cost model.

Its parameters are those of the points of a sweep (docs/EXPERIMENTS.md lists them), as NAME=VALUE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shadowmmu.cli.console import output_console
from shadowmmu.cli.runs import CatalogueOption, enter_run
from shadowmmu.cli.usage import make_folder
from shadowmmu.experiments.catalogue import Entry
from shadowmmu.experiments.values import Metric
from shadowmmu.protocol.messages import Verdict

if TYPE_CHECKING:
    from rich.table import Table

    from shadowmmu.checker import Violation
    from shadowmmu.experiments.cost_model import CostModel
    from shadowmmu.experiments.simulation import Simulation
    from shadowmmu.machine.timed_config import TimedConfig
    from shadowmmu.protocol.events import Event

__all__ = ["simulate"]

VIOLATED_STATUS: Final = 1
STUCK_STATUS: Final = 2
UNWRITTEN_STATUS: Final = 2
SHOWN_COUNTERS: Final = (
    "timed.exits",
    "exits.page_fault",
    "exits.register_write",
    "exits.invlpg",
    "exits.external_interrupt",
    "kvm.pf_fixed",
    "kvm.pf_guest",
    "kvm.mmu_pte_write",
    "kvm.mmu_shadow_zapped",
    "kvm.remote_tlb_flush",
    "timed.flush_targets",
    "lock.taken",
    "lock.waited",
    "vcpu.instructions",
    "vcpu.tlb_misses",
)


def simulate(
    *,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            help="What the run is, e.g. vcpus=8 load.load=fork cost_model=nehalem-2011 cost.lock_transfer=10",
            metavar="[NAME=VALUE]...",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 63) - 1)] = 0,
    check: Annotated[bool, typer.Option("--check", help="Check coherence on the way.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for simulation.json.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print simulation.json instead of tables.")] = False,
    catalogue: CatalogueOption = None,
) -> None:
    """Run a guest in virtual time: what it would cost on a real machine, by a cost model.

    Exit status: 0, 1 coherence was violated (with --check), 2 the run got stuck, or its file cannot be written.
    """
    from shadowmmu.experiments.simulation import Simulation
    from shadowmmu.machine.version import code_version
    from shadowmmu.machine.virtual_time import StuckError, run_timed

    started = datetime.now(UTC)
    values = _values(parameters or [])
    config, model = _resolve(values, seed)
    if out is not None:
        make_folder("--out", out)
    found: list[Violation] = []
    try:
        result = run_timed(config, model.costs, _checker(found) if check else None)
    except StuckError as error:
        typer.echo(f"The run got stuck: {error}", err=True)
        raise typer.Exit(STUCK_STATUS) from error
    simulation = Simulation(
        version=code_version(),
        config=config,
        cost_model=model.name,
        ghz=model.ghz,
        costs=model.costs,
        result=result,
    )
    if out is not None:
        _write(simulation, out)
    if as_json:
        sys.stdout.buffer.write(simulation.encode())
    else:
        _show(simulation)
    for violation in found:
        typer.echo(str(violation))
    _enter(catalogue, out, started, simulation, violated=bool(found))
    if found:
        raise typer.Exit(VIOLATED_STATUS)


def _write(simulation: Simulation, folder: Path) -> None:
    try:
        simulation.write(folder)
    except OSError as error:
        typer.echo(f"{folder}: simulation.json cannot be written: {error.strerror or error}", err=True)
        raise typer.Exit(UNWRITTEN_STATUS) from error


def _values(parameters: list[str]) -> dict[str, bool | int | float | str]:
    values: dict[str, bool | int | float | str] = {}
    for parameter in parameters:
        name, equals, text = parameter.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{parameter!r} is not NAME=VALUE")
        if name in values:
            raise typer.BadParameter(f"{name} is given twice")
        values[name] = _value(text)
    return values


def _value(text: str) -> bool | int | float | str:
    if text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _resolve(values: dict[str, bool | int | float | str], seed: int) -> tuple[TimedConfig, CostModel]:
    from shadowmmu.experiments.kinds.virtual import VirtualKind
    from shadowmmu.experiments.parameters import ParameterError

    try:
        return VirtualKind().resolve(values, seed)
    except ParameterError as error:
        raise typer.BadParameter(str(error)) from error


def _checker(found: list[Violation]) -> Callable[[int, Event], None]:
    """What checks the events, and puts the first violation into `found`."""
    from shadowmmu.checker import Checker

    checker = Checker()

    def check(_cycles: int, event: Event) -> None:
        if not found and (violation := checker.feed_all([event])) is not None:
            found.append(violation)

    return check


def _show(simulation: Simulation) -> None:
    result, config = simulation.result, simulation.config
    what = (
        f"workload {config.run.workload.value}" if config.load is None else f"load {config.load.load.value}"
    )
    console = output_console()
    typer.echo(
        f"{what}, {config.vcpus} vCPU{'s' if config.vcpus > 1 else ''}, profile {config.run.profile},"
        f" cost model {simulation.cost_model} ({simulation.ghz:g} GHz)"
    )
    time = result.cycles / (simulation.ghz * 1e3)
    typer.echo(f"virtual time: {result.cycles} cycles, {time:.1f} us; digest {result.digest}")
    if config.load is not None:
        each = result.iteration_cycles / (simulation.ghz * 1e3)
        typer.echo(f"per iteration: {result.iteration_cycles:.0f} cycles, {each:.2f} us")
    for table in (_causes(simulation), _latencies(simulation), _counters(simulation)):
        console.print(table)


def _causes(simulation: Simulation) -> Table:
    from rich.table import Table

    causes = simulation.result.causes
    total = sum(causes.values()) or 1
    table = Table("cause", "cycles", "share", title="Where the vCPUs' time went")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, cycles in causes.items():
        table.add_row(name, str(cycles), f"{cycles / total:.1%}")
    return table


def _latencies(simulation: Simulation) -> Table:
    from rich.table import Table

    table = Table("latency", "count", "mean", "p50", "p99", "max", title="Latencies in cycles")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, latency in simulation.result.latencies.items():
        row = (latency.count, round(latency.mean), latency.p50, latency.p99, latency.max)
        table.add_row(name, *map(str, row))
    return table


def _counters(simulation: Simulation) -> Table:
    from rich.table import Table

    counters = simulation.result.counters
    table = Table("counter", "count", title="Counters")
    table.columns[1].justify = "right"
    for name in SHOWN_COUNTERS:
        table.add_row(name, str(counters.get(name, 0)))
    return table


def _enter(
    catalogue: Path | None, out: Path | None, started: datetime, simulation: Simulation, *, violated: bool
) -> None:
    """Enters the run in the catalogue, if one is asked for."""
    import msgspec

    result = simulation.result
    verdict = Verdict.VIOLATED if violated else Verdict.PASS
    metrics: dict[str, Metric] = {"cycles": result.cycles, "iteration_cycles": result.iteration_cycles}
    entry = Entry(
        kind="simulate",
        folder=out,
        started=started.isoformat(timespec="seconds"),
        code=simulation.version,
        verdict=verdict.value,
        text=f"{result.cycles} cycles",
        configuration={"cost_model": simulation.cost_model, **msgspec.to_builtins(simulation.config)},
        metrics=metrics | result.counters,
    )
    enter_run(catalogue, entry)
