"""The workloads: for each, which episodes it is made of, how often, and how much ordinary work lies between them.

An episode is a short story of things that a kernel does to its paging structures, with the accesses that show their
effects; between two episodes the process computes, touching a few pages again and again. `mixed` has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from shadowmmu.cpu.guest.steps import Item, call, step
from shadowmmu.cpu.guest.touching import choose_hot, compute
from shadowmmu.cpu.guest.workloads import anon, churn, fork, huge, mprotect, registers, sloppy, switching
from shadowmmu.protocol.messages import Workload

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["RECIPES", "Recipe", "episode"]

Episode: TypeAlias = "Callable[[Kernel], list[Item]]"


class Recipe(msgspec.Struct, frozen=True):
    """`episodes` with their weights; `work`: accesses between two of them, on average."""

    episodes: tuple[tuple[int, Episode], ...]
    work: int


_CHURN: Final[tuple[tuple[int, Episode], ...]] = (
    (6, churn.remap),
    (3, churn.zap_table),
    (3, churn.replace_table),
    (1, churn.replace_directory),
    (3, churn.second_name),
    (2, churn.second_directory),
    (2, churn.burst),
    (2, churn.clear_accessed),
    (2, churn.scan_pages),
    (2, churn.window_on_table),
    (2, churn.window_on_data),
    (2, anon.double_map),
)

_SLOPPY: Final[tuple[tuple[int, Episode], ...]] = (
    (8, sloppy.table_in_view),
    (5, sloppy.late_invalidation),
    (2, sloppy.move_without_invalidation),
    (2, sloppy.table_becomes_data),
    (1, sloppy.late_second_directory),
    (1, anon.grow),
)

RECIPES: Final[Mapping[Workload, Recipe]] = {
    Workload.ANON: Recipe(((6, anon.grow), (1, anon.trim), (1, churn.scan_pages)), 1500),
    Workload.FORK: Recipe(((6, fork.fork), (3, anon.grow), (1, switching.switch)), 800),
    Workload.MPROTECT: Recipe(
        ((6, mprotect.read_only), (2, mprotect.no_execute), (2, mprotect.supervisor_only), (1, anon.grow)),
        800,
    ),
    Workload.MMAP_CHURN: Recipe(_CHURN, 600),
    Workload.CONTEXT_SWITCH: Recipe(
        ((4, switching.switch), (3, switching.round_trip), (3, switching.reload), (1, anon.grow)), 500
    ),
    Workload.HUGE: Recipe(
        ((3, huge.map_huge), (4, huge.split_and_collapse), (1, huge.unmap_huge), (1, anon.grow)), 800
    ),
    Workload.SLOPPY: Recipe(_SLOPPY, 200),
    Workload.MIXED: Recipe(
        (
            *_CHURN,
            *((3 * weight, chosen) for weight, chosen in _SLOPPY),
            (8, anon.grow),
            (3, fork.fork),
            (3, mprotect.read_only),
            (1, mprotect.no_execute),
            (1, mprotect.supervisor_only),
            (2, switching.switch),
            (4, switching.go_home),
            (2, switching.reload),
            (2, switching.round_trip),
            (3, huge.map_huge),
            (3, huge.split_and_collapse),
            (1, huge.unmap_huge),
            (5, registers.device),
            (2, registers.write_protect_off),
            (1, registers.syscall_enable),
        ),
        400,
    ),
}


def _choose(kernel: Kernel, recipe: Recipe) -> Episode:
    at = kernel.prng.below(sum(weight for weight, _ in recipe.episodes))
    for weight, chosen in recipe.episodes:
        at -= weight
        if at < 0:
            return chosen
    raise AssertionError("weights are positive")


@step
def episode(kernel: Kernel) -> None:
    """The next episode, and ordinary work after it."""
    recipe = RECIPES[kernel.workload]
    reserve = max(10, kernel.layout.partition_pages // 8)
    chosen: Episode = anon.trim if len(kernel.memory.pool.free) < reserve else _choose(kernel, recipe)
    kernel.count(f"episode.{chosen.__name__}")
    work = recipe.work // 2 + kernel.prng.below(recipe.work)
    kernel.push(*chosen(kernel), call(choose_hot), call(compute, work))
