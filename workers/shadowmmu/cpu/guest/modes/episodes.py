"""What the program does between computations, and how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.guest.modes import edits, switching
from shadowmmu.cpu.program import Op

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = ["EPISODES", "EVERY", "episode"]

EPISODES: Final[tuple[tuple[int, Callable[[ModesProgram], list[Op]]], ...]] = (
    (16, edits.change_page),
    (3, edits.flood),
    (3, edits.scribble),
    (4, edits.change_link),
    (2, edits.change_large),
    (2, edits.change_root),
    (2, edits.change_pdpte),
    (3, edits.move_table),
    (1, edits.protect_window),
    (6, switching.change_space),
    (4, switching.switch_mode),
    (4, switching.toggle),
    (1, switching.invalidate_anything),
    (1, switching.be_refused),
)
EVERY: Final = [do for weight, do in EPISODES for _ in range(weight)]


def episode(program: ModesProgram) -> list[Op]:
    """The instructions of one episode."""
    return program.prng.choice(EVERY)(program)
