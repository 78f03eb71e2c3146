"""`shadowmmu protocol ...`: the conformance kit. Exit status 0 conforming, 1 not, 2 could not be found out."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from shadowmmu.cli.console import output_console
from shadowmmu.cli.loop import run_loop
from shadowmmu.cli.usage import FAILED_STATUS, check_addresses

if TYPE_CHECKING:
    from shadowmmu.protocol_check import Report

__all__ = ["protocol_app"]

NOT_CONFORMING_STATUS: Final = 1


class ReportForm(enum.Enum):
    """How a report is written."""

    TEXT = "text"
    TAP = "tap"
    JUNIT = "junit"


protocol_app = typer.Typer(
    no_args_is_help=True, help="Check a service, or a client, against docs/PROTOCOL.md."
)

Format = Annotated[ReportForm, typer.Option("--format", help="For people, or as TAP 14, or as JUnit XML.")]


@protocol_app.command("check-server")
def check_server(
    connect: Annotated[str, typer.Option("--connect", help="The MMU service's address.", metavar="ADDR")],
    form: Format = ReportForm.TEXT,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random clients.")] = 0,
    budget: Annotated[
        float, typer.Option("--budget", min=0.1, help="Seconds for the random clients.", metavar="SECONDS")
    ] = 5.0,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Longest time for an answer, in seconds.")
    ] = 5.0,
) -> None:
    """Play clients to a running MMU service that has no others, and judge it. It is usable afterwards."""
    check_addresses(**{"--connect": connect})
    from shadowmmu.protocol_check import ServerLimits, ServiceUnreachableError
    from shadowmmu.protocol_check import check_server as check

    try:
        report = check(connect, ServerLimits(patience=timeout, seed=seed, budget=budget))
    except ServiceUnreachableError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED_STATUS) from error
    _finish(report, form)


@protocol_app.command("check-client", context_settings={"ignore_unknown_options": True})
def check_client(
    command: Annotated[
        list[str],
        typer.Argument(
            help="How the client is started. {address} stands for the service's address, {coordinator} for that of"
            " a coordinator; they are also in SHADOWMMU_MMU and SHADOWMMU_COORDINATOR.",
            metavar="-- COMMAND...",
        ),
    ],
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=0.5,
            help="Seconds for the client to attach, and to react to the end of its session.",
        ),
    ] = 10.0,
    form: Format = ReportForm.TEXT,
) -> None:
    """Play the MMU service to a client, started as a process once per scene, and judge it."""
    from shadowmmu.protocol_check import ClientLimits
    from shadowmmu.protocol_check import check_client as check

    try:
        report = run_loop(check(command, ClientLimits(attach=timeout)))
    except OSError as error:
        typer.echo(f"cannot start {command[0]}: {error}", err=True)
        raise typer.Exit(FAILED_STATUS) from error
    _finish(report, form)


def _finish(report: Report, form: ReportForm) -> NoReturn:
    """Prints the report, in colours where somebody looks, and ends with its status."""
    from rich.text import Text

    from shadowmmu.protocol_check import ReportFormat, render

    rendered = render(report, ReportFormat(form.value))
    if form is ReportForm.TEXT:
        text = Text(rendered, end="")
        for pattern, style in (
            (r"(?m)^ok ", "green"),
            (r"(?m)^FAILED", "bold red"),
            (r"(?m)^skipped", "yellow"),
        ):
            text.highlight_regex(pattern, style)
        output_console().print(text, soft_wrap=True, end="")
    else:
        typer.echo(rendered, nl=False)
    raise typer.Exit(0 if report.passed else NOT_CONFORMING_STATUS)
