"""Options that several commands have, and the run configuration that they make."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from shadowmmu.cli.usage import bad_value
from shadowmmu.protocol.messages import Audit, GuestMode, MemoryModel, Mutant, RunConfig, Tdp, Workload

__all__ = [
    "AuditOption",
    "BypassGuestPf",
    "Check",
    "ConnectTo",
    "HostRate",
    "InFolder",
    "InsecureOption",
    "KeysOption",
    "LiveHold",
    "LiveOption",
    "LogFormat",
    "LogFormatOption",
    "MemoryModelOption",
    "MemoryPages",
    "MmuPages",
    "ModeOption",
    "MutantOption",
    "Ops",
    "ParkRate",
    "Profile",
    "Seed",
    "TdpOption",
    "Vpid",
    "WorkloadOption",
    "make_config",
    "usable_cores",
]


def usable_cores() -> int:
    """How many processor cores this process may use, where the system tells; else how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LogFormat(enum.Enum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


_RUN = "The run"

Ops = Annotated[
    int, typer.Option("--ops", min=1, help="Guest instructions of all vCPUs together.", rich_help_panel=_RUN)
]
WorkloadOption = Annotated[
    Workload | None,
    typer.Option(
        "--workload",
        envvar="SHADOWMMU_WORKLOAD",
        help="What the guests do. Without: mixed, or modes where --mode or --tdp needs it.",
        rich_help_panel=_RUN,
    ),
]
ModeOption = Annotated[
    GuestMode | None,
    typer.Option(
        "--mode",
        envvar="SHADOWMMU_MODE",
        help="The paging mode of the guests; other than paging64 with workload modes only.",
        rich_help_panel=_RUN,
    ),
]
TdpOption = Annotated[
    Tdp | None,
    typer.Option(
        "--tdp",
        envvar="SHADOWMMU_TDP",
        help="Two-dimensional paging instead of shadow paging; guests run with paging off.",
        rich_help_panel=_RUN,
    ),
]
BypassGuestPf = Annotated[
    bool | None,
    typer.Option(
        "--bypass-guest-pf/--no-bypass-guest-pf",
        envvar="SHADOWMMU_BYPASS_GUEST_PF",
        help="Faults on entries that the guest has not present need no exit; profile pre-patch only, there on.",
        rich_help_panel=_RUN,
    ),
]
MemoryModelOption = Annotated[
    MemoryModel,
    typer.Option(
        "--memory-model",
        envvar="SHADOWMMU_MEMORY_MODEL",
        help="When the host's own stores become visible: at once (sc), or after a stay in a store buffer (tso).",
        rich_help_panel=_RUN,
    ),
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
_SECURITY = "Security"

KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="SHADOWMMU_KEYS",
        help="Folder of keys, as 'shadowmmu keys' makes it. With keys every connection is encrypted and authorised.",
        metavar="DIR",
        file_okay=False,
        rich_help_panel=_SECURITY,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        envvar="SHADOWMMU_INSECURE",
        help="Without keys, leave this machine all the same: anybody may listen and take part.",
        rich_help_panel=_SECURITY,
    ),
]
_LIVE = "Live page"

LiveOption = Annotated[
    str | None,
    typer.Option(
        "--live",
        envvar="SHADOWMMU_LIVE",
        help="Serve a live page of the run, and metrics for Prometheus: PORT (0: any free one) on loopback, or "
        "ADDRESS:PORT, where anybody who gets there may read.",
        metavar="[ADDRESS:]PORT",
        rich_help_panel=_LIVE,
    ),
]
LiveHold = Annotated[
    float,
    typer.Option(
        "--live-hold",
        min=0.0,
        envvar="SHADOWMMU_LIVE_HOLD",
        help="With --live: go on serving the run's last state for so many seconds.",
        rich_help_panel=_LIVE,
    ),
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="Log lines for people, or as JSON objects.")
]
InFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for report, journal and log.", file_okay=False)
]


def _workload_and_mode(
    workload: Workload | None, mode: GuestMode | None, tdp: Tdp | None
) -> tuple[Workload, GuestMode]:
    """What runs, in which paging mode. Raises typer.BadParameter if that does not go together."""
    if tdp is not None:
        if mode not in (None, GuestMode.NONPAGING):
            raise bad_value("--mode", f"with --tdp guests run with paging off: nonpaging, not {mode.value}")
        mode = GuestMode.NONPAGING
    mode = mode or GuestMode.PAGING64
    if mode is GuestMode.PAGING64:
        return workload or Workload.MIXED, mode
    if workload not in (None, Workload.MODES):
        wanted = f"--mode {mode.value}" if tdp is None else f"--tdp {tdp.value}"
        raise bad_value(
            "--workload", f"{workload.value} is a program of 64-bit paging; {wanted} runs workload modes only"
        )
    return Workload.MODES, mode


def make_config(
    vcpus: int | None,
    *,
    workload: Workload | None = None,
    mode: GuestMode | None = None,
    tdp: Tdp | None = None,
    profile: str,
    bypass_guest_pf: bool | None = None,
    **values: Any,
) -> RunConfig:
    """The run configuration of the options' values, for that many vCPUs if their number is known.

    Values that are None follow from the others. Raises typer.BadParameter that names the option.
    """
    from shadowmmu.cpu.guest import working_frames
    from shadowmmu.kvm.errors import UnknownFixError, UnknownProfileError
    from shadowmmu.kvm.profiles import KernelTree, Profile

    try:
        kernel = Profile.parse(profile).kernel
    except (UnknownProfileError, UnknownFixError) as error:
        raise bad_value("--profile", str(error)) from error
    workload, mode = _workload_and_mode(workload, mode, tdp)
    bypass_possible = kernel is KernelTree.PRE_PATCH and tdp is None
    if bypass_guest_pf and not bypass_possible:
        why = (
            "there is none with --tdp" if tdp is not None else f"profile {profile} has none; pre-patch has it"
        )
        raise bad_value("--bypass-guest-pf", why)
    config = RunConfig(
        workload=workload,
        mode=mode,
        tdp=tdp,
        profile=profile,
        bypass_guest_pf=bypass_possible if bypass_guest_pf is None else bypass_guest_pf,
        **values,
    )
    try:
        config = msgspec.convert(msgspec.to_builtins(config), RunConfig)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        option = "--" + path.rstrip("`").replace("_", "-")
        raise bad_value(option, text.replace("`", "")) from error
    if vcpus is not None:
        try:
            working_frames(config, vcpus)
        except ValueError as error:  # too many for the guest programs, or for the guest's memory
            raise bad_value("--vcpus", str(error)) from error
    return config
