"""What a guest kernel does to its own paging structures: map, unmap, protect, and rebuild tables.

Each step changes the records of `memory` and puts the stores on the stack that do the same in guest memory, through
the direct map, followed by what makes others see it (`shootdown.invalidate`) and only then by what may happen to frames
that are not mapped any more. So all of this is as a careful kernel does it; what is not careful is in
`workloads.sloppy`.

Rights are widened without invalidation (TLB_RULES R6), narrowed with it. A table frame that is given back has all its
entries cleared; data never has bit 0 of a word set. So any frame of the pool can be used as a table as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import ALIAS_SLOT, direct
from shadowmmu.cpu.guest.memory import COW, DATA_PAGE, NX, TABLE, Arena, D, P, Table, W
from shadowmmu.cpu.guest.shootdown import invalidate
from shadowmmu.cpu.guest.steps import Item, call, step, stores
from shadowmmu.cpu.program import Invlpg, LockedAccess, Touches, UsedLoad
from shadowmmu.protocol.messages import LockedOp

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = [
    "Change",
    "alias_directory",
    "alias_table",
    "break_cow",
    "change_pages",
    "discard_table",
    "frame_of",
    "map_frame",
    "map_page",
    "release",
    "repair",
    "scan",
    "slot_address",
    "store_slot",
    "swap_directory",
    "swap_table",
    "unalias_table",
    "unmap_pages",
    "unmap_table",
    "write_entries",
]

Change: TypeAlias = tuple[Table, int, int]
"""(table, index, new entry)."""


def frame_of(entry: int) -> int:
    """The frame that an entry names."""
    return (entry & x86.PT64_BASE_ADDR_MASK) >> x86.PAGE_SHIFT


def entry_for(frame: int, flags: int) -> int:
    """The entry that names `frame`."""
    return frame << x86.PAGE_SHIFT | flags


def write_entries(changes: list[Change]) -> Touches:
    """Notes the changes in the records; the stores that do them in memory."""
    for table, index, value in changes:
        if value:
            table.entries[index] = value
        else:
            table.entries.pop(index, None)
    return stores([(table.address(index), value) for table, index, value in changes])


def slot_address(kernel: Kernel, arena: Arena, alias: bool = False) -> int:
    """The direct map's address of the level 3 entry that leads to the arena."""
    index = arena.slot + (ALIAS_SLOT if alias else 0)
    return direct((kernel.layout.space_l3[arena.space] << x86.PAGE_SHIFT) + 8 * index)


def store_slot(kernel: Kernel, arena: Arena, alias: bool, present: bool) -> tuple[int, int]:
    """The store that makes a level 3 entry name the arena's directory, or nothing."""
    return slot_address(kernel, arena, alias), entry_for(arena.directory.frame, TABLE) if present else 0


def _page_flags(kernel: Kernel) -> int:
    """Rights and bits of a new page: mostly writable, executable one in four, D not always set."""
    bits = kernel.prng.bits()
    return DATA_PAGE & ~(D if bits & 3 == 0 else 0) | (NX if bits & 12 else 0)


# --- pages --------------------------------------------------------------------------------------------------------


@step
def release(kernel: Kernel, *frames: int) -> None:
    """Entries that named these frames are gone from every TLB."""
    for frame in frames:
        kernel.memory.pool.release(frame)


def _table_for(kernel: Kernel, arena: Arena, page: int, changes: list[Change]) -> Table | None:
    """The level 1 table for `page`; a new one adds its link to `changes`. None: no frame is free."""
    table = arena.table_of(page)
    if table is None:
        frame = kernel.memory.pool.take()
        if frame is None:
            return None
        index = page >> 9
        table = arena.tables[index] = Table(frame)
        changes.append((arena.directory, index, entry_for(frame, TABLE)))
    return table


@step
def map_page(kernel: Kernel, number: int, page: int) -> None:
    """Maps a new frame at `page` of own arena `number`."""
    pool = kernel.memory.pool
    if len(pool.free) < 2:
        kernel.count("out_of_frames")
        return
    frame = pool.take_data()
    assert frame is not None
    kernel.push(call(map_frame, number, page, entry_for(frame, _page_flags(kernel))))


@step
def map_frame(kernel: Kernel, number: int, page: int, entry: int) -> None:
    """Writes `entry` for a page that is not mapped."""
    arena = kernel.arena(number)
    changes: list[Change] = []
    table = None if arena.entry(page) & P else _table_for(kernel, arena, page, changes)
    if table is None:
        kernel.memory.pool.release(frame_of(entry))
        return
    kernel.push(write_entries([(table, page & 511, entry), *changes]))


@step
def unmap_pages(kernel: Kernel, number: int, *pages: int) -> None:
    """Unmaps pages and frees their frames."""
    arena = kernel.arena(number)
    changes: list[Change] = []
    frames = []
    for page in pages:
        table = arena.table_of(page)
        if table is not None and page & 511 in table.entries:
            changes.append((table, page & 511, 0))
            frames.append(frame_of(table.entries[page & 511]))
    if changes:
        kernel.push(write_entries(changes), *invalidate(kernel, arena, list(pages)), call(release, *frames))


@step
def change_pages(kernel: Kernel, number: int, clear: int, set_: int, *pages: int) -> None:
    """Changes bits of the pages' entries, and invalidates if that narrows what they allow."""
    arena = kernel.arena(number)
    changes: list[Change] = []
    for page in pages:
        table = arena.table_of(page)
        if table is not None and page & 511 in table.entries:
            entry = table.entries[page & 511]
            granted = set_ & ~W if entry & COW else set_
            changes.append((table, page & 511, entry & ~clear | granted))
    if not changes:
        return
    narrows = clear & (P | W | x86.PT_USER_MASK | D) or set_ & NX
    kernel.push(write_entries(changes), *(invalidate(kernel, arena, list(pages)) if narrows else []))


@step
def break_cow(kernel: Kernel, number: int, page: int) -> None:
    """A write to a page that fork shared: take it over if nobody else has it, else copy it."""
    arena = kernel.arena(number)
    table = arena.table_of(page)
    entry = arena.entry(page)
    if table is None or not entry & COW:
        return
    old = frame_of(entry)
    if kernel.memory.pool.refs.get(old, 1) == 1:
        kernel.push(write_entries([(table, page & 511, entry & ~COW | W | D)]), Invlpg(arena.gva(page)))
        return
    kernel.count("cow_breaks")
    word = direct(old << x86.PAGE_SHIFT) + 8 * kernel.prng.below(512)
    kernel.push(UsedLoad(word), call(copy_page, number, page))


@step
def copy_page(kernel: Kernel, number: int, page: int) -> None:
    """The same with a word of the old page loaded, which stands for its contents."""
    arena = kernel.arena(number)
    table = arena.table_of(page)
    frame = kernel.memory.pool.take_data()
    if table is None or frame is None:
        return
    entry = arena.entry(page)
    kernel.push(
        stores([(direct(frame << x86.PAGE_SHIFT), kernel.value & ~1)]),
        write_entries([(table, page & 511, entry_for(frame, _page_flags(kernel)))]),
        *invalidate(kernel, arena, [page]),
        call(release, frame_of(entry)),
    )


@step
def repair(kernel: Kernel, number: int, page: int) -> None:
    """What was written for a page is not there any more: writes its entries of all levels again."""
    kernel.count("repairs")
    arena = kernel.arena(number)
    index = page >> 9
    words = [store_slot(kernel, arena, False, True)]
    if arena.aliased:
        words.append(store_slot(kernel, arena, True, True))
    words.append((arena.directory.address(index), arena.directory.entries.get(index, 0)))
    table = arena.table_of(page)
    if table is not None:
        words.append((table.address(page & 511), table.entries.get(page & 511, 0)))
    kernel.push(stores(words), Invlpg(arena.gva(page)))


# --- tables -------------------------------------------------------------------------------------------------------


@step
def discard_table(kernel: Kernel, frame: int, *entries: int) -> None:
    """A table is linked nowhere and in no TLB: clears and frees it and its pages.

    `entries`: index, entry, index, entry, and so on.
    """
    table = Table(frame)
    pool = kernel.memory.pool
    for entry in entries[1::2]:
        pool.release(frame_of(entry))
    pool.free.append(frame)
    kernel.push(stores([(table.address(index), 0) for index in entries[::2]]))


def discard(table: Table) -> Item:
    """The step for that."""
    return call(discard_table, table.frame, *(number for pair in table.entries.items() for number in pair))


def _links(arena: Arena, index: int) -> list[int]:
    """Level 2 entries that name the table at `index`."""
    return [index, *(alias for alias, target in arena.aliases.items() if target == index)]


@step
def unmap_table(kernel: Kernel, number: int, index: int) -> None:
    """Clears the level 2 entries that name a table, and frees it with all its pages."""
    arena = kernel.arena(number)
    table = arena.tables.get(index)
    if table is None:
        return
    links = _links(arena, index)
    del arena.tables[index]
    for alias in links[1:]:
        del arena.aliases[alias]
    kernel.push(
        write_entries([(arena.directory, link, 0) for link in links]),
        *invalidate(kernel, arena, []),
        discard(table),
    )


@step
def swap_table(kernel: Kernel, number: int, index: int) -> None:
    """Another table takes a table's place, with some of its pages in other frames (BUGS.md B5)."""
    arena = kernel.arena(number)
    pool = kernel.memory.pool
    old = arena.tables.get(index)
    if old is None or len(pool.free) < len(old.entries) + 2:
        return
    frame = pool.take()
    assert frame is not None
    new = arena.tables[index] = Table(frame)
    changes: list[Change] = []
    for low, entry in old.entries.items():
        pool.share(frame_of(entry))  # as `discard` releases all of the old table's
        if kernel.prng.chance(2) and frame_of(entry) in pool.refs:
            pool.release(frame_of(entry))
            data = pool.take_data()
            assert data is not None
            changes.append((new, low, entry_for(data, _page_flags(kernel))))
        else:
            changes.append((new, low, entry))
    links: list[Change] = [(arena.directory, link, entry_for(frame, TABLE)) for link in _links(arena, index)]
    kernel.push(write_entries(changes), write_entries(links), *invalidate(kernel, arena, []), discard(old))


@step
def swap_directory(kernel: Kernel, number: int) -> None:
    """A copy takes the place of an arena's level 2 table."""
    arena = kernel.arena(number)
    frame = kernel.memory.pool.take()
    if frame is None:
        return
    old = arena.directory
    new = arena.directory = Table(frame)
    words = [store_slot(kernel, arena, False, True)]
    if arena.aliased:
        words.append(store_slot(kernel, arena, True, True))
    kernel.push(
        write_entries([(new, index, entry) for index, entry in old.entries.items()]),
        stores(words),
        *invalidate(kernel, arena, []),
        call(discard_table, old.frame, *(number for index in old.entries for number in (index, 0))),
    )


@step
def alias_table(kernel: Kernel, number: int, index: int, alias: int, flags: int) -> None:
    """Level 2 entry `alias` names the table at `index`, too (BUGS.md A1)."""
    arena = kernel.arena(number)
    table = arena.tables.get(index)
    if table is not None and alias not in arena.aliases:
        arena.aliases[alias] = index
        kernel.push(write_entries([(arena.directory, alias, entry_for(table.frame, flags))]))


@step
def unalias_table(kernel: Kernel, number: int, alias: int) -> None:
    """Takes a second name away."""
    arena = kernel.arena(number)
    if alias in arena.aliases:
        items = invalidate(kernel, arena, [alias << 9])
        del arena.aliases[alias]
        kernel.push(write_entries([(arena.directory, alias, 0)]), *items)


@step
def alias_directory(kernel: Kernel, number: int, on: int) -> None:
    """The second level 3 entry names the directory, or nothing (BUGS.md A2)."""
    arena = kernel.arena(number)
    if arena.aliased == bool(on):
        return
    items = [] if on else invalidate(kernel, arena, [])
    arena.aliased = bool(on)
    kernel.push(stores([store_slot(kernel, arena, True, bool(on))]), *items)


# --- accessed and dirty bits ----------------------------------------------------------------------------------------


@step
def scan(kernel: Kernel, number: int, clear: int, *pages: int) -> None:
    """Reads the pages' entries and clears A, or A and D, in those that have it."""
    arena = kernel.arena(number)
    for page in reversed(pages):
        table = arena.table_of(page)
        if table is not None and page & 511 in table.entries:
            kernel.push(UsedLoad(table.address(page & 511)), call(clear_bits, number, clear, page))


@step
def clear_bits(kernel: Kernel, number: int, clear: int, page: int) -> None:
    """The same for one page with its entry loaded."""
    arena = kernel.arena(number)
    table = arena.table_of(page)
    entry = kernel.value
    if table is None or not entry & P or not entry & clear:
        return
    kernel.push(
        LockedAccess(table.address(page & 511), LockedOp.CMPXCHG, entry & ~clear, expected=entry),
        *(invalidate(kernel, arena, [page]) if clear & D else []),
    )
