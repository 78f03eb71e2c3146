"""Guest programs: a small kernel, its address spaces, and the workloads composed from what it does.

`boot_image` and `make_program` are all that a run needs. Inside: `layout` (where everything is), `memory` (what a
vCPU's kernel knows), `steps` and `kernel` (how it executes), `shootdown`, `paging`, `faults`, `touching` (what it
does), and `workloads` (in which order).
"""

from __future__ import annotations

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.boot import BootImage, boot_image
from shadowmmu.cpu.guest.kernel import Kernel
from shadowmmu.cpu.guest.layout import CONTESTED_PAGES, Layout, huge_base
from shadowmmu.cpu.guest.memory import initial_memory
from shadowmmu.cpu.program import Program
from shadowmmu.protocol.messages import RunConfig

__all__ = ["BootImage", "Layout", "boot_image", "contested_frames", "huge_base", "make_program"]


def make_program(config: RunConfig, vcpu: int, vcpus: int) -> Program:
    """The program of `vcpu`. Raises ValueError if memory is too small for so many vCPUs."""
    return Kernel(config, vcpu, vcpus)


def contested_frames(config: RunConfig, vcpus: int) -> list[int]:
    """The guest frames of the pages that all vCPUs use most when a run begins, and mostly later.

    A host that wants to meet translations in use, rather than idle memory, does things to these.
    """
    layout = Layout(config, vcpus)
    return [
        arena.entry(page) >> x86.PAGE_SHIFT & (1 << 40) - 1
        for vcpu in range(vcpus)
        for arena in initial_memory(layout, vcpu).arenas[: layout.shared_spaces]
        for page in range(CONTESTED_PAGES)
    ]
