"""What kernels do now and then: CR0.WP off for a store, EFER, device registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.boot import CR0, EFER_SCE
from shadowmmu.cpu.guest.memory import D, W
from shadowmmu.cpu.guest.paging import change_pages
from shadowmmu.cpu.guest.steps import READ, WRITE, Item, call
from shadowmmu.cpu.guest.touching import touch_device, touch_pages
from shadowmmu.cpu.guest.workloads.anon import some_mapped
from shadowmmu.cpu.program import Touches, WriteRegister
from shadowmmu.protocol.messages import ControlRegister

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["device", "syscall_enable", "write_protect_off"]


def device(kernel: Kernel) -> list[Item]:
    """Talks to a device."""
    return [touch_device(kernel)]


def write_protect_off(kernel: Kernel) -> list[Item]:
    """The kernel stores to a read-only page with CR0.WP off, as kernels do that patch code."""
    number = kernel.arena_here()
    arena = kernel.arena(number)
    pages = some_mapped(kernel, arena, 1)
    if not pages:
        return []
    gva = arena.gva(pages[0])
    return [
        call(change_pages, number, W | D, 0, *pages),
        touch_pages(kernel, arena, pages, write=False),
        WriteRegister(ControlRegister.CR0, CR0 & ~x86.X86_CR0_WP),
        Touches([(WRITE, gva + 128, 8, 2), (READ, gva + 128, 8, 0), (WRITE, gva + 256, 8, 4)]),
        WriteRegister(ControlRegister.CR0, CR0),
        touch_pages(kernel, arena, pages, write=False),
        call(change_pages, number, 0, W, *pages),
    ]


def syscall_enable(kernel: Kernel) -> list[Item]:
    """Writes EFER, in a bit that has nothing to do with paging."""
    kernel.efer ^= EFER_SCE
    return [WriteRegister(ControlRegister.EFER, kernel.efer)]
