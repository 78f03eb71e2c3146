"""Where everything is for a load: guest frames and guest addresses.

Guest physical memory, from frame 0 up:

    | never used | kernel: its level 3 table, the direct map's level 2 tables | partition of vCPU 0 | ... | the rest |

All frames of a vCPU's processes, paging structures, data, files, and kernel stacks, come from its partition, so that
no guest locks are needed. Partitions have the size that the load needs, and end before the frames that the host backs
by large pages. The kernel half is the direct map of all memory by 2 MiB entries, as Linux has it.

Guest addresses: those of a small dynamically linked program, so that its pages need as many tables as they do in Linux.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.cpu.guest.layout import huge_base
from shadowmmu.cpu.loads.config import Load, LoadConfig
from shadowmmu.protocol.messages import RunConfig

__all__ = [
    "MAPPING",
    "MAX_LOAD_VCPUS",
    "OWN_REGIONS",
    "TEXT_REGIONS",
    "LoadLayout",
    "memory_needed",
    "own_pages",
]

MAX_LOAD_VCPUS: Final = 256

TEXT_REGIONS: Final = (0x0000_0040_0000, 0x7F12_0000_0000)
"""The program's text, and its libraries'."""
OWN_REGIONS: Final = (0x0000_0060_0000, 0x0000_1000_0000, 0x7F12_1000_0000, 0x7FFC_0000_0000)
"""Data, heap, the libraries' data, stack: a process's own memory, a quarter of it each."""
MAPPING: Final = 0x7E00_0000_0000
"""What a load maps for itself."""

_TABLES_OF_A_PROCESS: Final = 24
"""At most, with user root and kernel stack, as long as no region needs a second level 1 table."""
_BLOCK: Final = 512


def own_pages(count: int, number: int) -> int:
    """The address of page `number` of a process's `count` own ones: neighbours lie in different regions."""
    region, index = number % len(OWN_REGIONS), number // len(OWN_REGIONS)
    assert number < count
    return OWN_REGIONS[region] + (index << 12)


def _frames_needed(load: LoadConfig) -> int:
    """Of one vCPU's partition: all that an iteration can have in use at the same time."""
    pages, text = load.size, load.text_pages
    tables = _TABLES_OF_A_PROCESS + pages // _BLOCK + text // _BLOCK
    match load.load:
        case Load.FORK:
            return 2 * tables + text + pages + min(pages, load.child_writes + 2) + 2
        case Load.CONTEXT_SWITCH:
            return load.processes * (tables + pages) + text
        case Load.REMAP:
            return tables + load.tables + text + pages + 8
        case _:
            return tables + text + load.file_pages + 8


def _kernel_frames(memory_pages: int) -> int:
    return 2 + -(-memory_pages // (_BLOCK * _BLOCK))


def memory_needed(load: LoadConfig, vcpus: int) -> int:
    """The least `memory_pages`, in steps of a whole block of 512, on which `load` can run on so many vCPUs."""
    needed = vcpus * _frames_needed(load) + 6
    pages = max(1024, -(-needed // _BLOCK) * _BLOCK)
    while huge_base(pages) < needed:
        pages += _BLOCK
    return pages


class LoadLayout:
    """The layout. Raises ValueError if memory is too small, or there are too many vCPUs."""

    def __init__(self, load: LoadConfig, run: RunConfig, vcpus: int) -> None:
        if not 1 <= vcpus <= MAX_LOAD_VCPUS:
            raise ValueError(f"loads run on 1 to {MAX_LOAD_VCPUS} vCPUs, not {vcpus}")
        self.memory_pages = run.memory_pages
        self.kernel_l3 = 1
        self.first = _kernel_frames(run.memory_pages)
        self.direct_l2 = range(2, self.first)
        self.partition_pages = _frames_needed(load)
        if self.first + vcpus * self.partition_pages > huge_base(run.memory_pages):
            raise ValueError(
                f"load {load.load.value} on {vcpus} vCPUs needs {memory_needed(load, vcpus)} pages of memory, not"
                f" {run.memory_pages}"
            )

    def partition(self, vcpu: int) -> range:
        """The frames of `vcpu`."""
        first = self.first + vcpu * self.partition_pages
        return range(first, first + self.partition_pages)
