"""What a load's kernel does to the address spaces of its processes: enter and leave, map, unmap, flush, free.

As in `guest.paging`: the records change, and the stores that do the same in guest memory go on the stack, in the order
in which Linux makes them. Entries are stored one by one, through the direct map. Frames are given back only after what
named them was flushed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import direct
from shadowmmu.cpu.guest.memory import TABLE, Table
from shadowmmu.cpu.guest.paging import frame_of, write_entries
from shadowmmu.cpu.guest.steps import READ, WRITE, Item, stores
from shadowmmu.cpu.loads.memory import Space, entry_for, table_key
from shadowmmu.cpu.loads.steps import call, load_step
from shadowmmu.cpu.program import Invlpg, Touches, WriteRegister
from shadowmmu.protocol.messages import ControlRegister

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = [
    "FLUSH_CEILING",
    "clear_pages",
    "fill_page",
    "flush",
    "free_frames",
    "free_tables",
    "give_back",
    "kernel_stack",
    "leave_kernel",
    "enter_kernel",
    "set_entries",
    "syscall",
    "take_frame",
    "write_cr3",
]

FLUSH_CEILING: Final = 33
"""More pages than this are flushed by writing CR3 (Linux: tlb_single_page_flush_ceiling)."""
STORES_PER_PAGE: Final = 8
"""A page that is cleared or copied is stored to so often, in sequence: more would tell the shadow MMU nothing new."""


def take_frame(program: LoadProgram, data: bool = False) -> int:
    """A frame for a table, or for data."""
    pool = program.memory.pool
    frame = pool.take_data() if data else pool.take()
    if frame is None:
        raise RuntimeError("no frame is free: a load's partition is too small for it")
    return frame


def fill_page(frame: int, value: int) -> Touches:
    """The kernel stores `value` to the first words of a page, which stand for all of them."""
    base = direct(frame << x86.PAGE_SHIFT)
    return stores([(base + 8 * index, value) for index in range(STORES_PER_PAGE)])


def kernel_stack(program: LoadProgram) -> Touches:
    """The kernel uses the running process's kernel stack."""
    base = direct(program.here.stack << x86.PAGE_SHIFT)
    return Touches([(WRITE, base + 0xF00, 8, 0), (READ, base + 0xF00, 8, 0)])


# --- into the kernel and out of it --------------------------------------------------------------------------------


def write_cr3(program: LoadProgram, user: bool = False) -> WriteRegister:
    """Loads CR3 for the running process: its kernel's root, or its own."""
    return WriteRegister(ControlRegister.CR3, program.cr3(user))


@load_step
def enter_kernel(program: LoadProgram) -> None:
    """From user mode: under page-table isolation CR3 is written."""
    if program.config.kpti:
        program.work["kpti"] += 1
        program.push(write_cr3(program), kernel_stack(program))
    else:
        program.push(kernel_stack(program))


@load_step
def leave_kernel(program: LoadProgram) -> None:
    """To user mode."""
    if program.config.kpti:
        program.work["kpti"] += 1
        program.push(write_cr3(program, user=True))


@load_step
def _enter_by_call(program: LoadProgram) -> None:
    program.work["syscall"] += 1
    program.push(call(enter_kernel))


def syscall(*items: Item) -> list[Item]:
    """A system call that does `items`."""
    return [call(_enter_by_call), *items, call(leave_kernel)]


# --- pages --------------------------------------------------------------------------------------------------------


def set_entries(program: LoadProgram, space: Space, entries: list[tuple[int, int]]) -> list[Item]:
    """Writes level 1 entries, (gva, entry) each; makes the tables that they need: cleared, linked, then used."""
    items: list[Item] = []
    for gva, entry in entries:
        parents = space.roots()
        for level in (3, 2, 1):
            key = table_key(gva, level)
            table = space.tables.get(key)
            if table is None:
                table = space.tables[key] = Table(take_frame(program))
                program.work["table_alloc"] += 1
                program.work["page_clear"] += 1
                link = entry_for(table.frame, TABLE)
                index = x86.pt64_index(gva, level + 1)
                items += [
                    fill_page(table.frame, 0),
                    write_entries([(parent, index, link) for parent in parents]),
                ]
            parents = [table]
        store = write_entries([(parents[0], x86.pt64_index(gva, 1), entry)])
        last = items[-1] if items else None
        if isinstance(last, Touches):
            last.items += store.items
        else:
            items.append(store)
    return items


def clear_pages(program: LoadProgram, space: Space, pages: list[int]) -> tuple[list[Item], list[int]]:
    """Clears the entries of those of `pages` (gvas) that are mapped. The stores, and the frames that they named."""
    mapped = [gva for gva in pages if space.entry(gva)]
    frames = [frame_of(space.entry(gva)) for gva in mapped]
    program.work["pte_clear"] += len(mapped)
    items = set_entries(program, space, [(gva, 0) for gva in mapped])
    return items, frames


def flush(program: LoadProgram, pages: list[int] | None = None) -> list[Item]:
    """Flushes translations of the running process: of `pages` (gvas) one by one; if they are many, or None, all."""
    program.work["flush"] += 1
    if pages is None or len(pages) > FLUSH_CEILING:
        return [write_cr3(program)]
    return [Invlpg(gva) for gva in pages]


@load_step
def give_back(program: LoadProgram, *frames: int) -> None:
    """Entries that named these frames of data are gone."""
    for frame in frames:
        program.memory.pool.release(frame)


# --- tables -------------------------------------------------------------------------------------------------------


def free_tables(program: LoadProgram, space: Space, first: int, last: int) -> tuple[list[Item], list[int]]:
    """Takes away the tables that map nothing but addresses from `first` to `last`, all of whose pages are unmapped.

    The stores that clear the links, lowest tables first, and the tables' frames.
    """
    items: list[Item] = []
    frames = []
    for level in (1, 2, 3):
        shift = x86.PAGE_SHIFT + x86.PT64_LEVEL_BITS * level
        for key in [key for key in space.tables if key & 3 == level]:
            base = key >> 2 << shift
            table = space.tables[key]
            if table.entries or not first <= base <= last:
                continue
            del space.tables[key]
            program.work["table_free"] += 1
            frames.append(table.frame)
            parents = space.roots() if level == 3 else [space.tables[table_key(base, level + 1)]]
            items.append(write_entries([(parent, x86.pt64_index(base, level + 1), 0) for parent in parents]))
    return items, frames


@load_step
def free_frames(program: LoadProgram, *frames: int) -> None:
    """Frames of tables that no processor uses any more."""
    program.memory.pool.free.extend(frames)
