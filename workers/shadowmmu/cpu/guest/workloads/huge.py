"""2 MiB pages: mapped, split into a table of 4 KiB pages, collapsed again.

The blocks are data blocks, which all arenas share; their frames are never freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.memory import DATA_PAGE, FIRST_HUGE, TABLE, Arena, Table
from shadowmmu.cpu.guest.paging import discard, entry_for, write_entries
from shadowmmu.cpu.guest.shootdown import invalidate
from shadowmmu.cpu.guest.steps import Item, call, step
from shadowmmu.cpu.guest.touching import choose_hot, compute, touch_pages

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["huge_life", "map_huge", "split_and_collapse", "unmap_huge"]

HUGE_ENTRIES = 4
HUGE_PAGE = DATA_PAGE | x86.PT_PAGE_SIZE_MASK


@step
def store_huge(kernel: Kernel, number: int, index: int, frame: int) -> None:
    """A level 2 entry maps a block."""
    arena = kernel.arena(number)
    arena.huge[index] = frame
    kernel.push(write_entries([(arena.directory, index, entry_for(frame, HUGE_PAGE))]))


@step
def split(kernel: Kernel, number: int, index: int, entries: int) -> None:
    """The same translations by a table of 4 KiB pages; only `entries` of them at once, the others on demand."""
    arena = kernel.arena(number)
    frame = kernel.memory.pool.take()
    if frame is None or index not in arena.huge or index in arena.tables:
        if frame is not None:
            kernel.memory.pool.free.append(frame)
        return
    table = arena.tables[index] = Table(frame)
    first = kernel.prng.below(512 - entries + 1)
    block = arena.huge[index]
    kernel.push(
        write_entries(
            [(table, low, entry_for(block + low, DATA_PAGE)) for low in range(first, first + entries)]
        ),
        write_entries([(arena.directory, index, entry_for(frame, TABLE))]),
        *invalidate(kernel, arena, [index << 9] if entries == 512 else []),
    )


@step
def collapse(kernel: Kernel, number: int, index: int) -> None:
    """The block is mapped by one entry again."""
    arena = kernel.arena(number)
    table = arena.tables.pop(index, None)
    if table is not None:
        kernel.push(
            write_entries([(arena.directory, index, entry_for(arena.huge[index], HUGE_PAGE))]),
            *invalidate(kernel, arena, []),
            discard(table),
        )


@step
def drop_huge(kernel: Kernel, number: int, index: int) -> None:
    """The block is unmapped."""
    arena = kernel.arena(number)
    if index in arena.huge:
        del arena.huge[index]
        kernel.push(write_entries([(arena.directory, index, 0)]), *invalidate(kernel, arena, [index << 9]))


def _pages(kernel: Kernel, index: int) -> list[int]:
    first = kernel.prng.below(480)
    return [index << 9 | first + n for n in range(0, 32, 5)]


def _some_huge(kernel: Kernel, arena: Arena) -> int | None:
    return kernel.prng.choice(sorted(arena.huge)) if arena.huge else None


def map_huge(kernel: Kernel) -> list[Item]:
    """Maps a block and uses it."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    index = FIRST_HUGE + kernel.prng.below(HUGE_ENTRIES)
    items: list[Item] = []
    if index not in arena.huge:
        items.append(call(store_huge, number, index, kernel.prng.choice(kernel.layout.data_blocks)))
    return [*items, touch_pages(kernel, arena, _pages(kernel, index), write=not kernel.prng.chance(3))]


def split_and_collapse(kernel: Kernel) -> list[Item]:
    """Splits a block, works on it, and collapses it."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    index = _some_huge(kernel, arena)
    if index is None:
        return map_huge(kernel)
    entries = 512 if kernel.prng.chance(8) else 16
    return [
        touch_pages(kernel, arena, _pages(kernel, index)),
        call(split, number, index, entries),
        touch_pages(kernel, arena, _pages(kernel, index)),
        call(choose_hot),
        call(compute, 192),
        call(collapse, number, index),
        touch_pages(kernel, arena, _pages(kernel, index)),
    ]


def unmap_huge(kernel: Kernel) -> list[Item]:
    """Unmaps a block."""
    number = kernel.arena_here()
    index = _some_huge(kernel, kernel.arena(number))
    return [] if index is None else [call(drop_huge, number, index)]


def huge_life(kernel: Kernel) -> list[Item]:
    """A block from beginning to end."""
    return [*map_huge(kernel), *split_and_collapse(kernel), *unmap_huge(kernel)]
