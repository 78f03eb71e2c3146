"""TLB shootdowns and changes of the address space: what keeps the TLBs of all vCPUs right.

A vCPU that has narrowed or moved a translation (1) invalidates its own TLB, (2) reads which vCPUs run that address
space, (3) writes what is to be invalidated to its mail word, sets its bit in each target's pending word by a locked
operation and sends them an interrupt, and (4) waits until all have added 1 to its acknowledgements. The target's
handler takes the pending bits, invalidates, acknowledges, and wakes the asker if it was the last.

The same mail serves one more request: to write to a page, as a kernel does in an interrupt handler that copies data
to users. Sloppy programs use it to make sure that others have a translation in their TLBs.

No deadlock: a waiting vCPU serves the requests of others, an asker has one request at a time, and the wait cannot
miss its wake-up: HLT is not executed if an interrupt came since the acknowledgements were last read (as STI; HLT does).

Changing the address space: set the own bit in the new one's mask, write CR3 (which empties the TLB), clear the bit in
the old one's. Whoever changes a paging entry after that and does not see the bit need not ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.memory import Arena
from shadowmmu.cpu.guest.steps import USER_WRITE, Item, call, step, stores
from shadowmmu.cpu.program import Halt, Invlpg, LockedAccess, SendIpi, Touches, UsedLoad, WriteRegister
from shadowmmu.protocol.messages import ControlRegister, LockedOp

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = [
    "EVERYTHING",
    "SHOOTDOWN_VECTOR",
    "WAKE_VECTOR",
    "ask_to_touch",
    "invalidate",
    "invalidate_own",
    "serve_requests",
    "switch_to",
]

SHOOTDOWN_VECTOR: Final = 0xFD
"""Somebody has set a bit in the receiver's pending word."""
WAKE_VECTOR: Final = 0xFC
"""All have done what the receiver asked for."""
EVERYTHING: Final = 0
"""Instead of a gva: the whole address space. (So a request for page 0 empties the TLB, too.)"""
TOUCH_SHIFT: Final = 12
"""In a mail word, above the address space: so many pages are to be written to; 0: to be invalidated."""
SPACE_MASK: Final = (1 << TOUCH_SHIFT) - 1

MAX_INVLPG: Final = 3
"""More pages than this are invalidated by writing CR3."""
_U64: Final = (1 << 64) - 1


def _mail(what: int, gva: int, targets: int) -> int:
    """A mail word: which page, how many are asked, and what, for which address space."""
    return (gva >> x86.PAGE_SHIFT) << 24 | targets << 16 | what


def invalidate_own(kernel: Kernel, space: int, pages: list[int]) -> list[Item]:
    """Invalidates `pages` (gvas) of an address space in the own TLB; EVERYTHING stands for all."""
    if space != kernel.space:
        return []
    if EVERYTHING in pages or len(pages) > MAX_INVLPG or kernel.prng.chance(6):
        return [kernel.reload_cr3()]
    return [Invlpg(gva) for gva in pages]


def invalidate(kernel: Kernel, arena: Arena, pages: list[int]) -> list[Item]:
    """What makes a change of the arena's `pages` (page numbers; none: all of them) seen by every vCPU, in order."""
    named_twice = any(arena.has_second_names(page) for page in pages)
    gvas = [EVERYTHING] if named_twice or not pages else [arena.gva(page) for page in pages]
    items = invalidate_own(kernel, arena.space, gvas)
    if kernel.layout.is_shared(arena.space) and kernel.vcpus > 1:
        items.append(call(ask, arena.space, gvas[0] if len(gvas) == 1 else EVERYTHING))
    return items


def ask_to_touch(kernel: Kernel, arena: Arena, page: int, count: int = 1) -> list[Item]:
    """All others that run the arena's address space write to `count` pages from `page` on, as their TLBs have them."""
    if not kernel.layout.is_shared(arena.space) or kernel.vcpus == 1:
        return []
    return [call(ask, arena.space | count << TOUCH_SHIFT, arena.gva(page))]


# --- the asker's side ---------------------------------------------------------------------------------------------


@step
def ask(kernel: Kernel, what: int, gva: int) -> None:
    """Asks all that run a shared address space to invalidate a page, or EVERYTHING, or to touch some, and waits.

    `what`: the address space, and above it the number of pages to touch.
    """
    kernel.push(UsedLoad(kernel.layout.mask_word(what & SPACE_MASK)), call(ask_those, what, gva))


@step
def ask_those(kernel: Kernel, what: int, gva: int) -> None:
    """The same with the mask loaded."""
    me, layout = kernel.vcpu, kernel.layout
    targets = [vcpu for vcpu in range(kernel.vcpus) if vcpu != me and kernel.value >> vcpu & 1]
    if not targets:
        return
    kernel.count("touches_asked" if what >> TOUCH_SHIFT else "shootdowns")
    kernel.push(
        stores([(layout.acks_word(me), 0), (layout.mail_word(me), _mail(what, gva, len(targets)))]),
        *(LockedAccess(layout.pending_word(target), LockedOp.XADD, 1 << me) for target in targets),
        SendIpi(targets, SHOOTDOWN_VECTOR),
        call(await_acks, len(targets)),
    )


@step
def await_acks(kernel: Kernel, targets: int) -> None:
    """Waits for as many acknowledgements."""
    kernel.woken = False
    kernel.push(UsedLoad(kernel.layout.acks_word(kernel.vcpu)), call(check_acks, targets))


@step
def check_acks(kernel: Kernel, targets: int) -> None:
    """Sleeps if there are not enough yet."""
    if kernel.value < targets:
        kernel.push(Halt(unless_woken=True), call(await_acks, targets))


# --- the target's side --------------------------------------------------------------------------------------------


@step
def serve_requests(kernel: Kernel) -> None:
    """The handler of SHOOTDOWN_VECTOR."""
    kernel.push(LockedAccess(kernel.layout.pending_word(kernel.vcpu), LockedOp.XCHG, 0), call(serve_askers))


@step
def serve_askers(kernel: Kernel) -> None:
    """Serves those whose bits were pending."""
    for asker in range(kernel.vcpus):
        if kernel.value >> asker & 1:
            kernel.push(UsedLoad(kernel.layout.mail_word(asker)), call(serve, asker))


@step
def serve(kernel: Kernel, asker: int) -> None:
    """Does what the mail word says and acknowledges."""
    gva = kernel.value >> 24 << x86.PAGE_SHIFT
    targets = kernel.value >> 16 & 0xFF
    what = kernel.value & 0xFFFF
    kernel.count("requests_served")
    kernel.push(
        *(_touch(kernel, what, gva) if what >> TOUCH_SHIFT else invalidate_own(kernel, what, [gva])),
        LockedAccess(kernel.layout.acks_word(asker), LockedOp.XADD, 1),
        call(wake_if_last, asker, targets),
    )


def _touch(kernel: Kernel, what: int, gva: int) -> list[Item]:
    """Writes to the pages, if the address space is the current one."""
    if what & SPACE_MASK != kernel.space:
        return []
    offset = 8 * kernel.prng.below(500)
    value = kernel.prng.bits() & ~1
    pages = range(gva, gva + (what >> TOUCH_SHIFT << x86.PAGE_SHIFT), x86.PAGE_SIZE)
    return [Touches([(USER_WRITE, page + offset, 8, value) for page in pages])]


@step
def wake_if_last(kernel: Kernel, asker: int, targets: int) -> None:
    """The asker sleeps until the last of its targets wakes it."""
    if kernel.value + 1 == targets:
        kernel.push(SendIpi([asker], WAKE_VECTOR))


# --- address spaces -----------------------------------------------------------------------------------------------


@step
def switch_to(kernel: Kernel, space: int) -> None:
    """Runs another address space (or the same: then CR3 is just written again)."""
    old = kernel.space
    if space == old:
        kernel.push(kernel.reload_cr3())
        return
    kernel.count("switches")
    kernel.space = space
    kernel.hot = []
    items: list[Item] = [WriteRegister(ControlRegister.CR3, kernel.layout.cr3(space))]
    bit = 1 << kernel.vcpu
    if kernel.layout.is_shared(space):
        items.insert(0, LockedAccess(kernel.layout.mask_word(space), LockedOp.XADD, bit))
    if kernel.layout.is_shared(old):
        items.append(LockedAccess(kernel.layout.mask_word(old), LockedOp.XADD, -bit & _U64))
    kernel.push(*items)
