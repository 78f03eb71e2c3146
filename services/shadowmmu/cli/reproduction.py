"""What commands do with a `.repro` file: read it, execute it again, draw it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from shadowmmu.explorer.diagram import Diagram
    from shadowmmu.explorer.repro import Repro

__all__ = ["draw_repro", "read_repro", "replay_file", "write_svg"]

UNUSABLE_STATUS: Final = 2


def read_repro(path: Path) -> Repro:
    """The recording in a file; ends the command with status 2 if it cannot be used."""
    from shadowmmu.explorer.repro import ReproError, load_repro

    try:
        return load_repro(path)
    except (ReproError, OSError) as error:
        typer.echo(f"The reproduction cannot be used: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error


def replay_file(path: Path) -> None:
    """Executes a recording again and draws what happens.

    Exit status 1 if it still fails, 0 if it does not, 2 if it cannot be followed.
    """
    from shadowmmu.explorer.diagram_text import render_text
    from shadowmmu.explorer.repro import ReproError, Sameness, replay_repro

    repro = read_repro(path)
    try:
        replayed = replay_repro(repro)
    except ReproError as error:
        typer.echo(f"The reproduction cannot be followed: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
    typer.echo(f"recorded   {repro.failure.kind}, profile {repro.profile}, shadowmmu {repro.code}")
    typer.echo(f"now        {replayed.sameness.value}")
    if replayed.divergence is not None:
        typer.echo(f"diverged   {replayed.divergence}")
    if replayed.failure is not None:
        typer.echo(f"failure    {replayed.failure.kind}: {replayed.failure.text}")
    typer.echo("")
    typer.echo(render_text(draw_repro(repro, replayed.followed.ending.schedule)), nl=False)
    if replayed.sameness is Sameness.NOT_FOLLOWED:
        raise typer.Exit(UNUSABLE_STATUS)
    if replayed.failure is not None:
        raise typer.Exit(1)


def draw_repro(repro: Repro, schedule: tuple[int, ...]) -> Diagram:
    """The diagram of an execution of the recorded scenario."""
    from shadowmmu.explorer.diagram import draw

    return draw(repro.scenario, repro.profile, schedule)


def write_svg(diagram: Diagram, path: Path) -> None:
    """Draws into a file; ends the command with status 2 if it cannot be written."""
    from shadowmmu.explorer.diagram_svg import render_svg

    try:
        path.write_text(render_svg(diagram), encoding="utf-8")
    except OSError as error:
        typer.echo(f"The diagram cannot be written: {error}", err=True)
        raise typer.Exit(UNUSABLE_STATUS) from error
