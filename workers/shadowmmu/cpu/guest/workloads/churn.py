"""mmap churn: tables come and go, take each other's place, have two names, and are edited through windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.boot import CR4
from shadowmmu.cpu.guest.memory import DATA_PAGE, FIRST_ALIAS, FIRST_BURST, TABLE, A, Arena, D, P, W
from shadowmmu.cpu.guest.paging import (
    alias_directory,
    alias_table,
    entry_for,
    release,
    scan,
    swap_directory,
    swap_table,
    unalias_table,
    unmap_pages,
    unmap_table,
    write_entries,
)
from shadowmmu.cpu.guest.steps import READ, WRITE, Item, call, step, stores
from shadowmmu.cpu.guest.touching import choose_hot, compute, touch_pages
from shadowmmu.cpu.guest.workloads.anon import some_mapped, some_unmapped
from shadowmmu.cpu.program import Invlpg, Touches, WriteRegister
from shadowmmu.protocol.messages import ControlRegister

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = [
    "burst",
    "clear_accessed",
    "remap",
    "replace_directory",
    "replace_table",
    "scan_pages",
    "second_directory",
    "second_name",
    "window_on_data",
    "window_on_table",
    "zap_table",
]


def _table_index(kernel: Kernel, arena: Arena) -> int | None:
    """An ordinary table, but the first of a shared arena, whose pages everybody uses."""
    first = 1 if kernel.layout.is_shared(arena.space) else 0
    indices = [index for index in arena.tables if first <= index < FIRST_ALIAS]
    return kernel.prng.choice(indices) if indices else None


def remap(kernel: Kernel) -> list[Item]:
    """Unmaps a range and maps another."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    items: list[Item] = []
    old = some_mapped(kernel, arena, 1 + kernel.prng.below(6))
    if old:
        items.append(call(unmap_pages, number, *old))
    new = some_unmapped(kernel, arena, 1 + kernel.prng.below(6))
    if new:
        items.append(touch_pages(kernel, arena, new))
    return items


def zap_table(kernel: Kernel) -> list[Item]:
    """Unmaps a whole table; its frames become something else at the next demand."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    index = _table_index(kernel, arena)
    if index is None:
        return []
    pages = [index << 9 | n for n in range(2)]
    other = some_unmapped(kernel, arena, 2)
    return [
        call(unmap_table, number, index),
        touch_pages(kernel, arena, other) if other else Touches([]),
        touch_pages(kernel, arena, pages),
    ]


def replace_table(kernel: Kernel) -> list[Item]:
    """Another table is put in a table's place."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    indices = [index for index in arena.tables if index < FIRST_ALIAS]
    if not indices:
        return []
    index = kernel.prng.choice(indices)
    pages = [page for page in arena.mapped() if page >> 9 == index]
    return [call(swap_table, number, index), touch_pages(kernel, arena, kernel.prng.sample(pages, 6))]


def replace_directory(kernel: Kernel) -> list[Item]:
    """The same one level higher."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = kernel.prng.sample(list(arena.mapped()), 3)
    return [call(swap_directory, number), touch_pages(kernel, arena, pages, write=False)]


def second_name(kernel: Kernel) -> list[Item]:
    """A table gets a second name, perhaps with fewer rights; both are used; old second names go."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    indices = [index for index in arena.tables if index < FIRST_ALIAS]
    if not indices:
        return []
    index = kernel.prng.choice(indices)
    alias = FIRST_ALIAS + kernel.prng.below(8)
    if alias in arena.aliases:
        return [call(unalias_table, number, alias)]
    pages = [page for page in arena.mapped() if page >> 9 == index]
    by_alias = [alias << 9 | page & 511 for page in kernel.prng.sample(pages, 4)]
    writable = not kernel.prng.chance(4)
    return [
        call(alias_table, number, index, alias, TABLE if writable else TABLE & ~W),
        touch_pages(kernel, arena, by_alias, write=False),
        touch_pages(kernel, arena, by_alias[:2], write=writable),
        touch_pages(kernel, arena, kernel.prng.sample(pages, 2)),
    ]


def second_directory(kernel: Kernel) -> list[Item]:
    """The arena appears at, or goes from, its second place."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    if arena.aliased:
        return [call(alias_directory, number, 0)]
    pages = kernel.prng.sample(list(arena.mapped()), 4)
    return [
        call(alias_directory, number, 1),
        touch_pages(kernel, arena, pages, write=False, alias=True),
        touch_pages(kernel, arena, pages[:1], alias=True),
    ]


@step
def write_burst(kernel: Kernel, number: int, count: int) -> None:
    """Writes unused level 2 entries, as a kernel that fills in swap entries, and clears them."""
    directory = kernel.arena(number).directory
    first = FIRST_BURST + kernel.prng.below(64)
    addresses = [directory.address(first + n) for n in range(count)]
    kernel.push(
        stores([(address, (kernel.prng.bits() << 9) & ~(P | W)) for address in addresses]),
        stores([(address, 0) for address in addresses]),
    )


def burst(kernel: Kernel) -> list[Item]:
    """Many stores in a row to one upper table: the flood detector takes it for no table any more."""
    number = kernel.arena_here()
    return [call(write_burst, number, 3 + kernel.prng.below(4))]


def clear_accessed(kernel: Kernel) -> list[Item]:
    """Clears A in a level 2 entry, as a kernel does that looks for idle tables."""
    arena = kernel.arena(kernel.arena_here())
    index = _table_index(kernel, arena)
    if index is None:
        return []
    entry = arena.directory.entries[index]
    pages = [page for page in arena.mapped() if page >> 9 == index]
    return [
        write_entries([(arena.directory, index, entry & ~A)]),
        touch_pages(kernel, arena, pages[:2], write=False),
    ]


def scan_pages(kernel: Kernel) -> list[Item]:
    """Looks which pages were used, or written, and forgets it."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 3, stay=True)
    return [
        call(scan, number, A if kernel.prng.chance(2) else A | D, *pages),
        touch_pages(kernel, arena, pages, write=kernel.prng.chance(2)),
    ]


# --- windows -------------------------------------------------------------------------------------------------------


def _flush_window(kernel: Kernel, gva: int) -> list[Item]:
    """Windows are global pages: INVLPG, or CR4.PGE off and on."""
    if kernel.prng.chance(2):
        return [Invlpg(gva)]
    toggled = CR4 & ~x86.X86_CR4_PGE
    return [WriteRegister(ControlRegister.CR4, toggled), WriteRegister(ControlRegister.CR4, CR4)]


def window_on_data(kernel: Kernel) -> list[Item]:
    """Two frames, one after the other, at the same global page."""
    pool = kernel.memory.pool
    if len(pool.free) < 4:
        return []
    first, second = pool.take_data(), pool.take_data()
    assert first is not None
    assert second is not None
    page = kernel.prng.below(64)
    gva = kernel.layout.window(kernel.vcpu, page)
    address = kernel.memory.window.address(page)
    flags = DATA_PAGE & ~x86.PT_USER_MASK | x86.PT_GLOBAL_MASK
    return [
        stores([(address, entry_for(first, flags))]),
        Touches([(WRITE, gva + 8 * n, 8, 2 * n) for n in range(4)]),
        stores([(address, entry_for(second, flags))]),
        *_flush_window(kernel, gva),
        Touches([(WRITE, gva + 8 * n, 8, 4 * n) for n in range(4)]),
        stores([(address, 0)]),
        *_flush_window(kernel, gva),
        call(release, first, second),
    ]


def window_on_table(kernel: Kernel) -> list[Item]:
    """Edits a table through a window: one level 1 table maps another (BUGS.md B3)."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pool = kernel.memory.pool
    pages = some_unmapped(kernel, arena, 3)
    table = arena.table_of(pages[0]) if pages else None
    if table is None or len(pool.free) < 8:
        return []
    window = kernel.prng.below(64)
    gva = kernel.layout.window(kernel.vcpu, window)
    address = kernel.memory.window.address(window)
    edits = []
    for page in pages:
        frame = pool.take_data()
        assert frame is not None
        table.entries[page & 511] = entry = entry_for(frame, DATA_PAGE)
        edits.append((WRITE, gva + 8 * (page & 511), 8, entry))
    flags = DATA_PAGE & ~x86.PT_USER_MASK | x86.PT_GLOBAL_MASK
    return [
        stores([(address, entry_for(table.frame, flags))]),
        Touches([(READ, gva + 8 * (pages[0] & 511), 8, 0), *edits]),
        touch_pages(kernel, arena, pages),
        call(choose_hot),
        call(compute, 128),
        stores([(address, 0)]),
        *_flush_window(kernel, gva),
        call(unmap_pages, number, *pages),
    ]
