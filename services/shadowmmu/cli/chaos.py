"""`shadowmmu stress --chaos`: a run with faults put in, and the proofs that it came to no harm."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
import typer

from shadowmmu.client import Security
from shadowmmu.coordinator.chaos import COORDINATOR, Fault, plan
from shadowmmu.coordinator.chaos_report import CHAOS_NAME, ChaosReport, FaultReport
from shadowmmu.coordinator.chaos_run import ChaosResult, Happened, run_chaos
from shadowmmu.coordinator.report import REPORT_NAME, RunReport
from shadowmmu.coordinator.run_types import RunSettings
from shadowmmu.protocol.messages import Verdict

__all__ = ["chaos_run", "proofs", "show_chaos"]

EARLIER_SECONDS = 0.5
"""So far apart two processes may notice the same thing."""
BASE_SECONDS = 180.0
SECONDS_PER_FAULT = 30.0
OPS_PER_SECOND = 500.0
"""What bounds a run: far more than it needs on a slow machine."""


def chaos_run(
    settings: RunSettings,
    directory: Path,
    log_file: BinaryIO,
    *,
    seed: int,
    faults: int,
    log_format: str,
    security: Security,
) -> tuple[ChaosReport, RunReport | None]:
    """Conducts the run and looks at what it left behind."""
    from shadowmmu.cli.loop import run_loop

    assert settings.vcpus is not None
    planned = plan(seed, settings.config.ops, settings.vcpus, settings.hosts, faults)
    limit = BASE_SECONDS + SECONDS_PER_FAULT * faults + settings.config.ops / OPS_PER_SECOND
    result = run_loop(
        run_chaos(
            settings,
            directory,
            log_file,
            planned,
            log_format=log_format,
            security=security,
            limit_seconds=limit,
        )
    )
    lost, duplicated, failures = proofs(result, directory)
    report = ChaosReport(
        seed=seed,
        seconds=result.seconds,
        hung=result.hung,
        restarts=len(result.restarts),
        instructions=0 if result.report is None else result.report.counters.get("vcpu.instructions", 0),
        faults=[_fault(happened, result) for happened in result.happened],
        lost=lost,
        duplicated=duplicated,
        failures=failures,
    )
    (directory / CHAOS_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return report, result.report


def show_chaos(report: ChaosReport) -> None:
    """For people, on stderr."""
    for fault in report.faults:
        when = "not due" if fault.seconds is None else f"{fault.seconds:.1f} s"
        what = f"{fault.target} {fault.kind}"
        if fault.stopped_seconds:
            what += f" for {fault.stopped_seconds:g} s"
        typer.echo(f"fault at {fault.at:,} instructions ({when}): {what}; {fault.outcome}", err=True)
    if not report.failures:
        typer.echo(f"Nothing was lost, nothing was executed twice ({report.restarts} restarts).", err=True)
    for failure in report.failures:
        typer.echo(f"chaos: {failure}", err=True)


def proofs(result: ChaosResult, directory: Path) -> tuple[int, int, list[str]]:
    """Instructions lost and executed twice, and everything that does not hold."""
    failures = []
    if result.hung:
        failures.append(f"the run had not ended after {result.seconds:.0f} s")
    failures += [f"given up: {text}" for text in result.given_up]
    report = result.report
    if report is None:
        return 0, 0, [*failures, f"there is no {REPORT_NAME}"]
    if report.verdict is not Verdict.PASS:
        return 0, 0, [*failures, f"the verdict is {report.verdict.value}: {report.text}"]
    try:
        lost, duplicated, found = _journal_proofs(directory, report)
    except (OSError, ValueError) as error:
        return 0, 0, [*failures, f"the journal cannot be used: {error}"]
    return lost, duplicated, failures + found


def _journal_proofs(directory: Path, report: RunReport) -> tuple[int, int, list[str]]:
    from shadowmmu import machine
    from shadowmmu.machine.journal import read_journal
    from shadowmmu.machine.program_check import check_programs

    failures = []
    replayed = machine.replay(directory, None)
    if replayed.diverged_at is not None:
        failures.append(f"the replay diverged at record {replayed.diverged_at}: {replayed.divergence}")
    if replayed.digest != report.stream.events_digest:
        failures.append("the replay gives other events than the coordinator has received")
    with (directory / machine.JOURNAL_NAME).open("rb") as journal:
        check = check_programs(read_journal(journal))
    failures += [f"not what the program does: {difference}" for difference in check.differences]
    executed = sum(check.instructions.values())
    told = report.counters.get("vcpu.instructions", 0)
    # What a worker had executed ahead when the run ended is in no journal: a log, or an instruction without accesses.
    wanted = report.config.ops
    lost = max(wanted - executed, 0)
    if lost:
        failures.append(f"{executed} instructions took effect of {wanted} (the workers told of {told})")
    duplicated = len(check.differences)
    return lost, duplicated, failures


def _fault(happened: Happened, result: ChaosResult) -> FaultReport:
    fault = happened.fault
    return FaultReport(
        at=fault.at,
        kind=fault.kind.value,
        target=fault.target,
        stopped_seconds=fault.seconds,
        seconds=happened.seconds,
        outcome=_outcome(fault, happened.seconds, result),
    )


def _outcome(fault: Fault, seconds: float | None, result: ChaosResult) -> str:
    """What the report says of who was missed next: the target, or because of the coordinator anybody."""
    report = result.report
    if seconds is None:
        return "the run was over before"
    if report is None:
        return "nothing is known"
    # The report counts from the start of the guests, the faults from the start of the processes.
    start = datetime.fromisoformat(report.started).timestamp() - result.began + report.seconds.waiting
    missed = [
        recovery
        for recovery in report.recoveries
        if fault.target in (recovery.name, COORDINATOR) and recovery.lost + start >= seconds - EARLIER_SECONDS
    ]
    if not missed:
        return "nobody was missed"
    if fault.target == COORDINATOR:
        first = missed[0].lost
        missed = [recovery for recovery in missed if recovery.lost <= first + EARLIER_SECONDS]
        who = f"{len(missed)} members joined again"
    else:
        missed = missed[:1]
        who = "itself again" if missed[0].replaced_by is None else "replaced"
    backs = [recovery.back for recovery in missed if recovery.back is not None]
    if len(backs) < len(missed):
        return "not everybody came back"
    return f"{who} after {max(max(backs) + start - seconds, 0.0):.1f} s"
