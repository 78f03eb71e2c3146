"""Programs at work: runs of accesses to the few pages that a process uses at a time.

Most instructions of every workload are made here, so that most accesses hit the TLB, as in real programs. A process in
a shared address space uses pages of its own arena and of the others', who do the same: so every vCPU holds
translations that its owner may change.

Data is always stored to the first bytes of an aligned 8-byte word, with bit 0 clear: wherever a late store lands, it
cannot make a present paging entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import CONTESTED_PAGES, DEVICE_WINDOW, DIRECT_MAP, direct
from shadowmmu.cpu.guest.memory import NX, Arena, P, U, W
from shadowmmu.cpu.guest.prng import ADD, MASK, MULTIPLY
from shadowmmu.cpu.guest.steps import (
    READ,
    USER_FETCH,
    USER_READ,
    USER_WRITE,
    WRITE,
    Item,
    call,
    step,
)
from shadowmmu.cpu.program import LockedAccess, Touch, Touches, UsedLoad
from shadowmmu.protocol.messages import LockedOp

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["Hot", "choose_hot", "compute", "touch_device", "touch_pages"]

RUN: Final = 64
"""Accesses of a run before it is repeated."""
REPEAT: Final = 3


class Hot(msgspec.Struct):
    """A page that the running process uses a lot: access types of its loads and of its stores."""

    gva: int
    read: int
    write: int


def _hot(gva: int, entry: int = U | W, fetch: bool = False) -> Hot:
    user = bool(entry & U)
    read = (USER_FETCH if fetch else USER_READ) if user else READ
    write = USER_WRITE if user else WRITE
    return Hot(gva, read, write if entry & W else read)


def _own_page(kernel: Kernel, arena: Arena, page: int) -> Hot:
    entry = arena.entry(page)
    return _hot(arena.gva(page), entry, not entry & NX and kernel.prng.chance(8))


@step
def choose_hot(kernel: Kernel) -> None:
    """The process turns to other pages."""
    prng, layout = kernel.prng, kernel.layout
    arena = kernel.arena(kernel.arena_here())
    stay = [page for page in range(layout.hot_pages) if arena.entry(page) & P]
    hot = [_own_page(kernel, arena, page) for page in prng.sample(stay, 4)]
    others = [page for page in arena.mapped() if page >= layout.hot_pages]
    hot += [_own_page(kernel, arena, page) for page in prng.sample(others, 2)]
    if layout.is_shared(kernel.space) and kernel.vcpus > 1:
        for _ in range(3):
            vcpu = (kernel.vcpu + 1 + prng.below(kernel.vcpus - 1)) % kernel.vcpus
            base = layout.arena_base(vcpu, alias=prng.chance(24))
            if prng.chance(4):
                hot.append(_hot(base + (prng.below(layout.hot_pages) << x86.PAGE_SHIFT)))
            else:  # these are mostly written
                gva = base + (prng.below(CONTESTED_PAGES) << x86.PAGE_SHIFT)
                hot += [Hot(gva, USER_READ, USER_WRITE), Hot(gva, USER_WRITE, USER_WRITE)]
    if arena.aliases and prng.chance(2):
        alias = prng.choice(sorted(arena.aliases))
        pages = [page for page in arena.mapped() if page >> 9 == arena.aliases[alias]]
        hot += [_own_page(kernel, arena, alias << 9 | page & 511) for page in prng.sample(pages, 2)]
    hot += [_hot(arena.gva(index << 9 | prng.below(512))) for index in list(arena.huge)[:1]]
    if prng.chance(2):
        hot.append(Hot(direct(layout.cpu_data[kernel.vcpu] << x86.PAGE_SHIFT), READ, WRITE))
    if prng.chance(2):
        frame = prng.choice(layout.data_blocks) + prng.below(512)
        hot.append(Hot(direct(frame << x86.PAGE_SHIFT), READ, WRITE))
    kernel.hot = hot


@step
def compute(kernel: Kernel, count: int) -> None:
    """About `count` accesses to the hot pages, two loads to a store, now and then with a value used."""
    hot = kernel.hot
    if count <= 0 or not hot:
        return
    places = [(page.gva, page.read, page.write) for page in hot]
    number = len(places)
    items: list[Touch] = []
    append = items.append
    state = kernel.prng.state
    for _ in range(min(RUN, count)):
        state = (state * MULTIPLY + ADD) & MASK
        bits = state >> 24
        gva, read, write = places[(bits & 0xFFF) * number >> 12]
        offset = bits >> 12 & 0xFF8
        if bits >> 24 & 3:
            append((read, gva + offset, 8, 0))
        elif write & WRITE:
            append((write, gva + offset, 1 << (bits >> 26 & 3), bits >> 28 & 0x7E))
        else:
            append((write, gva + offset, 4, 0))
    kernel.prng.state = state
    again = min(REPEAT, max(0, count // RUN - 1))
    rest: list[Item] = [call(compute, count - len(items) * (1 + again))]
    gva, _, write = places[(state >> 40) % number]
    if state >> 33 & 3 == 0:
        rest.insert(0, UsedLoad(gva, READ if gva >= DIRECT_MAP else USER_READ))
    elif state >> 33 & 15 == 1 and write & WRITE:
        value = (state >> 20) & 0xFFFE
        rest.insert(0, LockedAccess(gva + 0xFF8, LockedOp.XCHG, value, flags=write & ~WRITE))
    kernel.push(Touches(items, again=again), *rest)


def touch_pages(
    kernel: Kernel, arena: Arena, pages: list[int], write: bool = True, alias: bool = False
) -> Touches:
    """One access to each of the pages."""
    offset = kernel.prng.below(512) * 8
    value = kernel.prng.bits() & ~1
    flags = USER_WRITE if write else USER_READ
    return Touches([(flags, arena.gva(page, alias) + offset, 8, value if write else 0) for page in pages])


def touch_device(kernel: Kernel) -> Touches:
    """Reads and writes a device's registers."""
    gva = kernel.layout.window(kernel.vcpu, DEVICE_WINDOW)
    return Touches([(READ, gva + 0x10, 4, 0), (WRITE, gva + 0x20, 4, kernel.prng.bits() & 0xFF)])
