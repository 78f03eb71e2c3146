"""A shadow page: the table that the processor walks, and what KVM remembers about it (struct kvm_mmu_page).

The table is sparse: `spt` maps index to shadow entry and holds only entries that are not 0, so that work is done per
entry in use and not 512 times. Entries are plain integers. A shadow page has an address of its own (`hpa`), which the
entries that point to it contain; the address of entry i (what the kernel calls sptep) is `hpa + 8 * i`.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.pte_list import PteList
from shadowmmu.kvm.role import (
    ROLE_ACCESS_MASK,
    ROLE_ACCESS_SHIFT,
    ROLE_CR4_PAE,
    ROLE_DIRECT,
    ROLE_INVALID,
    ROLE_LEVEL_MASK,
    ROLE_QUADRANT_MASK,
    ROLE_QUADRANT_SHIFT,
)

__all__ = ["SHADOW_PAGE_BASE", "ShadowPage", "sptep_index", "sptep_page"]

SHADOW_PAGE_BASE: Final = 1 << 39
"""Address of the shadow page with serial number 0: above all host frames of guests, below the MMIO bits."""

SPTEP_PAGE_MASK: Final = ~0xFFF


class ShadowPage:
    """One shadow page.

    `serial` is unique in a run. `gfn` is the guest table that it stands for, or for a direct page the first frame
    that it maps. `gfns` is the frame recorded for each leaf entry (indirect pages only). `slot_bitmap` has bit i set
    if an entry ever mapped a page of slot i. `unsync_child_bitmap` holds the indices below which there may be unsync
    pages; `unsync_children` counts them.
    """

    __slots__ = (
        "access",
        "cr4_pae",
        "direct",
        "gfn",
        "gfns",
        "hpa",
        "invalid",
        "level",
        "parent_ptes",
        "quadrant",
        "role",
        "root_count",
        "serial",
        "slot_bitmap",
        "spt",
        "unsync",
        "unsync_child_bitmap",
        "unsync_children",
    )

    def __init__(self, serial: int, gfn: int, role: int) -> None:
        self.serial = serial
        self.hpa = SHADOW_PAGE_BASE + (serial << 12)
        self.gfn = gfn
        self.role = role
        self.level = role & ROLE_LEVEL_MASK
        self.quadrant = (role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT
        self.direct = role & ROLE_DIRECT != 0
        self.access = (role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT
        self.cr4_pae = role & ROLE_CR4_PAE != 0
        self.invalid = False
        self.spt: dict[int, int] = {}
        self.gfns: dict[int, int] = {}
        self.slot_bitmap = 0
        self.unsync = False
        self.unsync_children = 0
        self.unsync_child_bitmap: set[int] = set()
        self.root_count = 0
        self.parent_ptes: PteList = 0

    def mark_invalid(self) -> None:
        """Set role.invalid: the page is zapped, nobody may find it any more."""
        self.role |= ROLE_INVALID
        self.invalid = True

    def get_gfn(self, index: int) -> int:
        """The guest frame of leaf entry `index` (kvm_mmu_page_get_gfn)."""
        if self.direct:
            return self.gfn + (index << (9 * (self.level - 1)))
        return self.gfns.get(index, 0)

    def __repr__(self) -> str:
        kind = "direct" if self.direct else "indirect"
        return f"<ShadowPage {self.serial} {kind} gfn={self.gfn} level={self.level} root_count={self.root_count}>"


def sptep_page(sptep: int) -> int:
    """The address of the shadow page that holds the entry at address `sptep`."""
    return sptep & SPTEP_PAGE_MASK


def sptep_index(sptep: int) -> int:
    """The index of the entry at address `sptep` in its page."""
    return (sptep & 0xFFF) >> 3
