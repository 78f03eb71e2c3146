"""Loads: guest programs like LMbench's, for runs in virtual time.

`make_load` and `load_boot_image` are all that a driver needs. Each vCPU does one *iteration* of its load after another,
in address spaces of its own; only the kernel half is shared. Inside: `config` (what can be chosen), `layout` (where
everything is), `memory` (what a vCPU's kernel knows), `program` (how it executes), `paging` and `faults` (what the
guest's kernel does), `fork`, `mappings` and `accesses` (the iterations). Built on the records of `shadowmmu.cpu.guest`.
"""

from __future__ import annotations

from shadowmmu.cpu.loads.boot import load_boot_image
from shadowmmu.cpu.loads.config import Load, LoadConfig
from shadowmmu.cpu.loads.layout import MAX_LOAD_VCPUS, memory_needed
from shadowmmu.cpu.loads.program import LoadProgram, make_load
from shadowmmu.cpu.loads.work import WORK

__all__ = [
    "Load",
    "LoadConfig",
    "LoadProgram",
    "make_load",
    "load_boot_image",
    "memory_needed",
    "MAX_LOAD_VCPUS",
    "WORK",
]
