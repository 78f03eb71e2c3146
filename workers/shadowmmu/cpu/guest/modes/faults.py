"""The page-fault handler: try again, repair, or give the access up.

The program shares its tables without locks and is sloppy about invalidation, so anything may fault at any time. If the
records say that the access is allowed it is tried again, then the entries for it are written again, then CR3 is
loaded again, and then they are written with paging off, where nothing faults. An access that still faults is given up,
as is one that the records do not allow. A store by which the program edits its own tables is never given up lightly: it
goes on in the own address space, with the entries for it written anew.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.memory import NX, U, W
from shadowmmu.cpu.guest.modes.formats import FORMATS, registers_for
from shadowmmu.cpu.guest.modes.layout import LEAF_PAGES, USER
from shadowmmu.cpu.guest.modes.tables import LARGE, PAGE, Entry, window_tables, words_of
from shadowmmu.cpu.guest.steps import WRITE
from shadowmmu.cpu.program import Invlpg, LockedAccess, Op, Touches, UsedLoad, WriteRegister
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.messages import ControlRegister, GuestMode

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = ["Fault", "handle_page_fault", "rewrite", "rights"]

RETRIES: Final = 1
REPAIRS: Final = 2
RELOADS: Final = 3
REWRITES: Final = 4
MAX_FAULTS: Final = 5
"""Up to so many faults in a row each of these is tried; after that the access is given up."""

RESERVED_IN_2M: Final = 0xFF << 13
RESERVED_IN_4M: Final = 0x1F << 17
"""Bits of entries that map large pages."""

_KIND: Final = int(AccessFlag.WRITE | AccessFlag.FETCH | AccessFlag.USER)


class Fault(msgspec.Struct):
    """A page fault of the instruction at `depth` of the stack, `times` in a row; `position`: in its run."""

    cr2: int
    position: int
    depth: int
    times: int = 1


def handle_page_fault(program: ModesProgram, error_code: int, cr2: int) -> None:
    """The fault of the access on top of the stack."""
    times = _times(program, cr2)
    if times > MAX_FAULTS or program.mode is GuestMode.NONPAGING:
        program.count("given_up")
        _skip(program, cr2, error_code)
    elif cr2 < USER:
        _in_window(program, cr2, error_code, times)
    elif program.space is None or not _allowed(program, cr2):
        program.count("faults_refused")
        if times > 1 or not program.prng.chance(3) or not _map(program, cr2):
            _skip(program, cr2, error_code)
    elif times > REPAIRS:
        _persists(program, cr2, times)
    elif times > RETRIES:
        program.count("repairs")
        path = _path(program, cr2)
        # A PDPTE may change only where CR3 is loaded next.
        entries = (path[1:] if program.mode is GuestMode.PAE else path)[-2:]
        program.push(*(_store(entry) for entry in entries), Invlpg(cr2))
    else:
        program.count("spurious_faults")


def _times(program: ModesProgram, cr2: int) -> int:
    """How often in a row the access on top of the stack has faulted, with this time."""
    top, depth = program.stack[-1], len(program.stack)
    position = top.position if isinstance(top, Touches) else 0
    faults = program.faults
    while faults and faults[-1].depth > depth:
        faults.pop()
    if faults and faults[-1].depth == depth:
        fault = faults[-1]
        if (fault.cr2, fault.position) == (cr2, position):
            fault.times += 1
            return fault.times
        faults.pop()
    faults.append(Fault(cr2, position, depth))
    return 1


def _persists(program: ModesProgram, cr2: int, times: int) -> None:
    if times <= RELOADS:
        program.push(WriteRegister(ControlRegister.CR3, program.registers.cr3))
    else:
        program.push(*rewrite(program, cr2 if times <= REWRITES else None))


def _in_window(program: ModesProgram, cr2: int, error_code: int, times: int) -> None:
    """An access to the own tables goes on with paging repaired; others are skipped."""
    frame = cr2 >> x86.PAGE_SHIFT
    own = program.frames
    fixed = frame in (own.window_l1, own.window_l1_32, own.window_l2)
    if fixed or program.tables.is_table(frame):
        program.push(*rewrite(program, cr2 if times <= RETRIES else None))
    else:
        program.count("window_faults")
        _skip(program, cr2, error_code)


# --- repair -----------------------------------------------------------------------------------------------------------


def _path(program: ModesProgram, gva: int) -> list[Entry]:
    return program.tables.path(program.frames, program.mode, program.space or 0, gva)


def _store(entry: Entry) -> Op:
    return Touches([(WRITE, entry.gpa, entry.size, entry.value)])


def rewrite(program: ModesProgram, gva: int | None) -> list[Op]:
    """Turns paging off, writes the entries for `gva` (None: all own tables) again, and back on, in own space 0."""
    program.count("rewrites" if gva is not None else "full_rewrites")
    mode, old = program.mode, program.registers
    new = registers_for(mode, program.layout.cr3(program.vcpu, mode, 0), old)
    if gva is None:
        tables = chain(program.tables.all(), window_tables(program.layout, program.vcpu))
        items = [(WRITE, gpa, 8, value) for gpa, value in words_of(tables).items()]
    else:
        path = program.tables.path(program.frames, mode, 0, gva)
        items = [(WRITE, entry.gpa, entry.size, entry.value) for entry in path]
    return [
        WriteRegister(ControlRegister.CR0, old.cr0 & ~x86.X86_CR0_PG),
        Touches(items),
        WriteRegister(ControlRegister.CR4, new.cr4),
        WriteRegister(ControlRegister.CR3, new.cr3),
        WriteRegister(ControlRegister.CR0, new.cr0),
    ]


def rights(mode: GuestMode, path: list[Entry]) -> int | None:
    """W, U and NX of the translation that a path gives; None if it gives none."""
    if not path or not path[-1].leaf:
        return None
    allowed, no_execute = W | U, 0
    for entry in path[1:] if mode is GuestMode.PAE else path:
        allowed &= entry.value
        no_execute |= entry.value & NX
    return allowed | (no_execute if FORMATS[mode].size == 8 else 0)


def _allowed(program: ModesProgram, cr2: int) -> bool:
    """Whether the access on top of the stack should succeed, as far as the records say."""
    path = _path(program, cr2)
    got = rights(program.mode, path)
    if got is None or any(_reserved(program, entry) for entry in path):
        return False
    flags = _flags(program.stack[-1])
    if flags & AccessFlag.USER and not got & U:
        return False
    if flags & AccessFlag.FETCH and got & NX:
        return False
    supervisor_may = not flags & AccessFlag.USER and not program.registers.cr0 & x86.X86_CR0_WP
    return not (flags & AccessFlag.WRITE and not got & W and not supervisor_may)


def _reserved(program: ModesProgram, entry: Entry) -> bool:
    """Whether an entry faults by its other bits: such values are written on purpose."""
    value, registers = entry.value, program.registers
    if value >> 40 & 0xFFF or (value & NX and not registers.efer & x86.EFER_NX):
        return True
    if not entry.leaf or not value & LARGE or entry.gpa >> x86.PAGE_SHIFT not in _directories(program):
        return False
    if entry.size == 4:
        return not registers.cr4 & x86.X86_CR4_PSE or bool(value & RESERVED_IN_4M)
    return bool(value & RESERVED_IN_2M)


def _directories(program: ModesProgram) -> list[int]:
    return [table.frame for table in chain(program.tables.l2, program.tables.root32)]


def _flags(op: Op) -> int:
    match op:
        case Touches():
            return op.items[op.position][0]
        case UsedLoad():
            return op.flags
        case LockedAccess():
            return op.flags | WRITE
        case _:
            return 0


def _map(program: ModesProgram, cr2: int) -> bool:
    """Maps a page of own data at `cr2`, if an own table of pages is known to be there."""
    if program.space is None:
        return False
    path = _path(program, cr2)
    if not path or len(path) < len(FORMATS[program.mode].levels):
        return False
    leaf = path[-1]
    for table in program.tables.small(program.mode):
        if table.frame == leaf.gpa >> x86.PAGE_SHIFT:
            value = program.prng.choice(program.tables.data) << x86.PAGE_SHIFT | PAGE
            index = (leaf.gpa & x86.PAGE_OFFSET_MASK) // table.size
            if index >= LEAF_PAGES:
                return False
            table.entries[index] = value
            program.count("demand_mapped")
            program.push(_store(Entry(leaf.gpa, leaf.size, value)))
            return True
    return False


# --- giving up --------------------------------------------------------------------------------------------------------


def _skip(program: ModesProgram, cr2: int, error_code: int) -> None:
    """Gives up the access on top of the stack and, for a user page, what would fault likewise in this plan."""
    program.count("skipped")
    page = cr2 >> x86.PAGE_SHIFT
    stack = program.stack
    top = stack[-1]
    if not isinstance(top, Touches):
        stack.pop()
        return
    kind = top.items[top.position][0] & _KIND
    del top.items[top.position]
    if cr2 < USER:
        return
    permission = error_code & x86.PFERR_PRESENT_MASK

    def keep(item: tuple[int, int, int, int]) -> bool:
        return item[1] >> x86.PAGE_SHIFT != page or bool(permission and item[0] & _KIND != kind)

    for run in stack:
        if isinstance(run, Touches):
            before = [item for item in run.items[: run.position] if keep(item)]
            run.items = before + [item for item in run.items[run.position :] if keep(item)]
            run.position = len(before)
