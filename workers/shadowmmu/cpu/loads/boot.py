"""What guest memory and the registers hold when a load begins: paging switched on, all processes in place."""

from __future__ import annotations

from typing import Final

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.boot import CR0, CR4, EFER, BootImage
from shadowmmu.cpu.guest.memory import A, D, P, Table, W
from shadowmmu.cpu.loads.config import LoadConfig
from shadowmmu.cpu.loads.layout import LoadLayout
from shadowmmu.cpu.loads.memory import entry_for, initial_memory
from shadowmmu.protocol.messages import RunConfig, SetRegisters

__all__ = ["load_boot_image"]

_KERNEL_PAGE: Final = P | W | A | D | x86.PT_GLOBAL_MASK | x86.PT_PAGE_SIZE_MASK
_BLOCK: Final = 512


def _words(table: Table) -> list[tuple[int, int]]:
    base = table.frame << x86.PAGE_SHIFT
    return [(base + 8 * index, value) for index, value in sorted(table.entries.items())]


def _direct_map(layout: LoadLayout) -> list[Table]:
    l3 = Table(layout.kernel_l3, {})
    tables = [l3]
    for number, frame in enumerate(layout.direct_l2):
        l3.entries[number] = entry_for(frame, P | W | A)
        first = number * _BLOCK
        blocks = range(first, min(first + _BLOCK, -(-layout.memory_pages // _BLOCK)))
        tables.append(
            Table(frame, {block - first: entry_for(block * _BLOCK, _KERNEL_PAGE) for block in blocks})
        )
    return tables


def load_boot_image(config: LoadConfig, run: RunConfig, vcpus: int) -> BootImage:
    """The guest's memory and registers at the start. Raises ValueError if memory is too small for so many vCPUs."""
    layout = LoadLayout(config, run, vcpus)
    words = [word for table in _direct_map(layout) for word in _words(table)]
    registers = []
    for vcpu in range(vcpus):
        memory = initial_memory(layout, config, vcpu)
        for space in memory.spaces:
            for table in (*space.roots(), *space.tables.values()):
                words += _words(table)
        cr3 = memory.spaces[0].roots()[-1].frame << x86.PAGE_SHIFT
        registers.append(SetRegisters(vcpu, CR0, cr3, CR4, EFER))
    return BootImage(words, registers)
