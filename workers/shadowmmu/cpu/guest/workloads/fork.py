"""fork: the child gets the parent's pages, both without the right to write, and whoever writes first gets a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.memory import COW, D, W
from shadowmmu.cpu.guest.paging import Change, frame_of, map_frame, unmap_pages, write_entries
from shadowmmu.cpu.guest.shootdown import invalidate, switch_to
from shadowmmu.cpu.guest.steps import Item, call, step
from shadowmmu.cpu.guest.touching import choose_hot, compute, touch_pages
from shadowmmu.cpu.guest.workloads.anon import some_mapped

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["fork"]

CHILD = 128
"""The child has the parent's page p at p + CHILD of its own arena, which has pages of its own at p."""


@step
def fork_pages(kernel: Kernel, parent: int, child: int, *pages: int) -> None:
    """Write-protects the parent's pages and maps their frames in the child."""
    source, target = kernel.arena(parent), kernel.arena(child)
    changes: list[Change] = []
    maps: list[Item] = []
    for page in pages:
        table = source.table_of(page)
        entry = source.entry(page)
        if table is None or target.entry(page + CHILD):
            continue
        if entry & (W | COW):
            entry = entry & ~(W | D) | COW
            changes.append((table, page & 511, entry))
        kernel.memory.pool.share(frame_of(entry))
        maps.append(call(map_frame, child, page + CHILD, entry))
    kernel.push(write_entries(changes), *maps, *invalidate(kernel, source, list(pages)))


def fork(kernel: Kernel) -> list[Item]:
    """A process forks, both write some of their pages, the child exits."""
    parent = kernel.arena_here()
    arenas = kernel.memory.arenas
    child = (parent + 1 + kernel.prng.below(len(arenas) - 1)) % len(arenas)
    pages = some_mapped(kernel, arenas[parent], 4 + kernel.prng.below(8), stay=kernel.prng.chance(2))
    if not pages:
        return []
    copies = [page + CHILD for page in pages]
    some = kernel.prng.sample
    return [
        call(fork_pages, parent, child, *pages),
        touch_pages(kernel, arenas[parent], some(pages, 4)),
        call(switch_to, arenas[child].space),
        touch_pages(kernel, arenas[child], copies, write=False),
        touch_pages(kernel, arenas[child], some(copies, 4)),
        call(choose_hot),
        call(compute, 256),
        call(unmap_pages, child, *copies),
        call(switch_to, arenas[parent].space),
        touch_pages(kernel, arenas[parent], some(pages, 3)),
    ]
