"""Editing paging structures: pages, tables of pages, large pages, roots; with or without invalidation.

Each function changes the records and returns the instructions that do the same to memory. Values that make a present
entry are stored only where the window or the own tables show an own table; a table's entry of higher level always names
an own or a neighbour's table, so that no store through it can hit a PAE root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import BLOCK_PAGES
from shadowmmu.cpu.guest.memory import NX, A, D, P, U, W
from shadowmmu.cpu.guest.modes.compute import Place, large_page, table_page, touch, user_page
from shadowmmu.cpu.guest.modes.layout import (
    ALIAS,
    FOREIGN,
    HUGE,
    LEAF_PAGES,
    MODE_BLOCK,
    OTHER_FORMAT,
    USER_DIRECTORY,
)
from shadowmmu.cpu.guest.modes.tables import LARGE, LINK, PAGE, Table, pdpt_base
from shadowmmu.cpu.guest.steps import READ, USER_READ, USER_WRITE, WRITE
from shadowmmu.cpu.program import Invlpg, LockedAccess, Op, Touch, Touches, WriteRegister
from shadowmmu.protocol.messages import ControlRegister, GuestMode, LockedOp

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = [
    "change_large",
    "change_link",
    "change_page",
    "change_pdpte",
    "change_root",
    "flood",
    "move_table",
    "protect_window",
    "reload_cr3",
    "scribble",
]

FIRST_FLOOD: Final = 64
"""Pages from here on are mapped only by floods."""
FLOOD: Final = 48
PSE36: Final = 1 << 13
RESERVED_BIT: Final = 1 << 51
RESERVED_BIT_LARGE: Final = 1 << 17
"""Reserved in an entry that maps a large page, of 4 and of 8 bytes."""


def reload_cr3(program: ModesProgram) -> Op:
    """The instruction that writes CR3's own value to it."""
    return WriteRegister(ControlRegister.CR3, program.registers.cr3)


def _put(program: ModesProgram, table: Table, index: int, value: int) -> list[Op]:
    """Stores an entry: whole, by halves, or by a locked exchange."""
    old = table.entries.get(index, 0)
    table.entries[index] = value
    gpa = table.gpa(index)
    how = program.prng.below(8)
    if how == 0:
        return [LockedAccess(gpa, LockedOp.XCHG, value, size=table.size)]
    if how == 1 and table.size == 8 and not old & P:
        high: Touch = (WRITE, gpa + 4, 4, value >> 32)
        return [Touches([high, (WRITE, gpa, 4, value & 0xFFFF_FFFF)])]
    return [Touches([(WRITE, gpa, table.size, value)])]


def _invalidate(program: ModesProgram, gva: int) -> list[Op]:
    """What follows an edit: what should, or more, or nothing."""
    how = program.prng.below(8)
    if how < 3:
        return [Invlpg(gva)]
    return [reload_cr3(program)] if how < 5 else []


def _small_table(program: ModesProgram) -> tuple[Table, int]:
    """One of the own tables of pages, mostly of the mode's format, and an index where it may be linked."""
    tables, prng = program.tables, program.prng
    group = tables.small(program.mode)
    if prng.chance(5):
        group = tables.small4 if group is tables.small8 else tables.small8
    number = prng.below(len(group))
    return group[number], (number - (program.space or 0)) % len(group)


def _leaf(program: ModesProgram, size: int) -> int:
    """A random entry that maps a page, or does not."""
    prng, layout = program.prng, program.layout
    kind = prng.below(24)
    if kind < 3:
        return prng.bits() & 0xFFFF_FFFE if kind else 0  # not present: empty, or a place in swap
    frame = prng.choice(program.tables.data)
    if kind == 3:
        frame = prng.choice(layout.frames(layout.neighbour(program.vcpu)).data)
    elif kind == 4:
        frame = prng.choice(layout.data_blocks) + prng.below(BLOCK_PAGES)
    elif kind == 5:
        frame = prng.choice(program.tables.small8 + program.tables.small4).frame
    bits = prng.bits()
    flags = PAGE
    for flag, one_in in ((W, 4), (U, 8), (A, 4), (D, 2)):
        flags &= ~flag if bits % one_in == 0 else -1
        bits //= one_in
    if size == 8:
        flags |= NX if prng.chance(5) else 0
        flags |= RESERVED_BIT if prng.chance(16) else 0
    return frame << x86.PAGE_SHIFT | flags


def change_page(program: ModesProgram) -> list[Op]:
    """Maps, unmaps, remaps or protects some pages, and uses them."""
    prng = program.prng
    ops: list[Op] = []
    for _ in range(1 + prng.below(4)):
        table, index = _small_table(program)
        page = prng.below(LEAF_PAGES)
        gva = user_page(program.mode, index, page)
        old = table.entries.get(page, 0)
        value = old & ~prng.choice((W, U, A, D, A | D, P)) if old & P and prng.chance(2) else None
        if value is None:
            value = _leaf(program, table.size)
        by_page = program.mode is not GuestMode.NONPAGING and program.space is not None and prng.chance(6)
        if by_page and table in program.tables.small(program.mode):
            table.entries[page] = value
            shown = table_page(program, index) + page * table.size
            ops.append(Touches([(WRITE, shown, table.size, value)]))
        else:
            ops += _put(program, table, page, value)
        ops += _invalidate(program, gva)
        if program.mode is not GuestMode.NONPAGING:
            ops.append(touch(program, [(gva, USER_READ, USER_WRITE)], 2))
    return ops


def flood(program: ModesProgram) -> list[Op]:
    """Writes many entries of a table in a row, or clears them, and uses some."""
    prng = program.prng
    table, index = _small_table(program)
    first = FIRST_FLOOD + prng.below(4) * FLOOD
    clear = first in table.entries
    items: list[Touch] = []
    for page in range(first, first + FLOOD):
        if clear:
            table.entries.pop(page, None)
            value = 0
        else:
            value = table.entries[page] = _leaf(program, table.size)
        items.append((WRITE, table.gpa(page), table.size, value))
    ops: list[Op] = [Touches(items)]
    if program.mode is not GuestMode.NONPAGING:
        places: list[Place] = [
            (user_page(program.mode, index, first + prng.below(FLOOD)), USER_READ, USER_WRITE)
            for _ in range(4)
        ]
        ops.append(touch(program, places, 32))
    return [*ops, reload_cr3(program)] if prng.chance(2) else ops


def scribble(program: ModesProgram) -> list[Op]:
    """Writes an entry that is not present by pieces of any size, aligned or not; in the end it is as it was."""
    prng = program.prng
    table, _ = _small_table(program)
    page = prng.below(LEAF_PAGES)
    gpa, size = table.gpa(page), table.size
    value = table.entries.get(page, 0)
    items: list[Touch] = [(WRITE, gpa, 1, 0)]
    for _ in range(1 + prng.below(3)):
        piece = prng.choice((1, 2, 4) if size == 8 else (1, 2))
        offset = 1 + prng.below(size - piece)
        items.append((WRITE, gpa + offset, piece, prng.bits()))
    if size == 8 and page + 1 < LEAF_PAGES and prng.chance(2):
        following = table.entries.get(page + 1, 0)
        both = value >> 32 | (following & 0xFFFF_FFFF) << 32
        items += [(WRITE, gpa + 4, 8, both), (WRITE, gpa, 4, value & 0xFFFF_FFFF)]
    else:
        items.append((WRITE, gpa, size, value))
    return [Touches(items)]


def _directory(program: ModesProgram) -> tuple[Table, int]:
    """A table that links tables of pages: of the mode mostly; and where its user part begins."""
    prng, tables = program.prng, program.tables
    space = prng.below(2)
    if (program.mode is GuestMode.PAGING32) != prng.chance(6):
        return tables.root32[space], USER_DIRECTORY
    return tables.l2[space], 0


def change_link(program: ModesProgram) -> list[Op]:
    """Unlinks, exchanges, or protects tables of pages; mostly all is as before in the end."""
    prng = program.prng
    table, first = _directory(program)
    index = (
        first + prng.below(program.layout.small_tables) + prng.choice((0, 0, ALIAS, FOREIGN, OTHER_FORMAT))
    )
    gva = user_page(program.mode, index - first, prng.below(LEAF_PAGES))
    old = table.entries.get(index, 0)
    other = first + prng.below(program.layout.small_tables)
    ops: list[Op] = []
    kind = prng.below(4)
    if kind == 0 and index < first + ALIAS:
        there = table.entries.get(other, 0)
        ops += _put(program, table, index, there)
        ops += _put(program, table, other, old)
    elif kind == 1:
        ops += _put(program, table, index, old & ~prng.choice((W, U, A)))
    elif kind == 2:
        ops += _put(program, table, index, 0)
    else:
        ops += _put(program, table, index, old)
    ops += _invalidate(program, gva)
    if program.mode is not GuestMode.NONPAGING:
        ops.append(touch(program, [(gva, USER_READ, USER_WRITE)], 12))
    if kind in (1, 2):
        ops += _put(program, table, index, old | A)
        ops += _invalidate(program, gva)
    return ops


def change_large(program: ModesProgram) -> list[Op]:
    """A large page: splits it, puts it back, protects it, gives it reserved bits, or (PSE36) a far frame."""
    prng = program.prng
    table, first = _directory(program)
    index = first + HUGE
    block = program.layout.data_blocks[0]
    frame = block if table.size == 8 else block // MODE_BLOCK * MODE_BLOCK
    small = prng.choice(program.tables.small8 if table.size == 8 else program.tables.small4)
    value = frame << x86.PAGE_SHIFT | PAGE | LARGE
    kind = prng.below(8)
    if kind < 2:
        value = small.frame << x86.PAGE_SHIFT | LINK
    elif kind == 2:
        value &= ~prng.choice((W, U, A | D))
    elif kind == 3:
        value |= RESERVED_BIT_LARGE
    elif kind == 4 and table.size == 4 and program.layout.device_frame(program.vcpu) is not None:
        value |= PSE36
    ops = _put(program, table, index, value)
    gva = large_page(program) if program.mode is not GuestMode.NONPAGING else 0
    ops += _invalidate(program, gva)
    if gva and kind != 4:
        ops.append(touch(program, [(gva, USER_READ, USER_WRITE)], 12))
    elif gva:
        ops.append(Touches([(USER_READ, gva, 8, 0)]))
    return ops


def change_root(program: ModesProgram) -> list[Op]:
    """Exchanges or clears entries of the upper levels of 64-bit paging for a while."""
    prng, tables = program.prng, program.tables
    table = prng.choice(tables.l3 + tables.root64)
    index, other = (1, 2) if table in tables.root64 else prng.choice(((1, 2), (2, 3), (1, 3)))
    here, there = table.entries.get(index, 0), table.entries.get(other, 0)
    gva = user_page(program.mode, prng.below(2), prng.below(LEAF_PAGES), slot=index - 1)
    if table in tables.root64 and program.mode is GuestMode.PAGING64:
        gva |= index << 39
    ops: list[Op] = []
    if prng.chance(2):
        ops += _put(program, table, index, 0)
    else:
        ops += _put(program, table, index, there)
        ops += _put(program, table, other, here)
    ops += _invalidate(program, gva)
    if program.mode is not GuestMode.NONPAGING:
        ops.append(touch(program, [(gva, USER_READ, USER_WRITE)], 12))
    if not table.entries[index]:
        ops += _put(program, table, index, here)
    return ops


def change_pdpte(program: ModesProgram) -> list[Op]:
    """Exchanges or clears PDPTEs of the own second PAE root, which nobody else loads.

    One that is present is stored only where the next instruction loads CR3, if PDPTEs of this root are loaded.
    """
    prng, table = program.prng, program.tables.pdpts[1]
    loaded = program.mode is GuestMode.PAE and program.space == 1
    index = pdpt_base(1) + 1 + prng.below(3)
    own, other = program.frames, program.layout.frames(program.layout.neighbour(program.vcpu))
    gva = user_page(GuestMode.PAE, prng.below(2), prng.below(LEAF_PAGES), slot=index - 1)
    used: list[Op] = [touch(program, [(gva, USER_READ, USER_WRITE)], 12)] if loaded else []
    ops: list[Op] = []
    if prng.chance(2):
        ops.append(Touches([(WRITE, table.gpa(index), 8, 0)]))
        if prng.chance(2):
            ops.append(reload_cr3(program))
        ops += used
    value = prng.choice((*own.l2, other.l2[0])) << x86.PAGE_SHIFT | P
    table.entries[index] = value
    ops.append(Touches([(WRITE, table.gpa(index), 8, value)]))
    if loaded:
        ops.append(reload_cr3(program))
    return ops + used


def move_table(program: ModesProgram) -> list[Op]:
    """A table of pages moves to a frame that was data, and its frame becomes data; stores of both may still come."""
    prng, tables = program.prng, program.tables
    table, index = _small_table(program)
    number = prng.below(len(tables.data))
    old, new = table.frame, tables.data[number]
    table.frame, tables.data[number] = new, old
    items: list[Touch] = [
        (WRITE, (new << x86.PAGE_SHIFT) + page * table.size, table.size, table.entries.get(page, 0))
        for page in range(LEAF_PAGES)
    ]
    table.entries = {page: value for page, value in table.entries.items() if page < LEAF_PAGES}
    ops: list[Op] = [Touches(items)]
    for directory in tables.l2 + tables.root32:
        for at, value in directory.entries.items():
            if value & P and not value & LARGE and value >> x86.PAGE_SHIFT == old:
                ops += _put(program, directory, at, new << x86.PAGE_SHIFT | value & x86.PAGE_OFFSET_MASK)
    ops += _invalidate(program, user_page(program.mode, index, 0))
    ops.append(Touches([(WRITE, (old << x86.PAGE_SHIFT) + 8 * word, 8, 0) for word in range(8)]))
    return ops


def protect_window(program: ModesProgram) -> list[Op]:
    """The kernel takes the right to write to one of its data pages away, writes to it, and gives it back."""
    own = program.frames
    frame = program.prng.choice(program.tables.data)
    large = program.mode is GuestMode.PAGING32
    first = own.root64[0] // (MODE_BLOCK if large else BLOCK_PAGES) * (MODE_BLOCK if large else BLOCK_PAGES)
    size, count = (4, MODE_BLOCK) if large else (8, BLOCK_PAGES)
    if not first <= frame < first + count:
        return []
    gpa = ((own.window_l1_32 if large else own.window_l1) << x86.PAGE_SHIFT) + size * (frame - first)
    gva = frame << x86.PAGE_SHIFT
    entry = gva | P | W | A
    return [
        Touches([(WRITE, gpa, size, entry & ~W)]),
        Invlpg(gva),
        Touches([(READ, gva, 8, 0), (WRITE, gva + 8, 8, 2), (READ, gva, 8, 0)]),
        Touches([(WRITE, gpa, size, entry)]),
        *_invalidate(program, gva),
    ]
