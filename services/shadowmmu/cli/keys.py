"""`shadowmmu keys`: makes the keys of a run's services and clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowmmu.cli.usage import bad_value
from shadowmmu.protocol.states import Service

if TYPE_CHECKING:
    from shadowmmu.client.access import KeyRole
    from shadowmmu.client.keys import MadeKey

__all__ = ["keys"]


def keys(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the keys; made if it is not there.")
    ],
    role: Annotated[
        str | None,
        typer.Option(
            "--role",
            help="One client's key, only: vcpu, host, mmu, coordinator or observer.",
            metavar="ROLE",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="With --role: a key of its own for one client, in a folder to hand over."
        ),
    ] = None,
    service: Annotated[Service | None, typer.Option("--service", help="One service's key, only.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace keys that are there; the old ones are valid no more.")
    ] = False,
) -> None:
    """Make keys: one pair per service and per role, and the list of those that are authorised.

    Keys that are there stay as they are. Secrets are readable to you alone.
    """
    from shadowmmu.client.keys import KeysError, read_public_key

    if name is not None and role is None:
        raise bad_value("--name", "it goes with --role")
    if service is not None and role is not None:
        raise bad_value("--service", "it does not go with --role")
    try:
        made = _make(folder, _role(role), name, service, force=force)
    except KeysError as error:
        raise bad_value("--name", str(error)) from error
    except OSError as error:
        raise bad_value("DIR", f"{error.filename or folder}: {error.strerror}") from error
    for key in made:
        public = read_public_key(key.path.with_suffix(".key"))
        typer.echo(f"{'made' if key.made else 'kept'}  {public}  {key.path}")
    if (role is not None or service is not None) and not any(key.made for key in made):
        raise bad_value("--force", f"{made[0].path} is there already; --force replaces it")


def _role(text: str | None) -> KeyRole | None:
    # Not an option of its own type: that would load ZeroMQ for every command's help.
    from shadowmmu.client.access import KeyRole

    try:
        return None if text is None else KeyRole(text)
    except ValueError as error:
        roles = ", ".join(role.value for role in KeyRole)
        raise bad_value("--role", f"{text!r} is none of {roles}") from error


def _make(
    folder: Path, role: KeyRole | None, name: str | None, service: Service | None, *, force: bool
) -> list[MadeKey]:
    from shadowmmu.client import keys as files

    if service is not None:
        return [files.make_service_key(folder, service, force=force)]
    if role is None:
        return files.make_keys(folder, force=force)
    if name is None:
        return [files.make_role_key(folder, role, force=force)]
    return [files.make_client_key(folder, role, name, force=force)]
