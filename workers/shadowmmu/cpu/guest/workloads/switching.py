"""Context switches: CR3 is written with other values, and with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.guest.shootdown import switch_to
from shadowmmu.cpu.guest.steps import Item, call
from shadowmmu.cpu.guest.touching import choose_hot, compute

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.kernel import Kernel

__all__ = ["go_home", "reload", "round_trip", "switch"]


def switch(kernel: Kernel) -> list[Item]:
    """Another process runs from now on."""
    return [call(switch_to, kernel.prng.choice(kernel.layout.own_spaces(kernel.vcpu)))]


def go_home(kernel: Kernel) -> list[Item]:
    """Back to the address space that all vCPUs begin in."""
    return [call(switch_to, 0)] if kernel.space else []


def reload(kernel: Kernel) -> list[Item]:
    """CR3 is written with the value that it has."""
    return [kernel.reload_cr3()]


def round_trip(kernel: Kernel) -> list[Item]:
    """A few others run for a short time each."""
    spaces = kernel.layout.own_spaces(kernel.vcpu)
    items: list[Item] = []
    for space in [*kernel.prng.sample(spaces, 3), kernel.space]:
        items += [call(switch_to, space), call(choose_hot), call(compute, 128)]
    return items
