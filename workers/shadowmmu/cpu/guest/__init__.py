"""Guest programs: a small kernel, its address spaces, and the workloads composed from what it does.

`boot_image` and `make_program` are all that a run needs. Inside: `layout` (where everything is), `memory` (what a
vCPU's kernel knows), `steps` and `kernel` (how it executes), `shootdown`, `paging`, `faults`, `touching` (what it
does), and `workloads` (in which order).
"""

from __future__ import annotations

from shadowmmu.cpu.guest.boot import BootImage, boot_image
from shadowmmu.cpu.guest.kernel import Kernel
from shadowmmu.cpu.guest.layout import Layout, huge_base
from shadowmmu.cpu.program import Program
from shadowmmu.protocol.messages import RunConfig

__all__ = ["BootImage", "Layout", "boot_image", "huge_base", "make_program"]


def make_program(config: RunConfig, vcpu: int, vcpus: int) -> Program:
    """The program of `vcpu`. Raises ValueError if memory is too small for so many vCPUs."""
    return Kernel(config, vcpu, vcpus)
