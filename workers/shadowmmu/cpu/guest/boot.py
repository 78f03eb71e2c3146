"""What guest memory and the registers hold when a run begins: paging switched on, all address spaces in place."""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import BLOCK_PAGES, DIRECT_MAP, KERNEL_ROOT_INDEX, WINDOW_L3_INDEX, Layout
from shadowmmu.cpu.guest.memory import TABLE, A, D, P, Table, W, initial_memory
from shadowmmu.protocol.messages import RunConfig, SetRegisters

__all__ = ["CR0", "CR4", "EFER", "EFER_SCE", "BootImage", "boot_image"]

EFER_SCE: Final = 1 << 0
"""SYSCALL enabled: nothing in the model depends on it, so a guest may write it as it likes."""

CR0: Final = x86.X86_CR0_PG | x86.X86_CR0_WP | x86.X86_CR0_PE
CR4: Final = x86.X86_CR4_PAE | x86.X86_CR4_PGE
EFER: Final = x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX | EFER_SCE

_KERNEL_PAGE: Final = P | W | A | x86.PT_GLOBAL_MASK
_KERNEL_TABLE: Final = P | W | A


class BootImage(msgspec.Struct, frozen=True):
    """What a run begins with: `words` are (gpa, value) of aligned 8-byte words; `registers` one per vCPU."""

    words: list[tuple[int, int]]
    registers: list[SetRegisters]


class _Image:
    def __init__(self) -> None:
        self.words: list[tuple[int, int]] = []

    def store(self, frame: int, index: int, value: int) -> None:
        self.words.append(((frame << x86.PAGE_SHIFT) + 8 * index, value))

    def store_table(self, table: Table) -> None:
        for index, value in table.entries.items():
            self.store(table.frame, index, value)


def _entry(frame: int, flags: int) -> int:
    return frame << x86.PAGE_SHIFT | flags


def _direct_map(image: _Image, layout: Layout) -> None:
    for number, frame in enumerate(layout.direct_l2):
        image.store(layout.kernel_l3, number, _entry(frame, _KERNEL_TABLE))
    for block in range(-(-layout.memory_pages // BLOCK_PAGES)):
        l2, index = layout.direct_l2[block // 512], block % 512
        l1 = layout.direct_l1.get(block)
        if l1 is None:
            # D is clear in every other one: the first write through it has to set it.
            flags = _KERNEL_PAGE | x86.PT_PAGE_SIZE_MASK | (0 if block % 4 == 1 else D)
            image.store(l2, index, _entry(block * BLOCK_PAGES, flags))
            continue
        image.store(l2, index, _entry(l1, _KERNEL_TABLE))
        for page in range(BLOCK_PAGES):
            flags = _KERNEL_PAGE | (0 if page % 8 == 3 else D)
            image.store(l1, page, _entry(block * BLOCK_PAGES + page, flags))


def boot_image(config: RunConfig, vcpus: int) -> BootImage:
    """The guest's memory and registers at the start. Raises ValueError if memory is too small for so many vCPUs."""
    layout = Layout(config, vcpus)
    image = _Image()
    _direct_map(image, layout)
    image.store(layout.kernel_l3, WINDOW_L3_INDEX, _entry(layout.window_l2, _KERNEL_TABLE))
    for vcpu, frame in enumerate(layout.window_l1):
        image.store(layout.window_l2, vcpu, _entry(frame, _KERNEL_TABLE))
    for root, l3 in zip(layout.spaces, layout.space_l3, strict=True):
        image.store(root, 0, _entry(l3, TABLE))
        image.store(root, KERNEL_ROOT_INDEX, _entry(layout.kernel_l3, _KERNEL_TABLE))
    for vcpu in range(vcpus):
        memory = initial_memory(layout, vcpu)
        image.store_table(memory.window)
        for arena in memory.arenas:
            image.store(layout.space_l3[arena.space], arena.slot, _entry(arena.directory.frame, TABLE))
            image.store_table(arena.directory)
            for table in arena.tables.values():
                image.store_table(table)
    # Everybody begins in address space 0.
    image.words.append((layout.mask_word(0) - DIRECT_MAP, (1 << vcpus) - 1))
    registers = [SetRegisters(vcpu, CR0, layout.cr3(0), CR4, EFER) for vcpu in range(vcpus)]
    return BootImage(image.words, registers)
