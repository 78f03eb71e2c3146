"""Commands that need no run: replay, conform, profiles, health."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowmmu.cli.console import output_console
from shadowmmu.cli.loop import run_loop
from shadowmmu.cli.options import InsecureOption, KeysOption
from shadowmmu.cli.reproduction import replay_file
from shadowmmu.cli.usage import bad_value, check_addresses, check_security
from shadowmmu.protocol.messages import Role
from shadowmmu.protocol.states import Service

if TYPE_CHECKING:
    from shadowmmu.client import Security

__all__ = ["conform", "health", "profiles", "replay"]

UNUSABLE_STATUS = 2


def replay(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE.repro", help="A run's folder, with its journal, or a failing execution."
        ),
    ],
    until: Annotated[
        int | None, typer.Option("--until", min=0, help="Stop after this journal record and dump the state.")
    ] = None,
) -> None:
    """Execute a run's journal again; exit status 0 as recorded, 1 it diverged, 2 the journal cannot be used.

    A .repro file: exit status 0 if it does not fail any more, 1 if it does, 2 if it cannot be followed.
    """
    if not folder.is_dir() and folder.suffix == ".repro":
        if until is not None:
            raise bad_value("--until", "a .repro file has no journal")
        replay_file(folder)
        return
    from shadowmmu import machine
    from shadowmmu.checker import Checker, Violation
    from shadowmmu.kvm import KvmError
    from shadowmmu.protocol.events import Event

    checker = Checker()
    found: list[Violation] = []

    def check(_first: int, events: list[Event], _data: bytes) -> None:
        if not found and (violation := checker.feed_all(events)) is not None:
            found.append(violation)

    try:
        result = machine.replay(folder, until, check)
    except (machine.JournalError, KvmError, OSError) as error:
        typer.echo(f"The journal cannot be used: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
    typer.echo(f"records          {result.records}")
    if result.torn:
        typer.echo(f"torn tail        {result.torn} bytes of an unfinished frame: the writer was killed")
    typer.echo(f"events digest    {result.digest}")
    if until is None or result.recorded_digest is not None:
        typer.echo(f"recorded digest  {result.recorded_digest or 'none: the journal has no end'}")
    for violation in found:
        typer.echo(f"violation        {violation}")
        typer.echo(f"                 {violation.blame}")
    if result.state is not None:
        typer.echo(json.dumps(result.state, indent=2, default=str))
    if result.diverged_at is not None:
        typer.echo(f"It diverged at record {result.diverged_at}: {result.divergence}", err=True)
        raise typer.Exit(1)


def conform(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Recordings (*.jsonl.gz).", exists=True, dir_okay=False),
    ],
) -> None:
    """Drive the model by recordings of the real code; exit status 0 as recorded, 1 not, 2 a file cannot be used."""
    from shadowmmu.conform import conform_files, render

    total = passed = mismatches = operations = 0
    for report in conform_files(files):
        total += 1
        passed += report.passed
        operations += report.operations
        mismatches += report.mismatch is not None
        typer.echo(render(report))
    typer.echo(f"{passed} of {total} recordings pass: {operations} operations, {mismatches} mismatches")
    if mismatches:
        raise typer.Exit(1)
    raise typer.Exit(0 if passed == total else UNUSABLE_STATUS)


def profiles() -> None:
    """List the kernels that can be simulated, and the fixes that can be switched."""
    from rich import box
    from rich.table import Table

    from shadowmmu.kvm.fixes import FIXES
    from shadowmmu.kvm.profiles import BASE_PROFILES

    console = output_console()
    table = Table(
        title="Fixes: PROFILE+FIX switches one on, PROFILE-FIX off", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for column in ("fix", "bug", "bug alive", *BASE_PROFILES, "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column == "fix")
    for slug, fix in FIXES.items():
        switches = ("on" if slug in on else "off" for on in BASE_PROFILES.values())
        table.add_row(slug, fix.bug, fix.years, *switches, fix.description)
    console.print(f"Profiles: {', '.join(BASE_PROFILES)}")
    console.print(table)


def health(
    connect: Annotated[str, typer.Option("--connect", help="A service's address.", metavar="ADDR")],
    service: Annotated[
        Service | None, typer.Option("--service", help="Which service is there. Without: either.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Longest wait, in seconds.")] = 3.0,
    keys: KeysOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Ask a coordinator or an MMU service whether it is well; exit status 0 if it answers, 2 if not.

    With --keys it uses the observer's key, and --service has to say whose public key the service must have.
    """
    from shadowmmu.client import KeyRole, Security, ServiceError

    check_addresses(**{"--connect": connect})
    if keys is not None and service is None:
        raise bad_value("--service", "with --keys it has to be said: mmu or coordinator")
    security = Security(keys, insecure)
    check_security("--connect", connect, lambda: security.client(KeyRole.OBSERVER, service or Service.MMU))
    try:
        who = run_loop(_ask(connect, service, timeout, security))
    except (ServiceError, TimeoutError, OSError) as error:
        typer.echo(f"{connect} does not answer: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
    typer.echo(f"{connect}: {who} answers")


async def _ask(address: str, service: Service | None, timeout: float, security: Security) -> str:
    from shadowmmu.client import KeyRole, MemberClient, RequestRefused, probe
    from shadowmmu.protocol.errors import ErrorCode

    if service is not Service.COORDINATOR:
        try:
            await probe(address, timeout=timeout, security=security.client(KeyRole.OBSERVER, Service.MMU))
        except RequestRefused as error:
            if service is not None or error.code != ErrorCode.UNEXPECTED_MESSAGE.value:
                raise
        else:
            return "an MMU service"
    observer = security.client(KeyRole.OBSERVER, Service.COORDINATOR)
    client = await MemberClient.join(address, Role.PROBE, timeout=timeout, security=observer)
    await client.close()
    return "a coordinator"
