"""What one iteration of each load is, as instructions and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.steps import Item
from shadowmmu.cpu.loads.accesses import context_switch_iteration, touch_iteration
from shadowmmu.cpu.loads.config import Load
from shadowmmu.cpu.loads.fork import fork_iteration
from shadowmmu.cpu.loads.mappings import (
    mmap_iteration,
    page_fault_iteration,
    protection_fault_iteration,
    remap_iteration,
)
from shadowmmu.cpu.loads.paging import syscall

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = ["iteration"]


def iteration(program: LoadProgram) -> list[Item]:
    """The next iteration of the program's load."""
    match program.config.load:
        case Load.FORK:
            return fork_iteration(program)
        case Load.PAGE_FAULT:
            return page_fault_iteration(program)
        case Load.PROTECTION_FAULT:
            return protection_fault_iteration(program)
        case Load.MMAP:
            return mmap_iteration(program)
        case Load.GETPID:
            return syscall()
        case Load.TOUCH:
            return touch_iteration(program)
        case Load.CONTEXT_SWITCH:
            return context_switch_iteration(program)
        case Load.REMAP:
            return remap_iteration(program)
