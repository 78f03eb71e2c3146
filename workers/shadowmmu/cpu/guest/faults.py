"""The page-fault handler: demand mapping, copy on write, repair, or giving the access up.

Only the owner of an arena changes its entries. A fault in somebody else's arena, and one that the owner has no answer
to, ends with the access being skipped (as a signal handler would), and with it the others of the run that would fault
in the same way. A fault that the own records do not explain is tried again once, since the processor may have used an
older, narrower translation (TLB_RULES R6); then the entries are written again. Nothing faults for ever: after
`MAX_FAULTS` in a row the access is skipped, whatever the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import ALIAS_SLOT, direct
from shadowmmu.cpu.guest.memory import (
    COW,
    DATA_PAGE,
    FIRST_ALIAS,
    FIRST_HUGE,
    FIRST_TABLE_IN_VIEW,
    NX,
    Arena,
    D,
    P,
    U,
    W,
)
from shadowmmu.cpu.guest.paging import break_cow, change_pages, map_frame, map_page, repair
from shadowmmu.cpu.guest.steps import READ, WRITE, call
from shadowmmu.cpu.program import Touches
from shadowmmu.protocol.events import AccessFlag

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["handle_page_fault"]

MAX_FAULTS: Final = 8
_KIND: Final = int(AccessFlag.WRITE | AccessFlag.FETCH)


class _Fault(msgspec.Struct, frozen=True):
    """`page` of own arena `number`; `error_code`: PFERR bits; `times`: so often in a row."""

    number: int
    page: int
    error_code: int
    times: int


def handle_page_fault(kernel: Kernel, error_code: int, cr2: int, times: int) -> None:
    """The fault of the access on top of the stack, `times` in a row."""
    if times > MAX_FAULTS:
        kernel.count("faults_for_ever")
        _skip(kernel, cr2, False)
        return
    slot = cr2 >> 30
    if slot >= 512:
        kernel.count("kernel_faults")
        return
    if slot % ALIAS_SLOT != kernel.vcpu:
        kernel.count("faults_of_others")
        _skip(kernel, cr2, bool(error_code & x86.PFERR_PRESENT_MASK))
        return
    # What a handler does with its own data.
    data = direct(kernel.layout.cpu_data[kernel.vcpu] << x86.PAGE_SHIFT)
    number = kernel.arena_here()
    arena = kernel.arena(number)
    fault = _Fault(number, cr2 >> x86.PAGE_SHIFT & 0x3FFFF, error_code, times)
    if (slot >= ALIAS_SLOT and not arena.aliased) or not _resolve(kernel, arena, fault):
        kernel.count("faults_refused")
        _skip(kernel, cr2, bool(error_code & x86.PFERR_PRESENT_MASK))
        return
    kernel.push(Touches([(READ, data, 8, 0), (WRITE, data + 8, 8, cr2 & ~1), (READ, data + 16, 8, 0)]))


def _resolve(kernel: Kernel, arena: Arena, fault: _Fault) -> bool:
    """Puts on the stack what lets the access succeed; False if it shall not."""
    page = fault.page
    index = page >> 9
    directory_entry = arena.directory.entries.get(index, 0)
    table = arena.table_of(page)
    if table is None:
        if directory_entry & x86.PT_PAGE_SIZE_MASK:
            return _with_rights(kernel, fault, directory_entry)
        return index < kernel.layout.tables_per_arena and _demand(kernel, fault)
    if not directory_entry & P:
        return False
    entry = table.entries.get(page & 511, 0)
    if entry & P:
        rights = entry & ~(W | U) | entry & directory_entry & (W | U) | directory_entry & NX
        return _with_rights(kernel, fault, rights)
    if entry:
        return False  # taken away for a while (`workloads.sloppy`)
    home = arena.aliases.get(index, index)
    if FIRST_HUGE <= home < FIRST_TABLE_IN_VIEW:
        frame = arena.huge[home] + (page & 511)
        kernel.push(call(map_frame, fault.number, page, frame << x86.PAGE_SHIFT | DATA_PAGE))
        return True
    return home < FIRST_ALIAS and _demand(kernel, fault)


def _demand(kernel: Kernel, fault: _Fault) -> bool:
    """A page that is not there yet."""
    if len(kernel.memory.pool.free) < 2:
        return False
    kernel.count("demand_mapped")
    kernel.push(call(map_page, fault.number, fault.page))
    return True


def _with_rights(kernel: Kernel, fault: _Fault, rights: int) -> bool:
    """The page is mapped with `rights`."""
    number, page = fault.number, fault.page
    write = fault.error_code & x86.PFERR_WRITE_MASK
    if write and rights & COW:
        if len(kernel.memory.pool.free) < 2:
            return False
        kernel.push(call(break_cow, number, page))
        return True
    if fault.error_code & x86.PFERR_USER_MASK and not rights & U:
        return False
    if fault.error_code & x86.PFERR_FETCH_MASK and rights & NX:
        return False
    if write and not rights & W:
        if kernel.arena(number).entry(page) & W or kernel.prng.chance(2):
            return False
        kernel.push(call(change_pages, number, 0, W | D, page))
        return True
    if fault.times == 1:
        kernel.count("spurious_faults")
    else:
        kernel.push(call(repair, number, page))
    return True


def _skip(kernel: Kernel, cr2: int, permission: bool) -> None:
    """Gives up the access on top of the stack, and what would fault likewise in the same run and soon after."""
    kernel.count("skipped")
    page = cr2 >> x86.PAGE_SHIFT
    top = kernel.stack[-1]
    if not isinstance(top, Touches):
        kernel.stack.pop()
        kernel.value = 0
        return
    kind = top.items[top.position][0] & _KIND

    def keep(item: tuple[int, int, int, int]) -> bool:
        return item[1] >> x86.PAGE_SHIFT != page or (permission and item[0] & _KIND != kind)

    done = [item for item in top.items[: top.position] if keep(item)]
    left = [item for item in top.items[top.position + 1 :] if keep(item)]
    top.items = done + left
    top.position = len(done)
    for hot in kernel.hot:
        if hot.gva >> x86.PAGE_SHIFT == page and permission:
            hot.write = hot.read
    if not permission:
        kernel.hot = [hot for hot in kernel.hot if hot.gva >> x86.PAGE_SHIFT != page]
