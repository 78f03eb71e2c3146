"""Steps of loads: as `guest.steps`, whose records they are, for functions that act on a `LoadProgram`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, cast

from shadowmmu.cpu.guest.steps import Step

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = ["LOAD_STEPS", "call", "load_step"]

Args = ParamSpec("Args")

LOAD_STEPS: Final[dict[str, Callable[..., None]]] = {}


def load_step(
    function: Callable[Concatenate[LoadProgram, Args], None],
) -> Callable[Concatenate[LoadProgram, Args], None]:
    """Makes a function usable as a step, under its name. Its arguments are whole numbers."""
    LOAD_STEPS[function.__name__] = function
    return function


def call(
    function: Callable[Concatenate[LoadProgram, Args], None], *args: Args.args, **kwargs: Args.kwargs
) -> Step:
    """The step that calls `function(program, *args)`."""
    assert not kwargs, "steps take their arguments by position"
    return Step(function.__name__, cast("list[int]", list(args)))
