"""Out-of-sync pages: marking them, and collecting those below a page.

A shadow page of level 1 whose guest table may be written without an exit is *unsync*. Every page above it counts the
children through which an unsync page may be reached (`unsync_children`, one bit each), so that finding them is
cheap. Bits can be stale; a walk cleans them up. All under mmu_lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT64_ROOT_LEVEL, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.constants import KVM_PAGE_ARRAY_NR
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.notrap import mmu_convert_notrap
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_list import pte_list_entries
from shadowmmu.protocol.events import ShadowPageSynced, ShadowPageUnsynced

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "PagePath",
    "kvm_mmu_mark_parents_unsync",
    "kvm_unlink_unsync_page",
    "mmu_need_write_protect",
    "mmu_unsync_walk",
    "unsync_late",
]

FULL: Final = -1
"""The walk's array is full (the kernel's -ENOSPC)."""


def kvm_mmu_mark_parents_unsync(kvm: Kvm, sp: ShadowPage) -> None:
    """Tell all pages above that there is an unsync page below."""
    for sptep in pte_list_entries(sp.parent_ptes):
        parent = kvm.page_header.get(sptep & ~0xFFF)
        if parent is None:  # bug B26: a parent that was never linked is gone
            continue
        index = (sptep & 0xFFF) >> 3
        if index in parent.unsync_child_bitmap:
            continue
        parent.unsync_child_bitmap.add(index)
        parent.unsync_children += 1
        if parent.unsync_children == 1:
            kvm_mmu_mark_parents_unsync(kvm, parent)


def kvm_unsync_page(kvm: Kvm, sp: ShadowPage) -> None:
    """Let the guest write the table of `sp` from now on."""
    stat = kvm.stat
    kvm.work.pages_unsynced += 1
    stat.mmu_unsync += 1
    stat.mmu_unsync_highest = max(stat.mmu_unsync_highest, stat.mmu_unsync)
    sp.unsync = True
    if kvm.trace is not None:
        kvm.trace(ShadowPageUnsynced(sp.serial, sp.gfn))
    kvm_mmu_mark_parents_unsync(kvm, sp)
    if kvm.bypass_guest_pf:
        mmu_convert_notrap(kvm, sp)


def kvm_unlink_unsync_page(kvm: Kvm, sp: ShadowPage, zapped: bool = False) -> None:
    """`sp` is in sync again (or goes away: `zapped`); parents' bits are cleared by the caller or become stale."""
    sp.unsync = False
    kvm.stat.mmu_unsync -= 1
    if kvm.trace is not None and not zapped:
        kvm.trace(ShadowPageSynced(sp.serial, sp.gfn))


def mmu_need_write_protect(kvm: Kvm, gfn: int, can_unsync: bool) -> bool:
    """Whether a mapping of `gfn` must be read-only because the frame is a shadowed guest table.

    If it is shadowed at level 1 only and `can_unsync`, its shadow pages become unsync instead.
    """
    to_unsync = []
    for sp in reversed(kvm.mmu_page_hash.get(gfn, ())):
        if sp.direct or sp.invalid:
            continue
        # Bug B3 (writable-sync-sp): a table that is unsync just now, though it is about to be in sync.
        if sp.level != 1 or (not can_unsync and (kvm.profile.writable_sync_sp or not sp.unsync)):
            return True
        if not sp.unsync:
            if not kvm.config.oos_shadow:
                return True
            to_unsync.append(sp)
    if not kvm.profile.lockless_sync_roots:
        kvm.late_unsync += to_unsync  # bug C2: the caller's caller does it, after the entry is writable
        return False
    for sp in to_unsync:
        kvm_unsync_page(kvm, sp)
    return False


def unsync_late(kvm: Kvm) -> Operation[None]:
    """Mark the pages unsync whose tables an entry maps writable by now (only with bug C2)."""
    yield Point.UNSYNC_LATE
    for sp in kvm.late_unsync:
        kvm_unsync_page(kvm, sp)
    kvm.late_unsync.clear()


class PagePath:
    """The pages found by a walk, and the way down to the one at hand (struct kvm_mmu_pages, mmu_page_path)."""

    __slots__ = ("_idx", "_parent", "pages")

    def __init__(self, root: ShadowPage) -> None:
        self._parent: list[ShadowPage | None] = [None] * PT64_ROOT_LEVEL
        self._idx = [0] * PT64_ROOT_LEVEL
        self.pages: list[tuple[ShadowPage, int]] = []
        self.restart(root)

    def restart(self, root: ShadowPage) -> None:
        """Forget the pages, before the next walk (kvm_mmu_pages_init)."""
        self._parent[root.level - 1] = None
        self.pages = []

    def add(self, sp: ShadowPage, index: int) -> bool:
        """Note a page; an unsync one only once. Returns whether the array is full now (mmu_pages_add)."""
        if sp.unsync and any(page is sp for page, _ in self.pages):
            return False
        self.pages.append((sp, index))
        return len(self.pages) == KVM_PAGE_ARRAY_NR

    def leaves(self) -> Iterator[ShadowPage]:
        """The unsync pages found, with the path set to each in turn (for_each_sp)."""
        for sp, index in self.pages:
            if sp.level == 1:
                self._idx[0] = index
                yield sp
            else:
                self._parent[sp.level - 2] = sp
                self._idx[sp.level - 1] = index

    def clear_parents(self) -> None:
        """The page at hand is in sync: it counts no longer in the pages above it (mmu_pages_clear_parents)."""
        for level in range(PT64_ROOT_LEVEL - 1):
            parent = self._parent[level]
            if parent is None:
                return
            parent.unsync_children -= 1
            parent.unsync_child_bitmap.discard(self._idx[level])
            if parent.unsync_children:
                return


def mmu_unsync_walk(kvm: Kvm, sp: ShadowPage, path: PagePath) -> bool:
    """Collect unsync pages below `sp` into `path`, as many as fit; returns whether there were any (or no room)."""
    if not sp.unsync_children:
        return False
    path.add(sp, 0)
    return _unsync_walk(kvm, sp, path) != 0


def _unsync_walk(kvm: Kvm, sp: ShadowPage, path: PagePath) -> int:
    """The number of unsync pages found below `sp`, or FULL."""
    present_test = kvm.spte_format.present_test
    leaves = 0
    for index in sorted(sp.unsync_child_bitmap):
        spte = sp.spt.get(index, 0)
        found = 0
        if spte & present_test == PT_PRESENT_MASK and not spte & PT_PAGE_SIZE_MASK:
            child = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
            if child.unsync_children:
                if path.add(child, index):
                    return FULL
                found = _unsync_walk(kvm, child, path)
                if found == FULL:
                    return FULL
            elif child.unsync:
                found = 1
                if path.add(child, index):
                    return FULL
        if found:
            leaves += found
        else:
            sp.unsync_child_bitmap.discard(index)
            sp.unsync_children -= 1
    return leaves
