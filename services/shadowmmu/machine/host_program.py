"""What the rest of the host does to a guest: reclaim, migration, dirty logs, memory pressure, devices, scheduling.

A seeded, endless sequence of host operations. A real host takes the pages away that a guest uses least; races are
found on those that it uses most. So most operations go to the ends of the vCPUs' partitions of guest memory, where
their page tables (low end) and data (high end) are, and some to frames that the program had shortly before.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Final

from shadowmmu.cpu.guest import huge_base, working_frames
from shadowmmu.cpu.guest.layout import BLOCK_PAGES
from shadowmmu.protocol import messages as m

__all__ = ["HostProgram"]

MIN_MMU_PAGES: Final = 64
WORKING_SET: Final = 48
"""Frames at each end of a partition that the guest uses most."""
DEVICE_SLOT: Final = 2
DEVICE_PAGES: Final = 8
DEVICE_BASES: Final = (1, 4)
"""Where, from the end of RAM on, a device's memory comes and goes: some of the device frames that guests use."""
IDLE_SCAN: Final = 64
"""Pages that one search for idle ones looks at."""


class HostProgram:
    """The operations of one host agent.

    `config`: the run's; the sequence depends on its seed and sizes only.
    """

    def __init__(self, config: m.RunConfig, vcpus: int) -> None:
        self._random = random.Random(config.seed * 31 + vcpus)
        self._vcpus = vcpus
        self._pages = config.memory_pages
        self._huge_base = huge_base(config.memory_pages)
        self._mmu_pages = config.mmu_pages
        self._partitions = working_frames(config, vcpus)
        self._recent: deque[int] = deque(maxlen=16)
        self._logging: set[int] = set()
        self._device_mapped = False
        self._kinds, self._weights = zip(
            (self._unmap, 30),
            (self._unmap_range, 6),
            (self._reclaim, 25),
            (self._reclaim_idle, 60),
            (self._move, 10),
            (self._age, 10),
            (self._test_age, 4),
            (self._dirty_log, 8),
            (self._shrink, 3),
            (self._set_mmu_pages, 3),
            (self._zap_all, 1),
            (self._device_memory, 4),
            (self._migrate, 6),
            strict=True,
        )

    def next_operation(self) -> m.HostOperation:
        """The next operation."""
        kind = self._random.choices(self._kinds, self._weights)[0]
        operation: m.HostOperation = kind()
        return operation

    def _gfn(self) -> int:
        draw = self._random.random()
        if draw < 0.25 and self._recent:
            return self._random.choice(self._recent)
        if draw < 0.9:
            partition = self._random.choice(self._partitions)
            size = min(WORKING_SET, len(partition))
            ends = (partition[:size], partition[-size:], partition[-size:])
            gfn = self._random.choice(self._random.choice(ends))
        else:
            gfn = self._random.randrange(self._huge_base)
        self._recent.append(gfn)
        return gfn

    def _unmap(self) -> m.HostOperation:
        return m.Unmap(self._gfn())

    def _unmap_range(self) -> m.HostOperation:
        blocks = (self._pages - self._huge_base) // BLOCK_PAGES
        if blocks and self._random.random() < 0.2:
            return m.UnmapRange(self._huge_base + BLOCK_PAGES * self._random.randrange(blocks), BLOCK_PAGES)
        gfn = self._gfn()
        return m.UnmapRange(gfn, min(self._random.choice((2, 8, 32)), self._huge_base - gfn))

    def _reclaim(self) -> m.HostOperation:
        return m.Reclaim(self._gfn())

    def _reclaim_idle(self) -> m.HostOperation:
        return m.ReclaimIdle([self._gfn() for _ in range(IDLE_SCAN)])

    def _move(self) -> m.HostOperation:
        return m.Move(self._gfn(), writable=self._random.random() < 0.5)

    def _age(self) -> m.HostOperation:
        return m.Age(self._gfn())

    def _test_age(self) -> m.HostOperation:
        return m.TestAge(self._gfn())

    def _dirty_log(self) -> m.HostOperation:
        slot = 0 if self._huge_base == self._pages else self._random.randrange(2)
        if slot not in self._logging:
            self._logging.add(slot)
            return m.SetDirtyLog(slot, enable=True)
        if self._random.random() < 0.4:
            self._logging.discard(slot)
            return m.SetDirtyLog(slot, enable=False)
        return m.GetDirtyLog(slot)

    def _shrink(self) -> m.HostOperation:
        return m.Shrink(self._random.choice((1, 8)))

    def _set_mmu_pages(self) -> m.HostOperation:
        return m.SetMmuPages(max(MIN_MMU_PAGES, self._random.choice((self._mmu_pages // 2, self._mmu_pages))))

    def _zap_all(self) -> m.HostOperation:
        return m.ZapAll()

    def _migrate(self) -> m.HostOperation:
        """To one of as many processors as there are vCPUs, so that they come back to where they were."""
        processor = self._random.randrange(max(2, self._vcpus))
        return m.Migrate(self._random.randrange(self._vcpus), processor)

    def _device_memory(self) -> m.HostOperation:
        """The memory of a device, like a graphics card's, is mapped, moved or unmapped."""
        base = self._pages + DEVICE_BASES[self._random.random() < 0.1]
        self._device_mapped = not self._device_mapped or self._random.random() < 0.5
        return m.SetMemoryRegion(DEVICE_SLOT, base, DEVICE_PAGES if self._device_mapped else 0)
