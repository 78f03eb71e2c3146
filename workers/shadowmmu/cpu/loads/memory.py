"""What a vCPU's kernel knows of its memory while it runs a load: its frames, its processes' address spaces, its files.

Plain records, all of them part of the program's state, after the pattern of `guest.memory`; the boot image is written
from the same records.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import KERNEL_ROOT_INDEX
from shadowmmu.cpu.guest.memory import DATA_PAGE, TABLE, A, FramePool, P, Table, U, W
from shadowmmu.cpu.loads.config import Load, LoadConfig
from shadowmmu.cpu.loads.layout import MAPPING, TEXT_REGIONS, LoadLayout, own_pages

__all__ = [
    "READ_ONLY",
    "LoadMemory",
    "Space",
    "entry_for",
    "initial_memory",
    "mapped_page",
    "table_key",
    "text_page",
]

READ_ONLY: Final = P | U | A
"""A page of a file that is mapped without write access."""


def entry_for(frame: int, flags: int) -> int:
    """The entry that names `frame`."""
    return frame << x86.PAGE_SHIFT | flags


def table_key(gva: int, level: int) -> int:
    """Names the table at `level` (1 to 3) that leads to `gva`, within an address space."""
    return gva >> (x86.PAGE_SHIFT + x86.PT64_LEVEL_BITS * level) << 2 | level


class Space(msgspec.Struct):
    """A process's address space.

    `root`: what its kernel runs on; `user_root`: what it runs on itself under page-table isolation. `tables`: those
    below, by `table_key`, parents first. `stack`: the frame of its kernel stack.
    """

    root: Table
    user_root: Table | None
    stack: int
    tables: dict[int, Table] = {}

    def entry(self, gva: int) -> int:
        """The level 1 entry for `gva`; 0 if there is none."""
        table = self.tables.get(table_key(gva, 1))
        return 0 if table is None else table.entries.get(x86.pt64_index(gva, 1), 0)

    def mapped(self) -> Iterator[tuple[int, int]]:
        """(gva, entry) of every page that is mapped."""
        for key, table in self.tables.items():
            if key & 3 == 1:
                base = key >> 2 << (x86.PAGE_SHIFT + x86.PT64_LEVEL_BITS)
                for index, entry in table.entries.items():
                    yield base + (index << x86.PAGE_SHIFT), entry

    def roots(self) -> list[Table]:
        """One, or two under page-table isolation."""
        return [self.root] if self.user_root is None else [self.root, self.user_root]


class LoadMemory(msgspec.Struct):
    """All of it. `text`, `file`: frames of files that stay in the page cache: programs, and what loads map."""

    pool: FramePool
    spaces: list[Space]
    text: list[int]
    file: list[int]


def text_page(count: int, number: int) -> int:
    """The address of page `number` of `count` pages of text: the first half is the program's, the rest libraries'."""
    half = (count + 1) // 2
    region, index = (0, number) if number < half else (1, number - half)
    return TEXT_REGIONS[region] + (index << x86.PAGE_SHIFT)


def mapped_page(load: LoadConfig, number: int) -> int:
    """The address of page `number` of the load's mapping."""
    if load.load is Load.REMAP:
        return (
            MAPPING
            + (number % load.tables << x86.PAGE_SHIFT + x86.PT64_LEVEL_BITS)
            + (number // load.tables << 12)
        )
    return MAPPING + (number << x86.PAGE_SHIFT)


def _take(pool: FramePool) -> int:
    frame = pool.take()
    if frame is None:
        raise RuntimeError("no frame is free: a load's partition is too small for it")
    return frame


def _map(memory: LoadMemory, space: Space, gva: int, entry: int) -> None:
    """Writes an entry into the records, with the tables that it needs."""
    parents = space.roots()
    for level in (3, 2, 1):
        key = table_key(gva, level)
        table = space.tables.get(key)
        if table is None:
            table = space.tables[key] = Table(_take(memory.pool))
            for parent in parents:
                parent.entries[x86.pt64_index(gva, level + 1)] = entry_for(table.frame, TABLE)
        parents = [table]
    parents[0].entries[x86.pt64_index(gva, 1)] = entry


def new_space(memory: LoadMemory, kernel_l3: int, kpti: bool) -> Space:
    """An address space with a kernel half and nothing else."""

    def root() -> Table:
        return Table(_take(memory.pool), {KERNEL_ROOT_INDEX: entry_for(kernel_l3, P | W | A)})

    return Space(root(), root() if kpti else None, _take(memory.pool))


def initial_memory(layout: LoadLayout, load: LoadConfig, vcpu: int) -> LoadMemory:
    """What `vcpu` owns when a run begins: its processes have all their memory, mappings that the load makes are not."""
    pool = FramePool(list(reversed(layout.partition(vcpu))))
    memory = LoadMemory(pool, [], [], [])

    def data() -> int:
        frame = _take(pool)
        pool.refs[frame] = 1
        return frame

    memory.text = [data() for _ in range(load.text_pages)]
    own, processes = 8, 1
    match load.load:
        case Load.FORK:
            own = load.size
        case Load.CONTEXT_SWITCH:
            own, processes = load.size, load.processes
        case Load.GETPID:
            pass
        case _:
            memory.file = [data() for _ in range(load.file_pages)]
    for _ in range(processes):
        space = new_space(memory, layout.kernel_l3, load.kpti)
        memory.spaces.append(space)
        for number, frame in enumerate(memory.text):
            _map(memory, space, text_page(load.text_pages, number), entry_for(frame, READ_ONLY))
            pool.share(frame)
        for number in range(own):
            _map(memory, space, own_pages(own, number), entry_for(data(), DATA_PAGE))
        if load.load in (Load.TOUCH, Load.REMAP, Load.PROTECTION_FAULT):
            flags = READ_ONLY if load.load is Load.PROTECTION_FAULT else DATA_PAGE
            for number, frame in enumerate(memory.file):
                _map(memory, space, mapped_page(load, number), entry_for(frame, flags))
                pool.share(frame)
    return memory
