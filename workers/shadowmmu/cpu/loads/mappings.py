"""Loads that map, protect, and unmap: page-fault, protection-fault, mmap, remap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.guest.memory import W
from shadowmmu.cpu.guest.steps import USER_READ, USER_WRITE, Item
from shadowmmu.cpu.loads.layout import MAPPING
from shadowmmu.cpu.loads.memory import mapped_page
from shadowmmu.cpu.loads.paging import (
    clear_pages,
    flush,
    free_frames,
    free_tables,
    give_back,
    set_entries,
    syscall,
)
from shadowmmu.cpu.loads.steps import call, load_step
from shadowmmu.cpu.program import Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = [
    "mmap_iteration",
    "page_fault_iteration",
    "protection_fault_iteration",
    "remap_iteration",
]

MMAP_STRIDE: Final = 4
"""Pages from one access of lat_mmap to the next: 16 KiB."""
_MAPPING_END: Final = MAPPING + (1 << 39) - 1


@load_step
def make_mapping(program: LoadProgram) -> None:
    """mmap: nothing is in the tables yet."""
    program.work["mmap"] += 1


@load_step
def drop_mapping(program: LoadProgram) -> None:
    """All of the mapping is unmapped."""
    program.work["munmap"] += 1
    space = program.here
    pages = [mapped_page(program.config, number) for number in range(program.config.file_pages)]
    pages = [gva for gva in pages if space.entry(gva)]
    clears, data = clear_pages(program, space, pages)
    links, tables = free_tables(program, space, MAPPING, _MAPPING_END)
    program.push(*clears, *links, *flush(program, pages), call(give_back, *data), call(free_frames, *tables))


def page_fault_iteration(program: LoadProgram) -> list[Item]:
    """The file is mapped, each page is read once, in an order drawn anew, and it is unmapped."""
    pages = [mapped_page(program.config, number) for number in range(program.config.size)]
    below = program.prng.below
    for last in range(len(pages) - 1, 0, -1):
        other = below(last + 1)
        pages[last], pages[other] = pages[other], pages[last]
    reads = Touches([(USER_READ, gva, 8, 0) for gva in pages])
    return [*syscall(call(make_mapping)), reads, *syscall(call(drop_mapping))]


def mmap_iteration(program: LoadProgram) -> list[Item]:
    """The file is mapped, written to here and there, and unmapped."""
    numbers = range(0, program.config.file_pages, MMAP_STRIDE)
    writes = Touches([(USER_WRITE, mapped_page(program.config, number), 8, 0) for number in numbers])
    return [*syscall(call(make_mapping)), writes, *syscall(call(drop_mapping))]


def protection_fault_iteration(program: LoadProgram) -> list[Item]:
    """A store to one of the read-only pages."""
    page = mapped_page(program.config, program.begun % program.config.size)
    return [Touches([(USER_WRITE, page, 8, 0)])]


# --- remap --------------------------------------------------------------------------------------------------------


def _pages_of_table(program: LoadProgram, table: int) -> list[int]:
    """The pages of the mapping's table whose turn it is, as addresses."""
    config = program.config
    numbers = range(table, config.size, config.tables)
    count = min(config.edits, len(numbers))
    first = program.begun * count
    return [mapped_page(config, numbers[(first + n) % len(numbers)]) for n in range(count)]


def remap_iteration(program: LoadProgram) -> list[Item]:
    """Some entries of every table go, or become read-only; then their pages are used.

    A share of the tables is edited last, with INVLPG: a shadow MMU that lets tables go out of sync has these out of
    sync when the faults come. The others are edited before a CR3 write, which makes it look at them again.
    """
    config = program.config
    late = round(config.table_share * config.tables)
    edits: list[list[Item]] = []
    uses: list[Item] = []
    for table in range(config.tables):
        pages = _pages_of_table(program, table)
        turn = program.begun * config.tables + table
        protects = int((turn + 1) * config.protect_share) > int(turn * config.protect_share)
        step = call(protect_some if protects else unmap_some, int(table < late), *pages)
        edits.append([step] if table >= late else syscall(step))
        uses.append(Touches([(USER_WRITE, gva, 8, 0) for gva in pages]))
    early = [item for items in edits[late:] for item in items]
    after = [item for items in edits[:late] for item in items]
    return [*syscall(*early, call(flush_all)), *after, *uses]


@load_step
def flush_all(program: LoadProgram) -> None:
    """Everything of the running process is flushed."""
    program.push(*flush(program))


@load_step
def unmap_some(program: LoadProgram, at_once: int, *pages: int) -> None:
    """madvise(MADV_DONTNEED) of a few pages of a file. `at_once`: flushed here, one by one."""
    program.work["munmap"] += 1
    clears, data = clear_pages(program, program.here, list(pages))
    flushes = flush(program, list(pages)) if at_once else []
    program.push(
        *clears, *flushes, call(give_back, *data)
    )  # the page cache keeps them, so it may be before a flush


@load_step
def protect_some(program: LoadProgram, at_once: int, *pages: int) -> None:
    """A few pages become read-only: the next write to each of them faults. `at_once`: as above."""
    program.work["mprotect"] += 1
    space = program.here
    entries = [(gva, space.entry(gva) & ~W) for gva in pages]
    program.push(*set_entries(program, space, entries), *(flush(program, list(pages)) if at_once else []))
