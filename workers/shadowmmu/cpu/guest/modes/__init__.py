"""The guest of workload `modes`: a program that runs in any paging mode and strains the shadow MMU there.

`ModesProgram` is the program of one vCPU, `modes_boot_image` what a run begins with. Inside: `formats` (modes and
registers), `layout` (where everything is), `tables` (what a vCPU knows of its tables), `compute`, `edits` and
`switching` (what it does), `episodes` (how often), and `faults` (how it goes on whatever happens).
"""

from __future__ import annotations

from shadowmmu.cpu.guest.modes.boot import modes_boot_image
from shadowmmu.cpu.guest.modes.layout import ModesLayout
from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = ["ModesLayout", "ModesProgram", "modes_boot_image"]
