"""`shadowmmu stress`: a whole run on this machine.

The folder of a run (`--out`) gets report.json, the journal and run.log. Without `--out` they go to a temporary folder,
which is removed if the run passed, and kept and named if it did not.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowmmu.cli.options import (
    AuditOption,
    BypassGuestPf,
    Check,
    HostRate,
    InFolder,
    KeysOption,
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
from shadowmmu.cli.runs import CatalogueOption, enter_report
from shadowmmu.cli.usage import bad_value, check_security, make_folder
from shadowmmu.experiments.catalogue import CATALOGUE_VARIABLE
from shadowmmu.protocol.messages import Audit, RunConfig, Verdict
from shadowmmu.protocol.states import Service

if TYPE_CHECKING:
    from shadowmmu.coordinator import RunReport
    from shadowmmu.coordinator.chaos_report import ChaosReport

__all__ = ["stress"]

_DEFAULTS = RunConfig()
VIOLATED_STATUS = 1
UNKNOWN_STATUS = 2


def stress(
    *,
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=256, help="Virtual processors.")] = 4,
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
    reproduce: Annotated[
        float,
        typer.Option(
            "--reproduce",
            min=0.0,
            help="Seconds spent on a short reproduction of a violation, and its explanation.",
        ),
    ] = 60.0,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Everything in one process: repeatable to the digest.")
    ] = False,
    out: InFolder = None,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON instead of tables.")] = False,
    wait_seconds: Annotated[
        float, typer.Option("--wait-seconds", min=0.1, help="Longest wait for the processes to be ready.")
    ] = 60.0,
    restart: Annotated[
        bool, typer.Option("--restart/--no-restart", help="Start processes again that die or hang.")
    ] = True,
    chaos: Annotated[
        int | None,
        typer.Option("--chaos", min=0, metavar="SEED", help="Kill, stop and cut off processes at random."),
    ] = None,
    chaos_rate: Annotated[
        int, typer.Option("--chaos-rate", min=0, max=1000, help="Faults in the run, with --chaos.")
    ] = 5,
    keys: KeysOption = None,
    live: LiveOption = None,
    catalogue: CatalogueOption = None,
    log_format: LogFormatOption = LogFormat.CONSOLE,
) -> None:
    """Run guests against the MMU until --ops instructions are executed; exit status 0 pass, 1 violated, 2 unknown.

    Every vCPU is a process of its own, on loopback. Without --out, report, journal and log go to a temporary folder
    that is kept only if the run did not pass. With --chaos a run also has to prove that nothing was lost or executed
    twice.
    """
    if chaos is not None and (in_process or not restart):
        raise bad_value("--chaos", "faults need processes, and their restarts")
    if live and (chaos is not None or in_process):
        other = "--in-process" if in_process else "--chaos"
        raise bad_value("--live", f"a run with {other} has no coordinator that could serve it")
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
    if not in_process:
        from shadowmmu.client import Security

        check_security("--keys", None, lambda: Security(keys).server(Service.COORDINATOR))
    os.environ.pop(
        CATALOGUE_VARIABLE, None
    )  # this run is entered here, not also by a coordinator that it starts
    with _run_folder(out) as folder:
        status, report = _stress(
            config,
            vcpus,
            folder,
            in_process=in_process,
            as_json=json,
            wait_seconds=wait_seconds,
            restart=restart,
            chaos=None if chaos is None else (chaos, chaos_rate),
            keys=keys,
            live=live,
            log_format=log_format,
        )
        # A defect that was put in on purpose is in no scenario, so there is nothing to be looked for.
        if status == VIOLATED_STATUS and reproduce > 0.0 and mutant is None and not json:
            from shadowmmu.cli.postmortem import show_postmortem

            show_postmortem(folder.path, reproduce)
        if out is None and status != 0:
            folder.keep()
        if report is not None:
            enter_report(catalogue, "stress", report, folder.path if folder.kept else None)
    raise typer.Exit(status)


class _Folder:
    """A run's folder; a temporary one goes away unless somebody says `keep`."""

    def __init__(self, path: Path, *, temporary: bool) -> None:
        self.path = path
        self.temporary = temporary
        self.kept = not temporary

    def keep(self) -> None:
        self.kept = True
        typer.echo(f"Report, journal and log are kept in {self.path}", err=True)


@contextmanager
def _run_folder(out: Path | None) -> Iterator[_Folder]:
    if out is None:
        folder = _Folder(Path(tempfile.mkdtemp(prefix="shadowmmu-")), temporary=True)
    else:
        make_folder("--out", out)
        folder = _Folder(out, temporary=False)
    try:
        yield folder
    except BaseException:
        if folder.temporary and any(folder.path.iterdir()):
            folder.keep()
        raise
    finally:
        if not folder.kept:
            shutil.rmtree(folder.path, ignore_errors=True)


def _stress(
    config: RunConfig,
    vcpus: int,
    folder: _Folder,
    *,
    in_process: bool,
    as_json: bool,
    wait_seconds: float,
    restart: bool,
    chaos: tuple[int, int] | None,
    keys: Path | None,
    live: str | None,
    log_format: LogFormat,
) -> tuple[int, RunReport | None]:
    """Runs; the exit status, and the report if there is one."""
    from shadowmmu.cli.display import LiveProgress, show_report
    from shadowmmu.cli.live import open_live
    from shadowmmu.cli.logs import logs_to
    from shadowmmu.cli.loop import run_loop
    from shadowmmu.client import Security
    from shadowmmu.coordinator import RunSettings, write_report
    from shadowmmu.coordinator.embedded import LOG_NAME, run_embedded
    from shadowmmu.coordinator.inprocess import run_in_this_process

    report: RunReport | None
    chaos_report: ChaosReport | None = None
    page = open_live(live)
    log_path = folder.path / LOG_NAME
    log_path.write_bytes(b"")
    # Ours and the children's lines go to one file: both append, so that neither writes over the other.
    with (
        closing(page) if page is not None else nullcontext(),
        log_path.open("a", encoding="utf-8", buffering=1) as text_log,
        log_path.open("ab", buffering=0) as children_log,
        logs_to(log_format, text_log),
        LiveProgress(config.ops) as progress,
    ):
        settings = RunSettings(
            config=config,
            vcpus=vcpus,
            hosts=1 if config.host_rate > 0.0 else 0,
            wait_seconds=wait_seconds,
        )
        if in_process:
            report = run_in_this_process(config, vcpus, folder.path, progress)
        elif chaos is not None:
            from shadowmmu.cli.chaos import chaos_run

            seed, faults = chaos
            chaos_report, report = chaos_run(
                settings,
                folder.path,
                children_log,
                seed=seed,
                faults=faults,
                log_format=log_format.value,
                security=Security(keys),
            )
        else:
            report = run_loop(
                run_embedded(
                    settings,
                    folder.path,
                    children_log,
                    log_format=log_format.value,
                    on_progress=progress,
                    security=Security(keys),
                    restart=restart,
                    shown=None if page is None else page.serving,
                )
            )
    if chaos_report is not None:
        from shadowmmu.cli.chaos import show_chaos

        show_chaos(chaos_report)
    if report is None:
        return UNKNOWN_STATUS, None
    write_report(report, folder.path)
    show_report(report, as_json=as_json)
    if report.verdict is Verdict.VIOLATED:
        typer.echo(f"'shadowmmu replay {folder.path}' executes the journal again.", err=True)
    if chaos_report is not None and chaos_report.failures and report.verdict is Verdict.PASS:
        return UNKNOWN_STATUS, report
    return report.exit_status, report
