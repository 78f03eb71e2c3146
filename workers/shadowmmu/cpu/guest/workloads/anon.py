"""Anonymous memory: touch new pages, which the fault handler maps; free old ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.memory import Arena, P, W
from shadowmmu.cpu.guest.paging import map_frame, unmap_pages
from shadowmmu.cpu.guest.steps import Item, call
from shadowmmu.cpu.guest.touching import touch_pages

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["double_map", "grow", "some_mapped", "some_unmapped", "trim"]

REACH = 64
"""Pages of a table that anonymous memory uses; the rest is for others (`fork`, `double_map`)."""


def some_unmapped(kernel: Kernel, arena: Arena, count: int) -> list[int]:
    """Up to `count` pages in a row that are not mapped."""
    index = kernel.prng.below(kernel.layout.tables_per_arena)
    first = index << 9 | kernel.layout.hot_pages + kernel.prng.below(REACH - kernel.layout.hot_pages - count)
    return [page for page in range(first, first + count) if not arena.entry(page)]


def some_mapped(kernel: Kernel, arena: Arena, count: int, stay: bool = False) -> list[int]:
    """Up to `count` mapped pages; with `stay` up to half of them such as everybody uses and as are never freed."""
    first = kernel.layout.hot_pages
    hot = [page for page in range(first) if arena.entry(page) & P] if stay else []
    chosen = kernel.prng.sample(hot, (count + 1) // 2)
    rest = [page for page in arena.mapped() if page >= first and page & 511 < REACH]
    return chosen + kernel.prng.sample(rest, count - len(chosen))


def grow(kernel: Kernel) -> list[Item]:
    """Touches pages that were never touched."""
    arena = kernel.arena(kernel.arena_here())
    pages = some_unmapped(kernel, arena, 4 + kernel.prng.below(8))
    return [touch_pages(kernel, arena, pages, write=not kernel.prng.chance(4))] if pages else []


def trim(kernel: Kernel) -> list[Item]:
    """Frees pages of the arena that has most of them, and of the current one."""
    arenas = kernel.memory.arenas
    fullest = max(range(len(arenas)), key=lambda number: sum(1 for _ in arenas[number].mapped()))
    items: list[Item] = []
    for number in {fullest, kernel.arena_here()}:
        pages = some_mapped(kernel, arenas[number], 8 + kernel.prng.below(8))
        if pages:
            items.append(call(unmap_pages, number, *pages))
    return items


def double_map(kernel: Kernel) -> list[Item]:
    """Maps a page's frame a second time, read-only, uses it by both names, and takes the second away."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 1, stay=True)
    if not pages:
        return []
    second = pages[0] | 448
    entry = arena.entry(pages[0])
    if arena.entry(second) or not entry & P:
        return []
    kernel.memory.pool.share(entry >> 12 & (1 << 40) - 1)
    return [
        call(map_frame, number, second, entry & ~W),
        touch_pages(kernel, arena, [second], write=False),
        touch_pages(kernel, arena, [*pages, second]),
        call(unmap_pages, number, second),
    ]
