"""Runs a coroutine as the whole of a command."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import typer

from shadowmmu.cli.usage import INTERRUPTED_STATUS

__all__ = ["run_loop"]

T = TypeVar("T")


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`; a run that was ended by a second Ctrl-C exits as an interrupted program does."""
    import asyncio

    try:
        return asyncio.run(work)
    except asyncio.CancelledError:
        raise typer.Exit(INTERRUPTED_STATUS) from None
