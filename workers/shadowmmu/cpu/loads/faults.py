"""The page-fault handler of loads: text is mapped from its file, shared pages are copied, mappings are the load's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.memory import COW, DATA_PAGE, D, P, W
from shadowmmu.cpu.guest.paging import frame_of
from shadowmmu.cpu.guest.steps import USER_READ, WRITE, Item
from shadowmmu.cpu.loads.config import Load
from shadowmmu.cpu.loads.layout import OWN_REGIONS
from shadowmmu.cpu.loads.memory import READ_ONLY, Space, entry_for
from shadowmmu.cpu.loads.paging import (
    enter_kernel,
    fill_page,
    flush,
    give_back,
    leave_kernel,
    set_entries,
    syscall,
    take_frame,
)
from shadowmmu.cpu.loads.steps import call, load_step
from shadowmmu.cpu.program import Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = ["handle_page_fault"]

_STACK: Final = OWN_REGIONS[3]


def handle_page_fault(program: LoadProgram, error_code: int, cr2: int) -> None:
    """Puts on the stack what the kernel does about a fault of the access on top of it."""
    if cr2 >> 63:
        raise RuntimeError(f"a page fault at {cr2:#x}, in the direct map, where everything is mapped")
    program.work["fault_handler"] += 1
    gva, write = cr2 & x86.PAGE_MASK, bool(error_code & x86.PFERR_WRITE_MASK)
    entry = program.here.entry(gva)
    if program.config.load is Load.PROTECTION_FAULT and entry & P and write and not entry & (W | COW):
        program.push(*_signal(program), call(skip_access))
    else:
        program.push(call(enter_kernel), call(resolve, gva, write), call(leave_kernel))


@load_step
def resolve(program: LoadProgram, gva: int, write: int) -> None:
    """The handler's work, in the kernel."""
    space = program.here
    entry = space.entry(gva)
    if entry & P and (not write or entry & W):
        program.count("spurious_faults")
    elif entry & COW:
        program.push(*_break_cow(program, space, gva))
    elif entry & P:
        program.work["pte_map"] += 1
        program.push(*set_entries(program, space, [(gva, entry | W | D)]))
    else:
        program.push(*_map_file(program, space, gva, bool(write)))


def _map_file(program: LoadProgram, space: Space, gva: int, write: bool) -> list[Item]:
    """A page of a file; on a read also those around it that are not mapped either (do_fault_around)."""
    size = (1 if write else program.config.fault_around) << x86.PAGE_SHIFT
    first = gva & ~(size - 1)
    entries = []
    for page in range(first, first + size, x86.PAGE_SIZE):
        frame = program.files.get(page)
        if frame is not None and not space.entry(page):
            program.memory.pool.share(frame)
            entries.append((page, entry_for(frame, DATA_PAGE if write else READ_ONLY)))
    if not entries:
        raise RuntimeError(f"a page fault at {gva:#x}, where the load has no memory")
    program.work["pte_map"] += len(entries)
    return set_entries(program, space, entries)


def _break_cow(program: LoadProgram, space: Space, gva: int) -> list[Item]:
    """Takes the page over if no other process has it (wp_page_reuse), else copies it (wp_page_copy)."""
    old = frame_of(space.entry(gva))
    program.work["pte_map"] += 1
    if program.memory.pool.refs[old] == 1:
        return set_entries(program, space, [(gva, entry_for(old, DATA_PAGE))])
    program.work["page_copy"] += 1
    frame = take_frame(program, data=True)
    return [
        fill_page(frame, 0),
        *set_entries(program, space, [(gva, 0)]),
        *flush(program, [gva]),
        *set_entries(program, space, [(gva, entry_for(frame, DATA_PAGE))]),
        call(give_back, old),
    ]


def _signal(program: LoadProgram) -> list[Item]:
    """The kernel writes a frame to the process's stack; the process's handler reads it and returns by a system call."""
    program.work["signal"] += 1
    return [
        call(enter_kernel),
        Touches([(WRITE, _STACK + 8 * word, 8, 0) for word in range(4)]),
        call(leave_kernel),
        Touches([(USER_READ, _STACK + 8 * word, 8, 0) for word in range(4)]),
        *syscall(),
    ]


@load_step
def skip_access(program: LoadProgram) -> None:
    """The process goes on behind the access that faulted."""
    top = program.stack[-1]
    assert isinstance(top, Touches)
    top.position += 1
