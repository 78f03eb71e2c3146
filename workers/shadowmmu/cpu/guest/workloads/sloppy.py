"""A guest that invalidates late, or not at all, as the architecture allows it to.

Nothing here is wrong on a real processor: old translations stay usable, so late stores of others go to where a page was
before. What was there may by then be a table. Data never has bit 0 set, so such a store can only take an entry
away, which the fault handler then repairs. What it must not do is go unnoticed by a hypervisor that believes the table
to be write-protected; the episodes are made so that this would happen if the hypervisor missed a flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.layout import CONTESTED_PAGES
from shadowmmu.cpu.guest.memory import (
    COW,
    DATA_PAGE,
    FIRST_ALIAS,
    FIRST_TABLE_IN_VIEW,
    TABLE,
    Arena,
    P,
    Table,
    W,
)
from shadowmmu.cpu.guest.paging import (
    Change,
    alias_directory,
    alias_table,
    discard,
    entry_for,
    frame_of,
    release,
    unalias_table,
    write_entries,
)
from shadowmmu.cpu.guest.shootdown import ask_to_touch, invalidate
from shadowmmu.cpu.guest.steps import WRITE, Item, call, step
from shadowmmu.cpu.guest.touching import choose_hot, compute, touch_pages
from shadowmmu.cpu.guest.workloads.anon import some_mapped, some_unmapped
from shadowmmu.cpu.program import Invlpg, Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = [
    "late_invalidation",
    "late_second_directory",
    "move_without_invalidation",
    "table_becomes_data",
    "table_in_view",
]

TOUCHED_PAGES = 3
"""Pages from an arena's first one on that everybody is made to have in the TLB before they go."""
VIEWS = 8
"""Level 2 entries for tables in view."""
VIEW_ENTRIES = (509, 510)
"""Entries of such a table that are used."""


@step
def change_quietly(kernel: Kernel, number: int, clear: int, set_: int, *pages: int) -> None:
    """Changes bits of the pages' entries and tells nobody."""
    arena = kernel.arena(number)
    changes: list[Change] = []
    for page in pages:
        table = arena.table_of(page)
        entry = 0 if table is None else table.entries.get(page & 511, 0)
        if table is not None and entry:
            changes.append((table, page & 511, entry & ~clear | set_))
    kernel.push(write_entries(changes))


@step
def invalidate_now(kernel: Kernel, number: int) -> None:
    """What should have been done before."""
    kernel.push(*invalidate(kernel, kernel.arena(number), []))


@step
def reload_cr3(kernel: Kernel) -> None:
    """Only this vCPU's TLB is emptied."""
    kernel.push(kernel.reload_cr3())


def _finally(kernel: Kernel, number: int) -> list[Item]:
    """Late invalidation: everywhere, here, or never."""
    match kernel.prng.below(3):
        case 0:
            return [call(invalidate_now, number)]
        case 1:
            return [call(reload_cr3)]
        case _:
            return []


# --- a table in a frame that others still write to as data ----------------------------------------------------


@step
def link_view(kernel: Kernel, number: int, page: int, index: int) -> None:
    """The frame at `page`, already filled in with entries through that page, is a level 1 table from now on."""
    arena = kernel.arena(number)
    table = arena.tables[index] = Table(frame_of(arena.entry(page)))
    table.entries = _view_entries(kernel, arena)
    kernel.push(write_entries([(arena.directory, index, entry_for(table.frame, TABLE))]))


@step
def unlink_view(kernel: Kernel, number: int, index: int) -> None:
    """It is data again."""
    arena = kernel.arena(number)
    table = arena.tables.pop(index, None)
    if table is not None:
        entries = list(table.entries)
        kernel.push(
            write_entries([(arena.directory, index, 0)]), write_entries([(table, low, 0) for low in entries])
        )


def _view_entries(kernel: Kernel, arena: Arena) -> dict[int, int]:
    """What the table maps: frames of pages that stay."""
    frames = [frame_of(entry) for entry in map(arena.entry, range(kernel.layout.hot_pages)) if entry]
    return {low: entry_for(frames[n % len(frames)], DATA_PAGE) for n, low in enumerate(VIEW_ENTRIES)}


def table_in_view(kernel: Kernel) -> list[Item]:
    """A page that everybody writes to becomes a table: still mapped (BUGS.md A10), just unmapped (A1), or just
    made read-only (B1), in each case without telling the others.

    For A1 the table that mapped the page is used by a new second name just before the new table is: the hypervisor
    synchronises it, drops the old translation, and puts the flush off. The new table is filled in through the old
    page, so that there is no other translation of its frame that would make the hypervisor flush when it protects it.
    """
    number = kernel.arena_here()
    arena = kernel.arena(number)
    stay = [page for page in range(kernel.layout.hot_pages) if arena.entry(page) & (P | W | COW) == P | W]
    views = [
        index
        for index in range(FIRST_TABLE_IN_VIEW, FIRST_TABLE_IN_VIEW + VIEWS)
        if index not in arena.tables
    ]
    names = [index for index in range(FIRST_ALIAS, FIRST_ALIAS + 8) if index not in arena.aliases]
    if len(stay) < 2 or not views or not names:
        return []
    contested = [page for page in stay if page < CONTESTED_PAGES]
    page, index, alias = (
        kernel.prng.choice(contested or stay),
        kernel.prng.choice(views),
        kernel.prng.choice(names),
    )
    fill = Touches(
        [(WRITE, arena.gva(page) + 8 * low, 8, entry) for low, entry in _view_entries(kernel, arena).items()]
    )
    seen = [index << 9 | low for low in VIEW_ENTRIES]
    other = next(candidate for candidate in stay if candidate != page)
    uses = touch_pages(kernel, arena, seen, write=False)
    before: list[Item] = []
    after: list[Item] = []
    match kernel.prng.below(6):
        case 0:
            before = [call(change_quietly, number, W, 0, page), call(reload_cr3)]
        case 1:
            pass
        case _:
            before = [
                call(change_quietly, number, P, 0, page),
                call(alias_table, number, page >> 9, alias, TABLE),
            ]
            uses.items[:0] = touch_pages(kernel, arena, [alias << 9 | other & 511], write=False).items
            after = [call(unalias_table, number, alias)]
    return [
        fill,
        *ask_to_touch(kernel, arena, page),
        *before,
        call(link_view, number, page, index),
        uses,
        *ask_to_touch(kernel, arena, page),
        call(compute, 256),
        Invlpg(arena.gva(seen[0])),
        touch_pages(kernel, arena, seen),
        call(compute, 128),
        call(unlink_view, number, index),
        *_finally(kernel, number),
        call(change_quietly, number, 0, P | W, page),
        *after,
    ]


# --- other ways to be late --------------------------------------------------------------------------------


def late_invalidation(kernel: Kernel) -> list[Item]:
    """Rights are taken away at once and from the TLBs later.

    Pages that everybody uses go away altogether, and a new second name of their table makes the hypervisor
    synchronise it: it then has no translation of their frames any more, but the TLBs have (BUGS.md B2).
    """
    number = kernel.arena_here()
    arena = kernel.arena(number)
    names = [index for index in range(FIRST_ALIAS, FIRST_ALIAS + 8) if index not in arena.aliases]
    if not names or kernel.prng.chance(5):
        pages = [page for page in some_mapped(kernel, arena, 4, stay=True) if arena.entry(page) & W]
        return [
            touch_pages(kernel, arena, pages),
            call(change_quietly, number, kernel.prng.choice((W, P)), 0, *pages),
            call(choose_hot),
            call(compute, 256),
            *_finally(kernel, number),
            call(change_quietly, number, 0, P | W, *pages),
        ]
    stay = [page for page in range(kernel.layout.hot_pages) if arena.entry(page) & (P | W | COW) == P | W]
    pages, rest = [page for page in stay if page < TOUCHED_PAGES], stay[-1:]
    alias = names[0]
    return [
        touch_pages(kernel, arena, rest, write=False),
        call(alias_table, number, 0, alias, TABLE),
        *ask_to_touch(kernel, arena, 0, TOUCHED_PAGES),
        call(change_quietly, number, P, 0, *pages),
        touch_pages(kernel, arena, [alias << 9 | page for page in rest], write=False),
        call(compute, 256),
        *ask_to_touch(kernel, arena, 0, CONTESTED_PAGES),
        call(compute, 256),
        *ask_to_touch(kernel, arena, 0, CONTESTED_PAGES),
        *_finally(kernel, number),
        call(change_quietly, number, 0, P | W, *pages),
        call(unalias_table, number, alias),
    ]


@step
def move_quietly(kernel: Kernel, number: int, *pages: int) -> None:
    """Other frames take the place of the pages' own, which are free at once."""
    arena = kernel.arena(number)
    pool = kernel.memory.pool
    changes: list[Change] = []
    old = []
    for page in pages:
        table = arena.table_of(page)
        entry = arena.entry(page)
        if table is not None and entry & P and len(pool.free) > 1:
            frame = pool.take_data()
            assert frame is not None
            changes.append((table, page & 511, entry_for(frame, DATA_PAGE)))
            old.append(frame_of(entry))
    kernel.push(write_entries(changes), call(release, *old))


def move_without_invalidation(kernel: Kernel) -> list[Item]:
    """Pages move to other frames; the old ones are given out again at once."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 3, stay=True)
    new = some_unmapped(kernel, arena, 3)
    return [
        call(move_quietly, number, *pages),
        touch_pages(kernel, arena, new) if new else Touches([]),
        touch_pages(kernel, arena, pages),
        call(choose_hot),
        call(compute, 192),
        *_finally(kernel, number),
    ]


@step
def unlink_quietly(kernel: Kernel, number: int, index: int) -> None:
    """A table is unlinked and freed, and TLBs still lead to its pages, its frames to new uses."""
    arena = kernel.arena(number)
    table = arena.tables.pop(index, None)
    if table is not None:
        kernel.push(write_entries([(arena.directory, index, 0)]), discard(table))


def table_becomes_data(kernel: Kernel) -> list[Item]:
    """A table's frame is mapped as data, and a data frame becomes a table, before anybody knows."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    indices = [n for n in arena.tables if 1 <= n < FIRST_ALIAS and n not in arena.aliases.values()]
    if not indices:
        return []
    index = kernel.prng.choice(indices)
    pages = some_unmapped(kernel, arena, 6)
    return [
        touch_pages(kernel, arena, [page for page in arena.mapped() if page >> 9 == index][:4], write=False),
        call(unlink_quietly, number, index),
        touch_pages(kernel, arena, pages) if pages else Touches([]),
        call(choose_hot),
        call(compute, 192),
        *_finally(kernel, number),
    ]


def late_second_directory(kernel: Kernel) -> list[Item]:
    """A page moves while the second directory link is away; then the link comes back (BUGS.md A2)."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    stay = [page for page in range(kernel.layout.hot_pages) if arena.entry(page) & P]
    others = [page for page in arena.mapped() if page >> 9]
    if not stay or not others:
        return []
    page = kernel.prng.choice(stay)
    return [
        call(alias_directory, number, 1),
        touch_pages(kernel, arena, [page], alias=True),
        call(alias_directory, number, 0),
        call(move_quietly, number, page),
        call(alias_directory, number, 1),
        touch_pages(kernel, arena, others[:1], write=False, alias=True),
        call(choose_hot),
        call(compute, 128),
        Touches([(WRITE, arena.gva(page, alias=True) + 512, 8, 2)]),
        *_finally(kernel, number),
    ]
