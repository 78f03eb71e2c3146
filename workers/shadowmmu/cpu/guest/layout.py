"""Where everything is: guest frames and guest addresses, computed from the run's configuration.

Guest physical memory, from frame 0 up:

    | never used | kernel: paging structures, shared words, per-CPU data | roots of the address spaces |
    | partition of vCPU 0 | partition of vCPU 1 | ... | data blocks |

Table frames and data frames of a vCPU come from its partition, so that no guest locks are needed: what a partition's
frames are used for only its owner decides. The data blocks are 2 MiB each; where the host backs them by large pages
(the last quarter of memory) they hold nothing but data. Frames from `memory_pages` up are in no slot: devices.

Guest addresses. User half: the address spaces' arenas, 1 GiB each, one per vCPU (`arena_base`), and a second name for
each (entry `ALIAS_SLOT` + vCPU of the same level 3 table). Kernel half, the same in every address space: the direct map
of all memory, partly by 4 KiB and partly by 2 MiB entries, and a window per vCPU whose pages it maps as it likes.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.cpu import x86
from shadowmmu.protocol.messages import RunConfig

__all__ = [
    "ALIAS_SLOT",
    "BLOCK_PAGES",
    "DEVICE_WINDOW",
    "DIRECT_MAP",
    "CONTESTED_PAGES",
    "FIRST_WINDOW_GVA",
    "KERNEL_ROOT_INDEX",
    "MAX_VCPUS",
    "Layout",
    "direct",
    "huge_base",
]

BLOCK_PAGES: Final = 512
KERNEL_ROOT_INDEX: Final = 256
DIRECT_MAP: Final = 0xFFFF_8000_0000_0000
WINDOW_L3_INDEX: Final = 8
FIRST_WINDOW_GVA: Final = DIRECT_MAP + (WINDOW_L3_INDEX << 30)
DEVICE_WINDOW: Final = 511
"""The page of a vCPU's window that a device register is mapped at."""
ALIAS_SLOT: Final = 256
CONTESTED_PAGES: Final = 2
"""The first pages of each arena are those that everybody uses most."""
MAX_VCPUS: Final = 62
"""One bit each in a word of shared memory, with room for sums."""

SMALL_MAPPED_BLOCKS: Final = 16
"""Among the first so many blocks of memory, the even ones are direct-mapped by 4 KiB entries."""
MIN_PARTITION: Final = 36

_MASKS, _PENDING, _ACKS, _MAIL = 0, 256, 320, 384


def huge_base(memory_pages: int) -> int:
    """The first frame that the host backs with large pages: the last quarter of memory in whole blocks."""
    return memory_pages - memory_pages // 4 // BLOCK_PAGES * BLOCK_PAGES


def direct(gpa: int) -> int:
    """The direct map's address of a guest physical address."""
    return DIRECT_MAP + gpa


class Layout:
    """The layout for `config` and `vcpus`. Raises ValueError if memory is too small, or there are too many vCPUs."""

    def __init__(self, config: RunConfig, vcpus: int) -> None:
        if not 1 <= vcpus <= MAX_VCPUS:
            raise ValueError(f"guest programs run on 1 to {MAX_VCPUS} vCPUs, not {vcpus}")
        self.memory_pages = config.memory_pages
        self.vcpus = vcpus
        self.data_blocks = self._data_blocks()
        share = (self.data_blocks[0] if self.data_blocks else self.memory_pages) // vcpus
        self.shared_spaces = 2
        self.private_spaces = 4 if share >= 400 else 2 if share >= 160 else 1
        self._next = 1  # frame 0 is never used
        self.kernel_l3 = self._take()
        self.direct_l2 = [self._take() for _ in range(-(-self.memory_pages // (BLOCK_PAGES * 512)))]
        small = range(0, min(SMALL_MAPPED_BLOCKS, huge_base(self.memory_pages) // BLOCK_PAGES), 2)
        self.direct_l1 = {block: self._take() for block in small}
        self.window_l2 = self._take()
        self.window_l1 = [self._take() for _ in range(vcpus)]
        self.words = self._take()
        self.cpu_data = [self._take() for _ in range(vcpus)]
        self.spaces = [self._take() for _ in range(self.shared_spaces + vcpus * self.private_spaces)]
        self.space_l3 = [self._take() for _ in self.spaces]
        end = self.data_blocks[0] if self.data_blocks else self.memory_pages
        self.partition_pages = (end - self._next) // vcpus
        if self.partition_pages < MIN_PARTITION:
            raise ValueError(
                f"{self.memory_pages} pages of memory leave {self.partition_pages} for each of {vcpus} vCPUs;"
                f" {MIN_PARTITION} are needed"
            )
        self.tables_per_arena = max(1, min(8, self.partition_pages // 80))
        self.hot_pages = 8 if self.partition_pages >= 80 else 4

    def _data_blocks(self) -> list[int]:
        """First frames of the blocks that hold only data: those with large host pages, or else the last whole one."""
        base = huge_base(self.memory_pages)
        first = -(-base // BLOCK_PAGES)
        blocks = [n * BLOCK_PAGES for n in range(first, self.memory_pages // BLOCK_PAGES)]
        return blocks or [(self.memory_pages // BLOCK_PAGES - 1) * BLOCK_PAGES]

    def _take(self) -> int:
        self._next += 1
        return self._next - 1

    def partition(self, vcpu: int) -> range:
        """The frames that `vcpu` decides about."""
        first = self._next + vcpu * self.partition_pages
        return range(first, first + self.partition_pages)

    # --- address spaces ------------------------------------------------------------------------------------------

    def is_shared(self, space: int) -> bool:
        """Whether all vCPUs run this address space."""
        return space < self.shared_spaces

    def own_spaces(self, vcpu: int) -> list[int]:
        """The address spaces that `vcpu` runs: the shared ones, then its private ones."""
        first = self.shared_spaces + vcpu * self.private_spaces
        return [*range(self.shared_spaces), *range(first, first + self.private_spaces)]

    def cr3(self, space: int) -> int:
        """The value of CR3 that selects the address space."""
        return self.spaces[space] << x86.PAGE_SHIFT

    def arena_base(self, vcpu: int, alias: bool = False) -> int:
        """The first address of the vCPU's arena (or of its second name), the same in each address space."""
        return (vcpu + (ALIAS_SLOT if alias else 0)) << 30

    # --- words of shared memory (gva in the direct map) ------------------------------------------------------------

    def _word(self, index: int) -> int:
        return direct((self.words << x86.PAGE_SHIFT) + 8 * index)

    def mask_word(self, space: int) -> int:
        """Bit v: vCPU v may hold translations of the shared address space."""
        return self._word(_MASKS + space)

    def pending_word(self, vcpu: int) -> int:
        """Bit i: vCPU i has a request in its mail word for `vcpu`."""
        return self._word(_PENDING + vcpu)

    def acks_word(self, vcpu: int) -> int:
        """How many have done what `vcpu` asked for."""
        return self._word(_ACKS + vcpu)

    def mail_word(self, vcpu: int) -> int:
        """What `vcpu` asks others to invalidate."""
        return self._word(_MAIL + vcpu)

    # --- kernel pages -----------------------------------------------------------------------------------------------

    def window(self, vcpu: int, page: int) -> int:
        """The address of page 0 to 511 of the vCPU's window."""
        return FIRST_WINDOW_GVA + (vcpu << 21) + (page << x86.PAGE_SHIFT)

    def device_frame(self, vcpu: int) -> int:
        """The device register page that the vCPU uses."""
        return self.memory_pages + vcpu % 8
