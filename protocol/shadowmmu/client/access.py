"""Who may do what: the roles of keys, as a table.

A connection's key says who its user is (`shadowmmu.client.keys`), the user's role what it may open a session as. A
session belongs to the user who opened it: messages of another one do not reach it, whatever routing id they come from.
docs/SECURITY.md shows the table; a test compares.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import Final

import msgspec

from shadowmmu.protocol import COORDINATOR, MMU, Service
from shadowmmu.protocol.messages import Role

__all__ = ["ANYBODY", "MAY_OPEN", "KeyRole", "User", "forbidden", "key_role"]


class KeyRole(enum.Enum):
    """What a key is for; each public key in the authorised list has one."""

    VCPU = "vcpu"
    HOST = "host"
    MMU = "mmu"  # the MMU service, as a member of a run
    COORDINATOR = "coordinator"
    OBSERVER = "observer"  # asks for health only


class User(msgspec.Struct, frozen=True):
    """Who speaks: the owner of a key. `role` None: anybody, who may do everything (`ANYBODY`)."""

    role: KeyRole | None
    name: str = ""
    key: str = ""

    def __str__(self) -> str:
        if self.role is None:
            return "anybody"
        return f"{self.role.value} key {self.key[:8]}..." + (f" ({self.name})" if self.name else "")


ANYBODY: Final = User(None)
"""Who speaks on a socket without keys."""

MAY_OPEN: Final = MappingProxyType(
    {
        KeyRole.VCPU: {MMU: frozenset({Role.VCPU}), COORDINATOR: frozenset({Role.VCPU})},
        KeyRole.HOST: {MMU: frozenset({Role.HOST}), COORDINATOR: frozenset({Role.HOST})},
        KeyRole.MMU: {MMU: frozenset[Role](), COORDINATOR: frozenset({Role.MMU})},
        KeyRole.COORDINATOR: {MMU: frozenset({Role.PROBE}), COORDINATOR: frozenset[Role]()},
        KeyRole.OBSERVER: {MMU: frozenset({Role.PROBE}), COORDINATOR: frozenset({Role.PROBE})},
    }
)
"""As what a key of a role may open a session (Attach, Join) at each service."""

_KEY_ROLES: Final = MappingProxyType(
    {
        Role.VCPU: KeyRole.VCPU,
        Role.HOST: KeyRole.HOST,
        Role.MMU: KeyRole.MMU,
        Role.PROBE: KeyRole.OBSERVER,
    }
)


def key_role(role: Role) -> KeyRole:
    """The role of the key that a peer of that role uses."""
    return _KEY_ROLES[role]


def forbidden(
    sender: User | None, service: Service, owner: User | None = None, opens: Role | None = None
) -> str | None:
    """Why a message is refused (ErrorCode.FORBIDDEN), or None.

    `sender`: whose key its connection has, None for a key that is not authorised any more. `owner`: who opened the
    session that the routing id belongs to, if there is one. `opens`: the role that the message asks for, if it is one
    that opens a session.
    """
    if sender is None:
        return "this connection's key is not authorised any more"
    if owner is not None and owner.key != sender.key:
        return "the session of this routing id belongs to another key"
    if opens is None or sender.role is None or opens in MAY_OPEN[sender.role][service]:
        return None
    return f"a key of role {sender.role.value} may not be a {opens.value} here"
