"""Guest programs: a small kernel, its address spaces, and the workloads composed from what it does.

`boot_image` and `make_program` are all that a run needs, with `working_frames` for who wants to disturb it. Inside:
`layout` (where everything is), `memory` (what a vCPU's kernel knows), `steps` and `kernel` (how it executes),
`shootdown`, `paging`, `faults`, `touching` (what it does), and `workloads` (in which order). All that is 64-bit; the
package `modes` is the program of the workload of that name, which runs in every paging mode.
"""

from __future__ import annotations

from shadowmmu.cpu.guest.boot import BootImage
from shadowmmu.cpu.guest.boot import boot_image as kernel_boot_image
from shadowmmu.cpu.guest.kernel import Kernel
from shadowmmu.cpu.guest.layout import Layout, huge_base
from shadowmmu.cpu.guest.modes import ModesLayout, ModesProgram, modes_boot_image
from shadowmmu.cpu.program import Program
from shadowmmu.protocol.messages import RunConfig, Workload

__all__ = ["BootImage", "Layout", "boot_image", "huge_base", "make_program", "working_frames"]


def make_program(config: RunConfig, vcpu: int, vcpus: int) -> Program:
    """The program of `vcpu`. Raises ValueError if memory is too small for so many vCPUs."""
    if config.workload is Workload.MODES:
        return ModesProgram(config, vcpu, vcpus)
    return Kernel(config, vcpu, vcpus)


def boot_image(config: RunConfig, vcpus: int) -> BootImage:
    """The guest's memory and registers at the start. Raises ValueError if memory is too small for so many vCPUs."""
    return (modes_boot_image if config.workload is Workload.MODES else kernel_boot_image)(config, vcpus)


def working_frames(config: RunConfig, vcpus: int) -> list[range]:
    """Each vCPU's own frames: its tables at the low end, its data at the high end. Raises ValueError as above."""
    layout = (ModesLayout if config.workload is Workload.MODES else Layout)(config, vcpus)
    return [layout.partition(vcpu) for vcpu in range(vcpus)]
