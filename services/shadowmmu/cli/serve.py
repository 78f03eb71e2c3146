"""`shadowmmu serve ...` and `shadowmmu worker ...`: single processes of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from shadowmmu.cli.loop import run_loop
from shadowmmu.cli.options import (
    AuditOption,
    BypassGuestPf,
    Check,
    ConnectTo,
    HostRate,
    InFolder,
    InsecureOption,
    KeysOption,
    LiveHold,
    LiveOption,
    LogFormat,
    LogFormatOption,
    MemoryModelOption,
    MemoryPages,
    MmuPages,
    ModeOption,
    MutantOption,
    Ops,
    ParkRate,
    Profile,
    Seed,
    TdpOption,
    Vpid,
    WorkloadOption,
    make_config,
)
from shadowmmu.cli.runs import CatalogueOption
from shadowmmu.cli.usage import check_addresses, check_security, fsync_policy
from shadowmmu.protocol.messages import Audit, RunConfig
from shadowmmu.protocol.states import COORDINATOR, MMU

if TYPE_CHECKING:
    from shadowmmu.client import KeyRole, Security

__all__ = ["serve_app", "worker_app"]

_DEFAULTS = RunConfig()

serve_app = typer.Typer(no_args_is_help=True, help="Run one of the services.")
worker_app = typer.Typer(no_args_is_help=True, help="Run one of the workers.")

Bind = Annotated[
    str,
    typer.Option(
        "--bind", help="Where to listen, as tcp://HOST:PORT (PORT *: any free one).", metavar="ADDR"
    ),
]
Linger = Annotated[
    float,
    typer.Option(
        "--linger",
        min=0.0,
        envvar="SHADOWMMU_LINGER",
        help="Stay so many seconds after the run's end, so that a supervisor sees the coordinator end first.",
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="Who this is, for people and logs.")]


@serve_app.command("mmu")
def serve_mmu(
    *,
    bind: Bind = "tcp://127.0.0.1:5701",
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator", help="The run's coordinator. Without: for protocol clients.", metavar="ADDR"
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option("--advertise", help="Where others reach it, if not at --bind.", metavar="ADDR"),
    ] = None,
    out: InFolder = None,
    vcpus: Annotated[
        int, typer.Option("--vcpus", min=1, max=256, help="Virtual processors (without a coordinator).")
    ] = 1,
    workload: WorkloadOption = None,
    mode: ModeOption = None,
    tdp: TdpOption = None,
    seed: Seed = _DEFAULTS.seed,
    profile: Profile = _DEFAULTS.profile,
    bypass_guest_pf: BypassGuestPf = None,
    memory_model: MemoryModelOption = _DEFAULTS.memory_model,
    vpid: Vpid = _DEFAULTS.vpid,
    audit: AuditOption = Audit.SAMPLED,
    mutant: MutantOption = None,
    park_rate: ParkRate = _DEFAULTS.park_rate,
    memory_pages: MemoryPages = _DEFAULTS.memory_pages,
    mmu_pages: MmuPages = _DEFAULTS.mmu_pages,
    fsync: Annotated[
        str,
        typer.Option(
            "--fsync",
            metavar="WHEN",
            help="When the disk has to have the journal: never, turn (before any answer), or every so many seconds.",
        ),
    ] = "never",
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Go on with an unfinished journal in --out (without a coordinator; in a run always).",
        ),
    ] = False,
    snapshot_records: Annotated[
        int,
        typer.Option(
            "--snapshot-records", min=1, help="Take a snapshot about every so many records of the journal."
        ),
    ] = 50_000,
    linger: Linger = 0.0,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    log_format: LogFormatOption = LogFormat.CONSOLE,
) -> None:
    """The MMU service. In a run (--coordinator) the coordinator says what is run; alone, the options do."""
    from shadowmmu.cli.logs import set_up_logs
    from shadowmmu.client import KeyRole, Security
    from shadowmmu.mmu import MmuOptions, serve

    config = None
    if coordinator is None:
        config = make_config(
            vcpus,
            workload=workload,
            mode=mode,
            tdp=tdp,
            seed=seed,
            profile=profile,
            bypass_guest_pf=bypass_guest_pf,
            memory_model=memory_model,
            vpid=vpid,
            audit=audit,
            mutant=mutant,
            park_rate=park_rate,
            memory_pages=memory_pages,
            mmu_pages=mmu_pages,
        )
    check_addresses(**{"--bind": bind, "--coordinator": coordinator, "--advertise": advertise})
    security = Security(keys, insecure)
    check_security("--bind", bind, lambda: security.server(MMU))
    if coordinator is not None:
        check_security("--coordinator", coordinator, lambda: security.client(KeyRole.MMU, COORDINATOR))
    set_up_logs(log_format)
    options = MmuOptions(
        bind=bind,
        advertise=advertise,
        coordinator=coordinator,
        config=config,
        vcpus=vcpus,
        out=out,
        linger_seconds=linger,
        security=security,
        fsync=fsync_policy("--fsync", fsync),
        recover=recover,
        snapshot_records=snapshot_records,
    )
    raise typer.Exit(run_loop(serve(options)))


@serve_app.command("coordinator")
def serve_coordinator(
    *,
    bind: Bind = "tcp://127.0.0.1:5700",
    vcpus: Annotated[
        int | None,
        typer.Option(
            "--vcpus",
            min=1,
            max=256,
            envvar="SHADOWMMU_VCPUS",
            help="Start when so many vCPUs are ready. Without: when their number is stable.",
        ),
    ] = None,
    hosts: Annotated[
        int, typer.Option("--hosts", min=0, max=8, help="Wait for so many host agents, too.")
    ] = 0,
    ops: Ops = _DEFAULTS.ops,
    workload: WorkloadOption = None,
    mode: ModeOption = None,
    tdp: TdpOption = None,
    seed: Seed = _DEFAULTS.seed,
    profile: Profile = _DEFAULTS.profile,
    bypass_guest_pf: BypassGuestPf = None,
    memory_model: MemoryModelOption = _DEFAULTS.memory_model,
    vpid: Vpid = _DEFAULTS.vpid,
    audit: AuditOption = Audit.SAMPLED,
    mutant: MutantOption = None,
    check: Check = _DEFAULTS.check,
    host_rate: HostRate = _DEFAULTS.host_rate,
    park_rate: ParkRate = _DEFAULTS.park_rate,
    memory_pages: MemoryPages = _DEFAULTS.memory_pages,
    mmu_pages: MmuPages = _DEFAULTS.mmu_pages,
    wait_seconds: Annotated[
        float, typer.Option("--wait-seconds", min=0.1, help="Longest wait for the workers.")
    ] = 60.0,
    stable_seconds: Annotated[
        float, typer.Option("--stable-seconds", min=0.1, help="How long their number must be stable.")
    ] = 3.0,
    out: InFolder = None,
    hold_verdict: Annotated[
        float,
        typer.Option(
            "--hold-verdict",
            min=0.0,
            envvar="SHADOWMMU_HOLD_VERDICT",
            help="So many seconds after a run in --out that has not passed, end with its status again instead of "
            "beginning another: for a restart policy, which takes verdicts for crashes.",
        ),
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON instead of tables.")] = False,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    live: LiveOption = None,
    live_hold: LiveHold = 0.0,
    catalogue: CatalogueOption = None,
    log_format: LogFormatOption = LogFormat.CONSOLE,
) -> None:
    """The coordinator of one run; exit status 0 pass, 1 violated, 2 unknown. The others join it."""
    from shadowmmu.cli.coordinate import coordinate
    from shadowmmu.cli.live import open_live
    from shadowmmu.client import Security
    from shadowmmu.coordinator import RunSettings

    check_addresses(**{"--bind": bind})
    security = Security(keys, insecure)
    check_security("--bind", bind, lambda: security.server(COORDINATOR))
    config = make_config(
        vcpus,
        workload=workload,
        mode=mode,
        tdp=tdp,
        seed=seed,
        ops=ops,
        profile=profile,
        bypass_guest_pf=bypass_guest_pf,
        memory_model=memory_model,
        vpid=vpid,
        audit=audit,
        mutant=mutant,
        check=check,
        host_rate=host_rate,
        park_rate=park_rate,
        memory_pages=memory_pages,
        mmu_pages=mmu_pages,
    )
    settings = RunSettings(
        config=config, vcpus=vcpus, hosts=hosts, wait_seconds=wait_seconds, stable_seconds=stable_seconds
    )
    status = coordinate(
        settings,
        bind,
        out,
        security,
        hold_verdict=hold_verdict,
        live=open_live(live),
        live_hold=live_hold,
        catalogue=catalogue,
        as_json=json,
        log_format=log_format,
    )
    raise typer.Exit(status)


@worker_app.command("vcpu")
def worker_vcpu(
    *,
    coordinator: ConnectTo,
    name: Name = None,
    linger: Linger = 0.0,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    log_format: LogFormatOption = LogFormat.CONSOLE,
) -> None:
    """A virtual processor: joins a run, executes its share of the instructions."""
    from shadowmmu.cli.logs import set_up_logs
    from shadowmmu.client import KeyRole
    from shadowmmu.vcpu import WorkerOptions, run_worker

    security = _worker_security(coordinator, KeyRole.VCPU, keys, insecure=insecure)
    set_up_logs(log_format)
    options = WorkerOptions(coordinator=coordinator, linger_seconds=linger, security=security)
    if name is not None:
        options = msgspec.structs.replace(options, name=name)
    raise typer.Exit(run_loop(run_worker(options)))


@worker_app.command("host")
def worker_host(
    *,
    coordinator: ConnectTo,
    name: Name = None,
    linger: Linger = 0.0,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
    log_format: LogFormatOption = LogFormat.CONSOLE,
) -> None:
    """A host agent: reclaims and moves pages, reads dirty logs, squeezes the number of shadow pages."""
    from shadowmmu.cli.logs import set_up_logs
    from shadowmmu.client import KeyRole
    from shadowmmu.hostagent import AgentOptions, run_agent

    security = _worker_security(coordinator, KeyRole.HOST, keys, insecure=insecure)
    set_up_logs(log_format)
    options = AgentOptions(coordinator=coordinator, linger_seconds=linger, security=security)
    if name is not None:
        options = msgspec.structs.replace(options, name=name)
    raise typer.Exit(run_loop(run_agent(options)))


def _worker_security(address: str, role: KeyRole, keys: Path | None, *, insecure: bool) -> Security:
    """What a worker was told about keys, if it has what it needs."""
    from shadowmmu.client import Security

    check_addresses(**{"--coordinator": address})
    security = Security(keys, insecure)
    check_security("--coordinator", address, lambda: security.client(role, COORDINATOR))
    check_security("--coordinator", None, lambda: security.client(role, MMU))
    return security
