"""What guest memory and the registers hold when a run of the `modes` program begins."""

from __future__ import annotations

from itertools import chain

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.boot import BootImage
from shadowmmu.cpu.guest.modes.formats import MODES, Registers, registers_for
from shadowmmu.cpu.guest.modes.layout import ModesLayout
from shadowmmu.cpu.guest.modes.tables import initial_tables, window_tables, words_of
from shadowmmu.protocol.messages import GuestMode, RunConfig, SetRegisters

__all__ = ["first_mode", "first_registers", "modes_boot_image"]


def first_mode(config: RunConfig, vcpu: int) -> GuestMode:
    """The mode that `vcpu` begins in. Above a host's own tables the guest's paging is off."""
    if config.tdp is not None:
        return GuestMode.NONPAGING
    return MODES[vcpu % len(MODES)] if config.mode is GuestMode.MIXED else config.mode


def first_registers(config: RunConfig, layout: ModesLayout, vcpu: int) -> Registers:
    """The registers that `vcpu` begins with."""
    mode = first_mode(config, vcpu)
    return registers_for(mode, layout.cr3(vcpu, mode, 0))


def modes_boot_image(config: RunConfig, vcpus: int) -> BootImage:
    """The guest's memory and registers at the start. Raises ValueError if memory is too small for so many vCPUs."""
    layout = ModesLayout(config, vcpus)
    words: list[tuple[int, int]] = []
    registers: list[SetRegisters] = []
    for vcpu in range(vcpus):
        tables = chain(initial_tables(layout, vcpu).all(), window_tables(layout, vcpu))
        words += sorted(words_of(tables).items())
        first = first_registers(config, layout, vcpu)
        long_mode = x86.EFER_LMA if first.mode is GuestMode.PAGING64 else 0
        registers.append(SetRegisters(vcpu, first.cr0, first.cr3, first.cr4, first.efer | long_mode))
    return BootImage(words, registers)
