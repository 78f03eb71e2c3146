"""Loads that use memory and change none of its tables: touch, and context-switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.steps import USER_READ, USER_WRITE, Item
from shadowmmu.cpu.loads.layout import own_pages
from shadowmmu.cpu.loads.memory import mapped_page
from shadowmmu.cpu.loads.paging import kernel_stack, syscall, write_cr3
from shadowmmu.cpu.loads.steps import call, load_step
from shadowmmu.cpu.program import Touch, Touches

if TYPE_CHECKING:
    from shadowmmu.cpu.loads.program import LoadProgram

__all__ = ["context_switch_iteration", "run_process", "touch_iteration"]


def _access(program: LoadProgram, gva: int) -> Touch:
    """A load or a store of some word of the page, by the load's share of writes."""
    bits = program.prng.bits()
    write = bits & 0xFFFF < program.config.write_share * 0x10000
    return (USER_WRITE if write else USER_READ), gva + (bits >> 16 & 0xFF8), 8, 0


def touch_iteration(program: LoadProgram) -> list[Item]:
    """As many accesses as there are pages, at random."""
    config, below = program.config, program.prng.below
    pages = (mapped_page(config, below(config.size)) for _ in range(config.size))
    return [Touches([_access(program, gva) for gva in pages])]


@load_step
def run_process(program: LoadProgram, number: int) -> None:
    """The kernel switches to process `number`."""
    program.work["context_switch"] += 1
    program.space = number
    program.push(write_cr3(program), kernel_stack(program))


def context_switch_iteration(program: LoadProgram) -> list[Item]:
    """The next process runs and uses all of its pages once."""
    config = program.config
    pages = [own_pages(config.size, number) for number in range(config.size)]
    following = (program.space + 1) % config.processes
    return [*syscall(call(run_process, following)), Touches([_access(program, gva) for gva in pages])]
