"""Usage errors: a message that names what was wrong, and exit status 64.

The statuses 0, 1 and 2 are verdicts; so a command line that makes no sense must not end with one of them, as typer's
own errors would (2).
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from shadowmmu.client import ClientKeys, Plain, ServerKeys
    from shadowmmu.mmu.journal_file import FsyncPolicy

__all__ = [
    "USAGE_STATUS",
    "StrictGroup",
    "bad_value",
    "check_addresses",
    "check_security",
    "fsync_policy",
    "make_folder",
]

USAGE_STATUS: Final = 64
"""EX_USAGE of sysexits.h."""
INTERRUPTED_STATUS: Final = 130
FAILED_STATUS: Final = 2
"""The program failed: the verdict is unknown."""

# Typer brings click along, or uses the installed one, depending on its version: found by way of a name of its own.
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])


def bad_value(option: str, text: str) -> typer.BadParameter:
    """The error for an option's value that a command does not like; to be raised."""
    return typer.BadParameter(text, param_hint=f"'{option}'")


def make_folder(option: str, path: Path) -> None:
    """Makes the folder that an option names, if it is not there; raises the option's error if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(option, f"{path}: {error.strerror}") from error


def fsync_policy(option: str, text: str) -> FsyncPolicy:
    """When the disk has to have the journal: never, turn, or a number of seconds. Raises the option's error."""
    from shadowmmu.mmu.journal_file import FSYNC_EVERY_TURN, FSYNC_NEVER, FsyncPolicy

    match text:
        case "never":
            return FSYNC_NEVER
        case "turn":
            return FSYNC_EVERY_TURN
        case _:
            pass
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < math.inf:
        raise bad_value(option, f"{text!r} is not 'never', 'turn' or a number of seconds")
    return FsyncPolicy(seconds)


class StrictGroup(TyperGroup):
    """The top-level command: typer's, with our exit statuses."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line; ends the program unless told otherwise."""
        try:
            status = super().main(
                args,
                prog_name,
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except _ClickException as error:
            if not standalone_mode:
                raise
            _explain(error)
            sys.exit(USAGE_STATUS)
        except typer.Abort:
            if not standalone_mode:
                raise
            sys.exit(INTERRUPTED_STATUS)
        except Exception:
            if not standalone_mode:
                raise
            # Python's own status for this is 1, which would say "violated".
            traceback.print_exc()
            sys.exit(FAILED_STATUS)
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Any) -> None:
    """What was wrong, and where help is to be found, on stderr."""
    path = "shadowmmu" if error.ctx is None else error.ctx.command_path
    if text := error.format_message():
        typer.echo(f"{path}: {text}", err=True)
    typer.echo(f"'{path} --help' says what there is.", err=True)


def check_addresses(**addresses: str | None) -> None:
    """ZeroMQ says no more than "invalid argument" of a bad address, and that late."""
    for option, address in addresses.items():
        if address is None:
            continue
        scheme, separator, rest = address.partition("://")
        if scheme not in ("tcp", "ipc", "inproc") or not separator or not rest:
            raise bad_value(option, f"{address!r} is no address; one is tcp://HOST:PORT or ipc://PATH")
        port = rest.rpartition(":")[2]
        if scheme == "tcp" and not (port == "*" or (port.isdigit() and int(port) < 1 << 16)):
            raise bad_value(option, f"{address!r} has no port; an address is tcp://HOST:PORT")


def check_security(
    option: str, address: str | None, link: Callable[[], ServerKeys | ClientKeys | Plain]
) -> None:
    """Reads the keys of a socket, and refuses an address that is too public for one without; before anything begins."""
    from shadowmmu.client import InsecureAddressError, KeysError, Plain

    try:
        keys = link()
    except KeysError as error:
        raise bad_value("--keys", str(error)) from error
    if address is not None and isinstance(keys, Plain):
        try:
            keys.check(address)
        except InsecureAddressError as error:
            raise bad_value(option, str(error)) from error
