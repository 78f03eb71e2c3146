"""What a vCPU's kernel knows of its own memory: which frames are free, and what it wrote into its paging structures.

Plain records, all of them part of the program's state. The truth is in guest memory, which the processor reads; a
program that is sloppy about invalidation may find there something else than it wrote, and then writes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import ALIAS_SLOT, Layout, direct

__all__ = [
    "COW",
    "DATA_PAGE",
    "FIRST_ALIAS",
    "FIRST_BURST",
    "FIRST_HUGE",
    "FIRST_TABLE_IN_VIEW",
    "TABLE",
    "Arena",
    "FramePool",
    "Memory",
    "Table",
    "initial_memory",
]

P: Final = x86.PT_PRESENT_MASK
W: Final = x86.PT_WRITABLE_MASK
U: Final = x86.PT_USER_MASK
A: Final = x86.PT_ACCESSED_MASK
D: Final = x86.PT_DIRTY_MASK
NX: Final = x86.PT64_NX_MASK

COW: Final = 1 << 9
"""A bit of an entry that hardware ignores: the page is shared by fork, copy it on write."""
TABLE: Final = P | W | U | A
"""An entry that names a table."""
DATA_PAGE: Final = P | W | U | A | D

FIRST_ALIAS: Final = 16
"""Level 2 entries of an arena: ordinary tables from 0, from here on second names for them,"""
FIRST_HUGE: Final = 32
"""2 MiB pages,"""
FIRST_TABLE_IN_VIEW: Final = 48
"""tables in frames that are (or just were) mapped as data,"""
FIRST_BURST: Final = 64
"""and entries that are written for the sake of writing."""
LAST_ENTRY: Final = 511


class Table(msgspec.Struct):
    """A paging structure in `frame`; `entries`: what was written, by index; absent means 0 (not present)."""

    frame: int
    entries: dict[int, int] = {}

    def address(self, index: int) -> int:
        """The direct map's address of an entry."""
        return direct((self.frame << x86.PAGE_SHIFT) + 8 * index)


class Arena(msgspec.Struct):
    """One vCPU's part of an address space.

    `slot`: its level 3 entry. `directory`: its level 2 table; `tables`: its level 1 tables by level 2 index;
    `aliases`: further level 2 entries that name one of these (index to index); `huge`: level 2 entries that name a
    2 MiB block (index to first frame), now or, while they are split, again later; `aliased`: the second level 3
    entry names the directory, too. Pages are numbered from the arena's start.
    """

    space: int
    slot: int
    directory: Table
    tables: dict[int, Table] = {}
    aliases: dict[int, int] = {}
    huge: dict[int, int] = {}
    aliased: bool = False

    def gva(self, page: int, alias: bool = False) -> int:
        """The address of a page."""
        return ((self.slot + (ALIAS_SLOT if alias else 0)) << 30) | (page << x86.PAGE_SHIFT)

    def table_of(self, page: int) -> Table | None:
        """The level 1 table that maps `page`, by whatever name."""
        index = page >> 9
        return self.tables.get(self.aliases.get(index, index))

    def entry(self, page: int) -> int:
        """What was written for `page`; 0 without a table."""
        table = self.table_of(page)
        return 0 if table is None else table.entries.get(page & 511, 0)

    def mapped(self) -> Iterator[int]:
        """The pages that ordinary tables map."""
        for index, table in self.tables.items():
            if index < FIRST_ALIAS:
                for low, entry in table.entries.items():
                    if entry & P:
                        yield index << 9 | low

    def has_second_names(self, page: int) -> bool:
        """Whether `page` is reachable by another address, too."""
        return self.aliased or (page >> 9) in self.aliases.values() or (page >> 9) in self.aliases


class FramePool(msgspec.Struct):
    """A vCPU's frames. `free`: last in, first out; `refs`: of frames in use as data, how many entries name them."""

    free: list[int]
    refs: dict[int, int] = {}

    def take(self) -> int | None:
        """A frame for a table, or None."""
        return self.free.pop() if self.free else None

    def take_data(self) -> int | None:
        """A frame for data, with one reference."""
        frame = self.take()
        if frame is not None:
            self.refs[frame] = 1
        return frame

    def share(self, frame: int) -> None:
        """One more entry names the frame. Frames that are not the pool's are not counted."""
        if frame in self.refs:
            self.refs[frame] += 1

    def release(self, frame: int) -> None:
        """An entry less; the last one frees the frame."""
        left = self.refs.get(frame, 0) - 1
        if left > 0:
            self.refs[frame] = left
        elif left == 0:
            del self.refs[frame]
            self.free.append(frame)


class Memory(msgspec.Struct):
    """All that a vCPU's kernel knows of its memory. `window`: the level 1 table of its window."""

    pool: FramePool
    arenas: list[Arena]
    window: Table


def initial_memory(layout: Layout, vcpu: int) -> Memory:
    """What `vcpu` owns when a run begins; the boot image is written from the same records."""
    frames = list(layout.partition(vcpu))
    memory = Memory(FramePool([]), [], Table(layout.window_l1[vcpu]))
    pool = memory.pool
    memory.window.entries[511] = layout.device_frame(vcpu) << x86.PAGE_SHIFT | P | W | A | D
    low = iter(frames)  # tables from the bottom of the partition, pages that stay from its top
    for space in layout.own_spaces(vcpu):
        arena = Arena(space, vcpu, Table(next(low)))
        memory.arenas.append(arena)
        for index in range(layout.tables_per_arena):
            table = arena.tables[index] = Table(next(low))
            arena.directory.entries[index] = table.frame << x86.PAGE_SHIFT | TABLE
            for page in range(layout.hot_pages if index == 0 else 2):
                frame = frames.pop()
                pool.refs[frame] = 1
                table.entries[page] = frame << x86.PAGE_SHIFT | _first_flags(index, page)
    used = {arena.directory.frame for arena in memory.arenas}
    used |= {table.frame for arena in memory.arenas for table in arena.tables.values()}
    pool.free = [frame for frame in reversed(frames) if frame not in used]
    return memory


def _first_flags(table: int, page: int) -> int:
    """Mostly as a kernel leaves pages that are in use; some without D, some without A, some not executable."""
    flags = P | W | U
    if (table + page) % 4 != 3:
        flags |= A
    if page % 2 == 0:
        flags |= D
    if page % 4 == 1:
        flags |= NX
    return flags
