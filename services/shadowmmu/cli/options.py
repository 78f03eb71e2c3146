"""Options that several commands have, and the run configuration that they make."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from shadowmmu.cli.usage import bad_value
from shadowmmu.protocol.messages import Audit, Mutant, RunConfig, Workload

__all__ = [
    "AuditOption",
    "Check",
    "ConnectTo",
    "HostRate",
    "InFolder",
    "LogFormat",
    "LogFormatOption",
    "MemoryPages",
    "MmuPages",
    "MutantOption",
    "Ops",
    "ParkRate",
    "Profile",
    "Seed",
    "Vpid",
    "WorkloadOption",
    "make_config",
]


class LogFormat(enum.Enum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


_RUN = "The run"

Ops = Annotated[
    int, typer.Option("--ops", min=1, help="Guest instructions of all vCPUs together.", rich_help_panel=_RUN)
]
WorkloadOption = Annotated[
    Workload, typer.Option("--workload", help="What the guests do.", rich_help_panel=_RUN)
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=(1 << 64) - 1,
        help="Fixes programs and choices; not the arrival order.",
        rich_help_panel=_RUN,
    ),
]
Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        help="The kernel to simulate: see 'shadowmmu profiles'. +FIX and -FIX switch single fixes.",
        rich_help_panel=_RUN,
    ),
]
Vpid = Annotated[
    bool,
    typer.Option("--vpid/--no-vpid", help="TLB entries survive exits and entries.", rich_help_panel=_RUN),
]
AuditOption = Annotated[
    Audit, typer.Option("--audit", help="When the kernel's mmu_audit checks run.", rich_help_panel=_RUN)
]
MutantOption = Annotated[
    Mutant | None,
    typer.Option("--mutant", help="A defect put in on purpose, to see it found.", rich_help_panel=_RUN),
]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Check coherence during the run.", rich_help_panel=_RUN)
]
HostRate = Annotated[
    float,
    typer.Option(
        "--host-rate",
        min=0.0,
        max=1000.0,
        help="Host agent operations per 1,000 guest instructions.",
        rich_help_panel=_RUN,
    ),
]
ParkRate = Annotated[
    float,
    typer.Option(
        "--park-rate",
        min=0.0,
        max=1.0,
        help="Share of the named points at which an operation is parked.",
        rich_help_panel=_RUN,
    ),
]
MemoryPages = Annotated[
    int,
    typer.Option(
        "--memory-pages", min=1024, max=1 << 20, help="Guest memory in frames of 4 KiB.", rich_help_panel=_RUN
    ),
]
MmuPages = Annotated[
    int,
    typer.Option(
        "--mmu-pages", min=64, max=1 << 20, help="Limit on the number of shadow pages.", rich_help_panel=_RUN
    ),
]

ConnectTo = Annotated[
    str, typer.Option("--coordinator", help="The coordinator's address, as tcp://HOST:PORT.", metavar="ADDR")
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Log lines for people, or as JSON objects.")
]
InFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for report, journal and log.", file_okay=False)
]


def make_config(vcpus: int | None, **values: Any) -> RunConfig:
    """The run configuration of the options' values, for that many vCPUs if their number is known.

    Raises typer.BadParameter that names the option.
    """
    from shadowmmu.cpu.guest import Layout
    from shadowmmu.kvm import profiles
    from shadowmmu.kvm.errors import UnknownFixError, UnknownProfileError

    try:
        profiles.Profile.parse(values["profile"])
    except (UnknownProfileError, UnknownFixError) as error:
        raise bad_value("--profile", str(error)) from error
    config = RunConfig(**values)
    try:
        config = msgspec.convert(msgspec.to_builtins(config), RunConfig)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        option = "--" + path.rstrip("`").replace("_", "-")
        raise bad_value(option, text.replace("`", "")) from error
    if vcpus is not None:
        try:
            Layout(config, vcpus)
        except ValueError as error:  # too many for the guest programs, or for the guest's memory
            raise bad_value("--vcpus", str(error)) from error
    return config
