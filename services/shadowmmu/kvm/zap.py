"""Taking shadow pages away: zap, commit, recycle, shrink, limit. Under mmu_lock unless a function takes it.

Zapping has two halves. prepare_zap unlinks a page from everything and puts it on a list; commit flushes all TLBs once
and then frees the pages on the list. A root in use cannot be freed: it is emptied, marked invalid, and every vCPU is
asked to load its root anew.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.constants import KVM_MIN_ALLOC_MMU_PAGES, KVM_MIN_FREE_MMU_PAGES, KVM_REFILL_PAGES
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pte_list import pte_list_first, pte_list_remove
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_reload_remote_mmus
from shadowmmu.kvm.rmap import drop_parent_pte, drop_spte
from shadowmmu.kvm.unsync import PagePath, kvm_unlink_unsync_page, mmu_unsync_walk
from shadowmmu.protocol.events import AuditFailed, ShadowPageZapped

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "account_shadowed",
    "kvm_mmu_change_mmu_pages",
    "kvm_mmu_commit_zap_page",
    "kvm_mmu_free_some_pages",
    "kvm_mmu_prepare_zap_page",
    "kvm_mmu_zap_all",
    "mmu_page_zap_pte",
    "mmu_shrink",
]


def account_shadowed(kvm: Kvm, gfn: int, change: int) -> None:
    """A table in `gfn` begins (1) or ceases (-1) to be shadowed: large pages around it are forbidden meanwhile."""
    slot = kvm.gfn_to_memslot(gfn)
    if slot is not None:
        for level in (2, 3):
            counts = slot.write_count[level]
            block = gfn >> (9 * (level - 1))
            count = counts.get(block, 0) + change
            if count:
                counts[block] = count
            else:
                del counts[block]
    kvm.indirect_shadow_pages += change


def mmu_page_zap_pte(kvm: Kvm, sp: ShadowPage, index: int) -> None:
    """Clear an entry, whatever it is. `lpages` goes down if bit 7 was set (sloppy, as the kernel's)."""
    spte = sp.spt.get(index, 0)
    if (
        spte & kvm.spte_format.present_test == PT_PRESENT_MASK
        and sp.level > 1
        and not spte & PT_PAGE_SIZE_MASK
    ):
        drop_parent_pte(kvm.page_header[spte & PT64_BASE_ADDR_MASK], sp, index)
        return
    drop_spte(kvm, sp, index)
    if spte & PT_PAGE_SIZE_MASK:
        kvm.stat.lpages -= 1


def _parent_lost(kvm: Kvm, sp: ShadowPage, sptep: int) -> None:
    """A parent that was never linked was never unlinked either, and its page is gone (bug B26).

    The kernel writes to whatever has the memory now. Here the run is told, and goes on.
    """
    if kvm.trace is not None:
        text = f"{sp!r} has a parent entry in a page that is gone: the kernel writes to freed memory here"
        kvm.trace(AuditFailed("kvm_mmu_unlink_parents", text))
    sp.parent_ptes = pte_list_remove(sp.parent_ptes, sptep)


def kvm_mmu_prepare_zap_page(kvm: Kvm, sp: ShadowPage, invalid_list: list[ShadowPage]) -> Operation[int]:
    """Unlink a page; returns how many pages went to `invalid_list`.

    That counts the unsync pages below, which are zapped too, and the page itself unless it is a root in use. Other
    children are only unlinked: they stay to be found again.
    """
    kvm.stat.mmu_shadow_zapped += 1
    if kvm.trace is not None:
        kvm.trace(ShadowPageZapped(sp.serial, sp.gfn, sp.root_count != 0))
    zapped = 0
    if sp.unsync_children and sp.level > 1:
        zapped = yield from mmu_zap_unsync_children(kvm, sp, invalid_list)
    for index in [index for index, spte in sp.spt.items() if spte]:
        mmu_page_zap_pte(kvm, sp, index)
    sp.spt.clear()
    while sp.parent_ptes:
        sptep = pte_list_first(sp.parent_ptes)
        parent = kvm.page_header.get(sptep & ~0xFFF)
        if parent is None:
            _parent_lost(kvm, sp, sptep)
        else:
            drop_parent_pte(sp, parent, (sptep & 0xFFF) >> 3)
    if not sp.invalid and not sp.direct:
        account_shadowed(kvm, sp.gfn, -1)
    if sp.unsync:
        kvm_unlink_unsync_page(kvm, sp, zapped=True)
    if not sp.root_count:
        zapped += 1
        del kvm.active_mmu_pages[sp.hpa]
        invalid_list.append(sp)
        kvm.n_used_mmu_pages -= 1
    else:
        kvm.active_mmu_pages.move_to_end(sp.hpa)
        yield from kvm_reload_remote_mmus(kvm)
    sp.mark_invalid()
    for vcpu in kvm.vcpus:
        vcpu.last_pte_updated = 0
    return zapped


def mmu_zap_unsync_children(kvm: Kvm, parent: ShadowPage, invalid_list: list[ShadowPage]) -> Operation[int]:
    """Zap every unsync page below `parent`; returns how many."""
    path = PagePath(parent)
    zapped = 0
    while mmu_unsync_walk(kvm, parent, path):
        for sp in path.leaves():
            yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
            path.clear_parents()
            zapped += 1
        path.restart(parent)
    return zapped


def kvm_mmu_commit_zap_page(kvm: Kvm, invalid_list: list[ShadowPage]) -> Operation[None]:
    """Flush all TLBs and free the pages of `invalid_list`, if there are any."""
    if not invalid_list:
        return
    yield from kvm_flush_remote_tlbs(kvm)
    for sp in invalid_list:
        pages = kvm.mmu_page_hash[sp.gfn]
        pages.remove(sp)
        if not pages:
            del kvm.mmu_page_hash[sp.gfn]
        del kvm.page_header[sp.hpa]
    invalid_list.clear()


def _available_pages(kvm: Kvm) -> int:
    """Shadow pages that may still be made; unsigned, so huge if more are in use than allowed."""
    return (kvm.n_max_mmu_pages - kvm.n_used_mmu_pages) & 0xFFFFFFFF


def _oldest(kvm: Kvm) -> ShadowPage:
    return next(iter(kvm.active_mmu_pages.values()))


def kvm_mmu_free_some_pages(kvm: Kvm) -> Operation[None]:
    """Recycle the oldest pages if fewer than 5 are free. A root in use counts as recycled but only moves."""
    if _available_pages(kvm) >= KVM_MIN_FREE_MMU_PAGES:
        return
    invalid_list: list[ShadowPage] = []
    while _available_pages(kvm) < KVM_REFILL_PAGES and kvm.active_mmu_pages:
        yield from kvm_mmu_prepare_zap_page(kvm, _oldest(kvm), invalid_list)
        kvm.stat.mmu_recycled += 1
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)


def kvm_mmu_zap_all(kvm: Kvm) -> Operation[None]:
    """Drop every shadow page, newest first. Takes mmu_lock.

    The scan starts again after each page that went; a root in use that it passes is zapped again each time.
    """
    yield MmuLock.ACQUIRE
    invalid_list: list[ShadowPage] = []
    position = 0
    while sp := next(islice(reversed(kvm.active_mmu_pages.values()), position, None), None):
        # A root in use moves to the head, so the next page to look at is still one place further on.
        zapped = yield from kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
        position = 0 if zapped else position + 1
    yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
    yield MmuLock.RELEASE


def kvm_mmu_change_mmu_pages(kvm: Kvm, goal: int) -> Operation[None]:
    """Set the limit on shadow pages (KVM_SET_NR_MMU_PAGES); at least 64. Takes mmu_lock.

    If more are in use the oldest go first, and the limit is then what is left, which can be less than `goal`.
    Raises ConfigError for a goal below the minimum.
    """
    if goal < KVM_MIN_ALLOC_MMU_PAGES:
        raise ConfigError(f"a limit of {goal} shadow pages is below {KVM_MIN_ALLOC_MMU_PAGES}")
    yield MmuLock.ACQUIRE
    if kvm.n_used_mmu_pages > goal:
        invalid_list: list[ShadowPage] = []
        while kvm.n_used_mmu_pages > goal and kvm.active_mmu_pages:
            yield from kvm_mmu_prepare_zap_page(kvm, _oldest(kvm), invalid_list)
        yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
        goal = kvm.n_used_mmu_pages
    kvm.n_max_mmu_pages = goal
    yield MmuLock.RELEASE


def mmu_shrink(kvm: Kvm, nr_to_scan: int) -> Operation[int]:
    """The memory shrinker: zap the oldest page if `nr_to_scan` > 0; returns shadow pages in use. Takes mmu_lock."""
    if nr_to_scan > 0:
        yield MmuLock.ACQUIRE
        if kvm.n_used_mmu_pages > 0:
            invalid_list: list[ShadowPage] = []
            yield from kvm_mmu_prepare_zap_page(kvm, _oldest(kvm), invalid_list)
            yield from kvm_mmu_commit_zap_page(kvm, invalid_list)
        yield MmuLock.RELEASE
    return kvm.n_used_mmu_pages
