"""The page walk that the processor does in extended page tables (EPT): two-dimensional paging as Intel has it.

From guest physical to host physical addresses, always over four levels. Entries have rights of their own (read, write,
execute) and, on processors of 2011, no accessed and dirty bits, so that a walk changes nothing. Like the walk in shadow
tables (`walker`, on whose `Tables` and results this relies) it is a generator that yields before each entry's read.
Source: Intel SDM vol. 3C, 28.2; conformance/FORMAT.md section 5.
"""

from __future__ import annotations

from typing import Final, TypeVar

from shadowmmu.cpu import x86
from shadowmmu.cpu.walker import (
    RESERVED_MASK,
    EptMisconfig,
    PendingWalk,
    Tables,
    Translation,
    WalkFault,
    leaf_frame,
)
from shadowmmu.protocol.events import AccessFlag

__all__ = ["ept_walk"]

T = TypeVar("T")

EPT_READ: Final = 1 << 0
EPT_WRITE: Final = 1 << 1
EPT_EXECUTE: Final = 1 << 2
_ALL: Final = EPT_READ | EPT_WRITE | EPT_EXECUTE

READ_VIOLATION: Final = 1
WRITE_VIOLATION: Final = 2
FETCH_VIOLATION: Final = 0
"""What KVM makes of the exit qualification: the error code of a violation, whatever its cause."""


def ept_walk(tables: Tables[T], root: T, gpa: int, flags: int) -> PendingWalk:
    """Translate the guest physical address for an access of type `flags` (AccessFlag bits 0 to 4).

    An entry without any right is not present: a violation. One that may be written or executed but not read, or has
    a reserved address bit, is misconfigured (this processor has no execute-only translations). The translation's
    rights are in the terms of shadow paging: user accesses are always permitted, and what may be written counts as
    dirty, since no walk is ever needed for a D bit.
    """
    if flags & AccessFlag.WRITE:
        needed, error_code = EPT_WRITE, WRITE_VIOLATION
    elif flags & AccessFlag.FETCH:
        needed, error_code = EPT_EXECUTE, FETCH_VIOLATION
    else:
        needed, error_code = EPT_READ, READ_VIOLATION
    table = root
    rights = _ALL
    level = x86.PT64_ROOT_LEVEL
    while True:
        index = x86.pt64_index(gpa, level)
        yield
        entry = tables.read(table, index)
        if not entry & _ALL:
            return WalkFault(error_code)
        if not entry & EPT_READ or entry & RESERVED_MASK:
            return EptMisconfig()
        rights &= entry
        if level == x86.PT_PAGE_TABLE_LEVEL or (level <= x86.PT_PDPE_LEVEL and entry & x86.PT_PAGE_SIZE_MASK):
            break
        table = tables.child(table, index, entry)
        level -= 1
    if not rights & needed:
        return WalkFault(error_code)
    result = AccessFlag.MAY_USER
    if rights & EPT_WRITE:
        result |= AccessFlag.MAY_WRITE | AccessFlag.DIRTY
    if rights & EPT_EXECUTE:
        result |= AccessFlag.MAY_FETCH
    if level > x86.PT_PAGE_TABLE_LEVEL:
        result |= AccessFlag.LARGE
    return Translation(leaf_frame(entry, level), level, int(result))
