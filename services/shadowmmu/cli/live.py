"""The option `--live`: opens the live page's server, or says why that is not possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shadowmmu.cli.usage import bad_value

if TYPE_CHECKING:
    from shadowmmu.coordinator.live import LiveServer

__all__ = ["open_live"]


def open_live(text: str | None) -> LiveServer | None:
    """The server for an option's value, listening, with its URL on stderr; None without one.

    Raises the option's error if there can be none.
    """
    if not text:
        return None
    try:
        from shadowmmu.coordinator.live import LiveAddress, LiveServer
    except ImportError as error:
        missing = f"the live page needs {error.name}: pip install 'shadowmmu[live]'"
        raise bad_value("--live", missing) from error
    try:
        address = LiveAddress.parse(text)
    except ValueError as error:
        raise bad_value("--live", str(error)) from error
    try:
        server = LiveServer(address)
    except OSError as error:
        raise bad_value("--live", f"cannot listen at {text}: {error.strerror or error}") from error
    typer.echo(f"Live: {server.url}", err=True)
    return server
