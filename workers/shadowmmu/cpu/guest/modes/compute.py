"""Computing: runs of accesses to a few hot pages, so that most of them hit the TLB, in whatever mode the vCPU is in.

Data is always stored to the first bytes of an aligned 8-byte word, with bit 0 of both halves clear: wherever a late
store lands, it cannot make a present paging entry of any format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.memory import NX, U, W
from shadowmmu.cpu.guest.modes.faults import rights
from shadowmmu.cpu.guest.modes.layout import (
    ALIAS,
    FOREIGN,
    HUGE,
    LEAF_PAGES,
    MODE_BLOCK,
    OTHER_FORMAT,
    SELF,
    SELF_ROOT,
    USER,
)
from shadowmmu.cpu.guest.prng import ADD, MASK, MULTIPLY
from shadowmmu.cpu.guest.steps import READ, USER_FETCH, USER_READ, USER_WRITE, WRITE
from shadowmmu.cpu.program import LockedAccess, Op, Touch, Touches, UsedLoad
from shadowmmu.protocol.messages import GuestMode, LockedOp

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = ["Place", "compute", "large_page", "table_page", "touch", "user_page"]

Place = tuple[int, int, int]
"""A page in use: its address, the access type of its loads, and that of its stores."""

RUN: Final = 64
"""Accesses of a run before it is repeated."""
HOT: Final = 8
DEVICE_PAGE: Final = 13
"""Where a table of pages maps a device."""
TABLE_SHIFT: Final = {GuestMode.PAGING32: 22}
"""How much one table of pages maps, where that is not 2 MiB."""


def user_page(mode: GuestMode, index: int, page: int, slot: int = 0) -> int:
    """The address of a page by entry `index` of the user level 2 table (directory); `slot`: 0 to 2, of which GiB."""
    shift = TABLE_SHIFT.get(mode, 21)
    return (0 if shift == 22 else slot << 30) + USER + (index << shift) + (page << x86.PAGE_SHIFT)


def table_page(program: ModesProgram, index: int) -> int:
    """Where the own tables show, as a page, the table at `index` of the user level 2 table (directory)."""
    mode = program.mode
    if mode is GuestMode.PAGING32:
        return user_page(mode, SELF, USER >> 22) + (index << x86.PAGE_SHIFT)
    if mode is GuestMode.PAGING64 and program.prng.chance(2):
        return 0xFFFF << 48 | SELF_ROOT << 39 | 1 << 21 | index << x86.PAGE_SHIFT
    return user_page(mode, SELF, index)


def large_page(program: ModesProgram) -> int:
    """An address of data that a large page maps."""
    blocks = program.layout.data_blocks
    number = program.prng.below(min(4, len(blocks)))
    gva = user_page(program.mode, HUGE + number, program.prng.below(512))
    if program.mode is GuestMode.PAGING32:
        gva += blocks[number] % MODE_BLOCK << x86.PAGE_SHIFT
    return gva


def compute(program: ModesProgram) -> list[Op]:
    """A few hundred accesses, with a value used or a locked operation now and then."""
    prng = program.prng
    hot = _hot(program)
    ops: list[Op] = []
    for _ in range(2 + prng.below(2)):
        ops.append(touch(program, hot, RUN, again=prng.below(4)))
        gva, read, write = prng.choice(hot)
        offset = prng.below(512) * 8
        if prng.chance(2):
            ops.append(UsedLoad(gva + offset, read & USER_READ))
        elif write & WRITE:
            op = prng.choice((LockedOp.XCHG, LockedOp.XADD, LockedOp.CMPXCHG))
            value = prng.bits() & 0x1E  # small: what XADD adds does not carry into the frame of a stray entry
            ops.append(
                LockedAccess(gva + offset, op, value, 0, write & USER_READ, 4 if prng.chance(4) else 8)
            )
    if prng.chance(3):
        ops += _device(program)
    return ops


def touch(program: ModesProgram, places: list[Place], count: int, again: int = 0) -> Touches:
    """A run of `count` accesses to these pages, two or three loads to a store."""
    number = len(places)
    items: list[Touch] = []
    append = items.append
    state = program.prng.state
    for _ in range(count):
        state = (state * MULTIPLY + ADD) & MASK
        bits = state >> 24
        gva, read, write = places[(bits & 0xFFF) * number >> 12]
        offset = bits >> 12 & 0xFF8
        if bits >> 24 & 3 or not write & WRITE:
            append((read, gva + offset, 8, 0))
        else:
            append((write, gva + offset, 1 << (bits >> 26 & 3), bits >> 28 & 0x7E))
    program.prng.state = state
    return Touches(items, again=again)


def _hot(program: ModesProgram) -> list[Place]:
    prng = program.prng
    if program.mode is GuestMode.NONPAGING:
        return _physical(program)
    places = [_user(program) for _ in range(HOT - 1)]
    if prng.chance(2):
        places.append(_known(program, large_page(program)))
    if prng.chance(2):  # the kernel's: data, and a look at a table
        places.append((prng.choice(program.tables.data) << x86.PAGE_SHIFT, READ, WRITE))
        places.append((prng.choice(list(program.tables.all())).gpa(0) & x86.PAGE_MASK, READ, READ))
    return places


def _physical(program: ModesProgram) -> list[Place]:
    prng, layout = program.prng, program.layout
    other = layout.frames(layout.neighbour(program.vcpu))
    frames = [prng.choice(program.tables.data[-LEAF_PAGES:]) for _ in range(HOT - 2)]
    frames += [prng.choice(other.data[-4:]), prng.choice(layout.data_blocks) + prng.below(512)]
    places: list[Place] = [(frame << x86.PAGE_SHIFT, READ, WRITE) for frame in frames]
    gva, _, _ = places[0]
    places[0] = gva, USER_FETCH, USER_WRITE
    table = prng.choice(program.tables.small4 if prng.chance(2) else program.tables.small8)
    places.append((table.frame << x86.PAGE_SHIFT, READ, WRITE if prng.chance(8) else READ))
    return places


def _user(program: ModesProgram) -> Place:
    """A user page: mostly as ordinary tables map it, sometimes by another name, another's, or misread."""
    prng, mode = program.prng, program.mode
    index = prng.below(program.layout.small_tables)
    page = prng.below(LEAF_PAGES)
    page -= page == DEVICE_PAGE
    if prng.chance(5):
        index += prng.choice((ALIAS, ALIAS, FOREIGN, OTHER_FORMAT))
    slot = prng.below(3) if prng.chance(5) else 0
    gva = user_page(mode, index, page, slot)
    if mode is GuestMode.PAGING64 and prng.chance(8):
        gva |= prng.choice((1, 2)) << 39
    return _known(program, gva)


def _known(program: ModesProgram, gva: int) -> Place:
    """With the rights that the records give it, or, if they know nothing or at random, as a user's."""
    space = program.space
    if space is not None and not program.prng.chance(12):
        got = rights(program.mode, program.tables.path(program.frames, program.mode, space, gva))
        if got is not None:
            if not got & U or program.prng.chance(8):  # the kernel may write anywhere while CR0.WP is clear
                return gva, READ, WRITE if got & W or program.prng.chance(4) else READ
            fetch = not got & NX and program.prng.chance(6)
            return gva, USER_FETCH if fetch else USER_READ, USER_WRITE if got & W else USER_READ
    return gva, USER_READ, USER_WRITE


def _device(program: ModesProgram) -> list[Op]:
    """Reads and writes a device's registers."""
    frame = program.layout.device_frame(program.vcpu)
    if frame is None:
        return []
    if program.mode is GuestMode.NONPAGING:
        place: Place = (frame << x86.PAGE_SHIFT, READ, WRITE)
    else:
        place = _known(program, user_page(program.mode, 0, DEVICE_PAGE))
    gva, read, write = place
    value = program.prng.bits() & 0xFE if write & WRITE else 0
    return [Touches([(read & USER_READ, gva + 0x10, 4, 0), (write, gva + 0x20, 4, value)])]
