"""mprotect: rights are taken from pages and given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.memory import NX, D, U, W
from shadowmmu.cpu.guest.paging import change_pages
from shadowmmu.cpu.guest.steps import READ, USER_FETCH, WRITE, Item, call
from shadowmmu.cpu.guest.touching import choose_hot, compute, touch_pages
from shadowmmu.cpu.guest.workloads.anon import some_mapped
from shadowmmu.cpu.program import Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["no_execute", "read_only", "supervisor_only"]


def read_only(kernel: Kernel) -> list[Item]:
    """A range becomes read-only, is read, is written once (which is refused, or upgrades it), and writable again."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 2 + kernel.prng.below(6), stay=kernel.prng.chance(2))
    if not pages:
        return []
    return [
        touch_pages(kernel, arena, pages),
        call(change_pages, number, W | D, 0, *pages),
        touch_pages(kernel, arena, pages, write=False),
        touch_pages(kernel, arena, pages[:1]),
        call(choose_hot),
        call(compute, 192),
        call(change_pages, number, 0, W, *pages),
        touch_pages(kernel, arena, pages),
    ]


def no_execute(kernel: Kernel) -> list[Item]:
    """The right to execute is given, used, and taken away again."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 2, stay=True)
    fetches = Touches([(USER_FETCH, arena.gva(page) + 16 * n, 4, 0) for n, page in enumerate(pages)])
    again = Touches(list(fetches.items))
    if not pages:
        return []
    return [
        call(change_pages, number, NX, 0, *pages),
        fetches,
        call(change_pages, number, 0, NX, *pages),
        again,
    ]


def supervisor_only(kernel: Kernel) -> list[Item]:
    """Pages that user mode may not touch for a while; the kernel does."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 2, stay=kernel.prng.chance(2))
    if not pages:
        return []
    kernel_touches = [(WRITE, arena.gva(page) + 64, 8, 2 * page) for page in pages]
    kernel_touches += [(READ, arena.gva(page) + 8, 8, 0) for page in pages]
    return [
        call(change_pages, number, U, 0, *pages),
        Touches(kernel_touches),
        touch_pages(kernel, arena, pages[:1], write=False),
        call(change_pages, number, 0, U, *pages),
        touch_pages(kernel, arena, pages, write=False),
    ]
