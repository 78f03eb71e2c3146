"""Where everything is for the guests of all modes: frames and addresses, computed from the run's configuration.

Guest physical memory, from frame 0 up: partitions of the vCPUs (tables at the low end, data at the high end), then data
blocks of 2 MiB, which the host backs with large pages where it has any. Frame 0 and every other frame whose number is
a multiple of 1024 stay empty: without CR4.PSE the processor takes the first frame of a 4 MiB page for a table.
Frames from `memory_pages` up are in no slot: devices.

Guest addresses, the same in every mode. Below `USER` the window: all partitions at their physical addresses, for the
kernel, so that a table is edited at one address in any mode and any address space. From `USER` up, 1 GiB each:
user pages, the same by other tables, and what is borrowed from another vCPU. In 32-bit paging these are the user
directory entries. In 64-bit mode the same pages have further names above 2^39.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.guest.layout import BLOCK_PAGES, MAX_VCPUS, huge_base
from shadowmmu.protocol.messages import GuestMode, RunConfig

__all__ = [
    "ALIAS",
    "FOREIGN",
    "HUGE",
    "LEAF_PAGES",
    "MALFORMED_PDPT",
    "MODE_BLOCK",
    "OTHER_FORMAT",
    "PDPT_OFFSET",
    "SELF",
    "SELF_ROOT",
    "USER",
    "USER_DIRECTORY",
    "Frames",
    "ModesLayout",
]

USER: Final = 1 << 30
MODE_BLOCK: Final = 1024
"""Frames of a 4 MiB page."""

# Entries of a user level 2 table, and of a 32-bit directory from USER_DIRECTORY on: ordinary tables from 0,
ALIAS: Final = 16
"""the same tables again,"""
HUGE: Final = 32
"""large pages of data,"""
SELF: Final = 48
"""the table itself, as a table of pages,"""
FOREIGN: Final = 56
"""another vCPU's tables,"""
OTHER_FORMAT: Final = 64
"""and tables that were written in the other format."""
USER_DIRECTORY: Final = USER >> 22
SELF_ROOT: Final = 300
"""The entry of a level 4 root that names the root."""
LEAF_PAGES: Final = 16
"""The first entries of a table of pages are those that are used; floods go to others."""

PDPT_OFFSET: Final = 0xFE0
"""Where in the first 32-bit directory the first PAE root lies: the same CR3 selects both."""
MALFORMED_PDPT: Final = 0xA0
"""Where in the PDPT page a root lies that cannot be loaded."""

MAX_PARTITION: Final = 256
MIN_PARTITION: Final = 40
DEVICE_LIMIT: Final = 1 << 20
"""Frames that a 32-bit entry can name."""


class Frames(msgspec.Struct, frozen=True):
    """What a vCPU's frames are first used for. Pairs: of its first and its second address space."""

    root64: tuple[int, int]
    l3: tuple[int, int]
    l2: tuple[int, int]
    root32: tuple[int, int]
    pdpt: int
    window_l2: int
    window_l1: int
    window_l1_32: int
    small8: list[int]
    small4: list[int]
    data: list[int]


class ModesLayout:
    """The layout for `config` and `vcpus`. Raises ValueError if memory is too small, or there are too many vCPUs."""

    def __init__(self, config: RunConfig, vcpus: int) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"guest programs run on 1 to {MAX_VCPUS} vCPUs, not {vcpus}")
        self.memory_pages = config.memory_pages
        self.vcpus = vcpus
        blocks = config.memory_pages // BLOCK_PAGES
        first = min(-(-huge_base(config.memory_pages) // BLOCK_PAGES), blocks - 1)
        self.data_blocks = [n * BLOCK_PAGES for n in range(first, blocks)]
        self.partition_pages = min(MAX_PARTITION, (self.data_blocks[0] - 1) // vcpus)
        if self.partition_pages < MIN_PARTITION:
            raise ValueError(
                f"{config.memory_pages} pages of memory leave {self.partition_pages} for each of {vcpus} vCPUs;"
                f" {MIN_PARTITION} are needed"
            )
        self.window_end = 1 + vcpus * self.partition_pages
        """The first frame that the window need not show."""
        self.small_tables = 2 if self.partition_pages < 80 else 4
        self._frames = [self._assign(vcpu) for vcpu in range(vcpus)]

    def partition(self, vcpu: int) -> range:
        """The frames that `vcpu` decides about."""
        first = 1 + vcpu * self.partition_pages
        return range(first, first + self.partition_pages)

    def frames(self, vcpu: int) -> Frames:
        """What they are at the start."""
        return self._frames[vcpu]

    def _assign(self, vcpu: int) -> Frames:
        frames = iter([frame for frame in self.partition(vcpu) if frame % MODE_BLOCK])

        def pair() -> tuple[int, int]:
            return next(frames), next(frames)

        return Frames(
            root64=pair(),
            l3=pair(),
            l2=pair(),
            root32=pair(),
            pdpt=next(frames),
            window_l2=next(frames),
            window_l1=next(frames),
            window_l1_32=next(frames),
            small8=[next(frames) for _ in range(self.small_tables)],
            small4=[next(frames) for _ in range(self.small_tables)],
            data=list(frames),
        )

    def neighbour(self, vcpu: int) -> int:
        """The vCPU whose tables `vcpu` borrows; itself if it is alone."""
        return (vcpu + 1) % self.vcpus

    def cr3(self, vcpu: int, mode: GuestMode, space: int) -> int:
        """The value of CR3 that selects an address space of `vcpu`. Without paging it selects nothing."""
        frames = self._frames[vcpu]
        if mode is GuestMode.PAGING64:
            return frames.root64[space] << 12
        if mode is GuestMode.PAE and space:
            return frames.pdpt << 12
        return frames.root32[space] << 12 | (0 if space else PDPT_OFFSET)

    def device_frame(self, vcpu: int) -> int | None:
        """The device register page that the vCPU uses, if an entry of every format can name it."""
        frame = self.memory_pages + vcpu % 8
        return frame if frame < DEVICE_LIMIT else None
