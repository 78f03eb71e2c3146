"""The processor model: TLB, walker, the vCPU's side of the conversation, and the guest programs; pure.

In the order in which one meets them: `boot_image` is what guest memory and the registers hold when a run begins,
`make_program` what a vCPU executes, `VcpuCore` the vCPU that executes it, with its `Tlb`; `hardware_walk` is the walk
that the processor does in the tables, wherever these are (`ept_walk` in those of EPT). Randomness comes from the
run's seed alone.
"""

from shadowmmu.cpu.ept import ept_walk
from shadowmmu.cpu.guest import BootImage, Layout, boot_image, huge_base, make_program
from shadowmmu.cpu.program import Program
from shadowmmu.cpu.tlb import Tag, Tlb, TlbEntry, checked_rights, needed_rights
from shadowmmu.cpu.vcpu_core import VcpuCore, instruction_share
from shadowmmu.cpu.walker import (
    EptMisconfig,
    PendingWalk,
    Tables,
    Translation,
    WalkFault,
    WalkResult,
    hardware_walk,
)

__all__ = [
    "boot_image",
    "BootImage",
    "make_program",
    "Layout",
    "huge_base",
    "Program",
    "VcpuCore",
    "instruction_share",
    "Tlb",
    "TlbEntry",
    "Tag",
    "checked_rights",
    "needed_rights",
    "hardware_walk",
    "ept_walk",
    "PendingWalk",
    "Tables",
    "Translation",
    "WalkFault",
    "EptMisconfig",
    "WalkResult",
]
