"""`shadowmmu report`: a run, a virtual-time run or a sweep as one HTML file that needs no network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from shadowmmu.cli.runs import needs_experiments
from shadowmmu.cli.usage import bad_value

__all__ = ["report"]

DEFAULT_NAME: Final = "report.html"


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a run (--out of stress or simulate) or of a sweep."),
    ],
    *,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="OTHER", help="Compare with another one of the same kind."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help=f"Where to write it. Without: DIR/{DEFAULT_NAME}."
        ),
    ] = None,
) -> None:
    """Write a report of a folder as one HTML file, and say where it is; exit status 0 whatever its verdict."""
    for package in ("altair", "polars", "vl_convert"):
        needs_experiments(package)
    from shadowmmu.reports import ReportError, page_of, render_html

    try:
        page = page_of(folder, against)
    except ReportError as error:
        raise typer.BadParameter(str(error)) from error
    target = output or folder / DEFAULT_NAME
    try:
        target.write_text(render_html(page), encoding="utf-8")
    except OSError as error:
        raise bad_value("--output", f"{target}: {error.strerror}") from error
    typer.echo(os.fsencode(target))  # names of files need not be text
