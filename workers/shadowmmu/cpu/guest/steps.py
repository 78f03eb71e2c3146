"""Steps: what a guest kernel does between instructions, as records that can be stored.

A kernel's future is a stack of instructions and steps. A step names a function and its numbers; when it comes to the
top, the function decides, by what the kernel knows then, which instructions and steps take its place. So there is no
hidden control state: a loop is a step that puts itself back, a routine with a result reads `kernel.value`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeAlias, cast

import msgspec

from shadowmmu.cpu.program import (
    Halt,
    Invlpg,
    LockedAccess,
    SendIpi,
    Touch,
    Touches,
    UsedLoad,
    WriteRegister,
)
from shadowmmu.protocol.events import AccessFlag

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = [
    "READ",
    "STEPS",
    "USER_FETCH",
    "USER_READ",
    "USER_WRITE",
    "WRITE",
    "Item",
    "Step",
    "call",
    "step",
    "stores",
]

READ: Final = 0
WRITE: Final = int(AccessFlag.WRITE)
USER_READ: Final = int(AccessFlag.USER)
USER_WRITE: Final = int(AccessFlag.USER | AccessFlag.WRITE)
USER_FETCH: Final = int(AccessFlag.USER | AccessFlag.FETCH)

Args = ParamSpec("Args")


class Step(msgspec.Struct, tag="step"):
    """A call of the step function `name`."""

    name: str
    args: list[int] = []


Item: TypeAlias = Step | Touches | UsedLoad | LockedAccess | Invlpg | WriteRegister | SendIpi | Halt
"""What the stack is made of."""

STEPS: Final[dict[str, Callable[..., None]]] = {}


def step(
    function: Callable[Concatenate[Kernel, Args], None],
) -> Callable[Concatenate[Kernel, Args], None]:
    """Makes a function usable as a step, under its name. Its arguments are whole numbers."""
    STEPS[function.__name__] = function
    return function


def call(
    function: Callable[Concatenate[Kernel, Args], None], *args: Args.args, **kwargs: Args.kwargs
) -> Step:
    """The step that calls `function(kernel, *args)`."""
    assert not kwargs, "steps take their arguments by position"
    return Step(function.__name__, cast("list[int]", list(args)))


def stores(words: list[tuple[int, int]]) -> Touches:
    """The kernel stores 8-byte words: (gva, value) each."""
    items: list[Touch] = [(WRITE, gva, 8, value) for gva, value in words]
    return Touches(items)
