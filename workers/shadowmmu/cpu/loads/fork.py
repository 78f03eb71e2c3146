"""The load fork: what Linux does with page tables in fork, in the child's short life, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.guest.layout import KERNEL_ROOT_INDEX
from shadowmmu.cpu.guest.memory import COW, A, P, Table, W
from shadowmmu.cpu.guest.paging import frame_of, write_entries
from shadowmmu.cpu.guest.steps import USER_READ, USER_WRITE, Item
from shadowmmu.cpu.loads.accesses import run_process
from shadowmmu.cpu.loads.layout import OWN_REGIONS, own_pages
from shadowmmu.cpu.loads.memory import Space, entry_for, text_page
from shadowmmu.cpu.loads.paging import (
    clear_pages,
    fill_page,
    flush,
    free_frames,
    free_tables,
    give_back,
    set_entries,
    syscall,
    take_frame,
)
from shadowmmu.cpu.loads.steps import call, load_step
from shadowmmu.cpu.program import Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = ["EARLY_WRITES", "fork_iteration"]

EARLY_WRITES: Final = 2
"""Pages that the parent writes to on its way from fork to wait: its stack, and its C library's data."""
_PARENT: Final = 0
_CHILD: Final = 1
_USER_END: Final = 1 << 47


def fork_iteration(program: LoadProgram) -> list[Item]:
    """The parent forks and waits; the child runs and exits; the parent goes on."""
    config = program.config
    text = config.text_pages
    used = min(config.child_reads, text)
    reads = [text_page(text, number * text // used) for number in range(used)]
    return [
        *syscall(call(fork)),
        _writes(program, EARLY_WRITES),
        *syscall(call(run_process, _CHILD)),
        Touches([(USER_READ, gva, 8, 0) for gva in reads]),
        _writes(program, config.child_writes),
        *syscall(call(end_child)),
        _writes(program, config.parent_writes),
    ]


def _writes(program: LoadProgram, count: int) -> Touches:
    """The process writes to its own pages that it uses most; the last region's first."""
    size = program.config.size
    order = sorted(range(size), key=lambda number: (number // len(OWN_REGIONS), -number))
    return Touches([(USER_WRITE, own_pages(size, number), 8, 0) for number in order[:count]])


@load_step
def fork(program: LoadProgram) -> None:
    """copy_process: a new address space, to which dup_mmap copies the entries of the process's own memory.

    What is mapped from files is left for the child's page faults to map.
    """
    program.work["fork"] += 1
    parent = program.here
    child = Space(
        _new_root(program), _new_root(program) if program.config.kpti else None, take_frame(program)
    )
    program.memory.spaces.append(child)
    items: list[Item] = [fill_page(child.stack, 0)]
    for root in child.roots():
        entries, root.entries = root.entries, {}
        items += [
            fill_page(root.frame, 0),
            write_entries([(root, index, value) for index, value in entries.items()]),
        ]
    for number in range(program.config.size):
        gva = own_pages(program.config.size, number)
        entry = parent.entry(gva)
        shared = entry & ~W | COW
        program.work["pte_copy"] += 1
        program.memory.pool.share(frame_of(entry))
        if shared != entry:
            items += set_entries(program, parent, [(gva, shared)])
        items += set_entries(program, child, [(gva, shared)])
    program.push(*items, *flush(program))


def _new_root(program: LoadProgram) -> Table:
    program.work["table_alloc"] += 1
    program.work["page_clear"] += 1
    return Table(take_frame(program), {KERNEL_ROOT_INDEX: entry_for(program.layout.kernel_l3, P | W | A)})


@load_step
def end_child(program: LoadProgram) -> None:
    """do_exit: unmaps all pages, flushes, frees the tables; the parent runs; what the child ran on is freed at last."""
    program.work["exit"] += 1
    child = program.here
    clears, data = clear_pages(program, child, [gva for gva, _ in child.mapped()])
    links, tables = free_tables(program, child, 0, _USER_END)
    tables += [child.stack, *(root.frame for root in child.roots())]
    program.work["table_free"] += len(child.roots())
    program.push(
        *clears,
        *flush(program),
        *links,
        call(run_process, _PARENT),
        call(give_back, *data),
        call(forget_child),
        call(free_frames, *tables),
    )


@load_step
def forget_child(program: LoadProgram) -> None:
    """The parent has waited for it."""
    program.memory.spaces.pop()
