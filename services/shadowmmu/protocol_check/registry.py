"""The checks of a service: functions, collected by the decorator `checks`.

Each takes a `Lab` and returns if all is well; it raises `CheckFailed` with what is wrong, or `CheckSkipped` with what
the service lacks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from shadowmmu.protocol_check.checks import Check

if TYPE_CHECKING:
    from shadowmmu.protocol_check.lab import Lab

__all__ = ["SERVER_CHECKS", "CheckFailed", "CheckSkipped", "ServerCheck", "checks", "require"]

Procedure: TypeAlias = "Callable[[Lab], None]"


class CheckFailed(Exception):  # noqa: N818 (an outcome, not a defect of ours)
    """The service does not do what the specification says."""


class CheckSkipped(Exception):  # noqa: N818 (as above)
    """The service has not what is needed to see it."""


class ServerCheck(msgspec.Struct, frozen=True):
    """A check and how it is carried out."""

    check: Check
    procedure: Procedure


SERVER_CHECKS: Final[list[ServerCheck]] = []
"""All of them, in the order in which they were defined."""


def checks(id: str, title: str, section: str) -> Callable[[Procedure], Procedure]:
    """Makes a function a check: `section` is the heading in docs/PROTOCOL.md that demands it."""

    def add(procedure: Procedure) -> Procedure:
        SERVER_CHECKS.append(ServerCheck(Check(f"server.{id}", title, section), procedure))
        return procedure

    return add


def require(holds: object, text: str) -> None:
    """Raises CheckFailed with the text unless it holds."""
    if not holds:
        raise CheckFailed(text)
