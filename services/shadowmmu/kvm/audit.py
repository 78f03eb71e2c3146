"""mmu_audit: whether the MMU's structures agree with each other (mmu_audit.c of Linux 3.1, and a few of our own).

Reads only. Valid whenever mmu_lock is free. Each check is a generator of texts; an empty audit is a clean one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.notrap import SHADOW_NOTRAP_NONPRESENT_PTE
from shadowmmu.kvm.page import ShadowPage, sptep_index, sptep_page
from shadowmmu.kvm.pte_list import pte_list_entries
from shadowmmu.kvm.roots import root_pages

if TYPE_CHECKING:
    from shadowmmu.kvm.memslots import KvmMemorySlot
    from shadowmmu.kvm.vm import Kvm

__all__ = ["AUDIT_CHECKS", "AuditError", "mmu_audit"]


class AuditError(msgspec.Struct, frozen=True):
    """One finding: the name of the check, and what is wrong."""

    check: str
    text: str


def _leaves(kvm: Kvm, sp: ShadowPage) -> Iterator[tuple[int, int]]:
    """(index, entry) of the entries that map memory."""
    fmt = kvm.spte_format
    for index, spte in sp.spt.items():
        if fmt.is_shadow_present(spte) and (sp.level == 1 or spte & PT_PAGE_SIZE_MASK):
            yield index, spte


def _tables(kvm: Kvm, sp: ShadowPage) -> Iterator[tuple[int, int]]:
    """(index, entry) of the entries that lead to tables."""
    if sp.level > 1:
        for index, spte in sp.spt.items():
            if kvm.spte_format.is_shadow_present(spte) and not spte & PT_PAGE_SIZE_MASK:
                yield index, spte


def _where(sp: ShadowPage, index: int) -> str:
    return f"entry {index} of {sp!r}"


def audit_mappings(kvm: Kvm) -> Iterator[str]:
    """Each leaf maps the host frame that backs the guest frame recorded for it (audit_mappings).

    Not asked of a page that the host has just changed while its notifier is still at work.
    """
    for sp in kvm.active_mmu_pages.values():
        if sp.unsync and sp.level != 1:
            yield f"{sp!r} is unsync, but not of level 1"
        for index, spte in _leaves(kvm, sp):
            gfn = sp.get_gfn(index)
            slot = kvm.gfn_to_memslot(gfn)
            if slot is None:
                yield f"{_where(sp, index)} maps frame {gfn}, which is in no slot"
                continue
            if gfn + slot.hva_delta & slot.host_mask in kvm.host.in_change:
                continue
            pfn = kvm.host.atomic_pfn(slot, gfn)
            mapped = (spte & PT64_BASE_ADDR_MASK) >> 12
            if pfn not in (BAD_PFN, mapped):
                yield f"{_where(sp, index)} maps frame {gfn} to host frame {mapped}, which is {pfn} now"


def audit_sptes_have_rmaps(kvm: Kvm) -> Iterator[str]:
    """Each leaf is in the reverse map of its frame (audit_sptes_have_rmaps)."""
    listed = {
        (slot.id, level): {block: Counter(pte_list_entries(rmap)) for block, rmap in slot.rmap[level].items()}
        for slot in kvm.memslots
        for level in (1, 2, 3)
    }
    for sp in kvm.active_mmu_pages.values():
        for index, _ in _leaves(kvm, sp):
            gfn = sp.get_gfn(index)
            slot = kvm.gfn_to_memslot(gfn)
            if slot is None:
                continue
            rmap = listed[slot.id, sp.level].get(gfn >> (9 * (sp.level - 1)), Counter())
            if rmap[sp.hpa + 8 * index] != 1:
                yield f"{_where(sp, index)} is {rmap[sp.hpa + 8 * index]} times in the reverse map of frame {gfn}"


def _rmap_blocks(slot: KvmMemorySlot) -> Iterator[tuple[int, int, int]]:
    """(level, first frame of the block, address of an entry) of each reverse map entry."""
    for level in (1, 2, 3):
        for block, rmap in slot.rmap[level].items():
            for sptep in pte_list_entries(rmap):
                yield level, block << (9 * (level - 1)), sptep


def audit_rmap_entries(kvm: Kvm) -> Iterator[str]:
    """Each reverse map entry names a leaf of that level that maps that frame."""
    for slot in kvm.memslots:
        for level, gfn, sptep in _rmap_blocks(slot):
            sp = kvm.page_header.get(sptep_page(sptep))
            if sp is None:
                yield f"the reverse map of frame {gfn} names an entry of a page that is gone"
                continue
            index = sptep_index(sptep)
            spte = sp.spt.get(index, 0)
            if sp.level != level or not kvm.spte_format.is_shadow_present(spte):
                yield f"the reverse map of frame {gfn}, level {level}, names {_where(sp, index)}, which maps nothing"
            elif sp.get_gfn(index) & -kvm_pages_per_hpage(level) != gfn:
                yield f"the reverse map of frame {gfn} names {_where(sp, index)}, which maps {sp.get_gfn(index)}"


def audit_write_protection(kvm: Kvm) -> Iterator[str]:
    """No entry maps the table of an indirect page in sync writable (audit_write_protection)."""
    for sp in kvm.active_mmu_pages.values():
        if sp.direct or sp.unsync or sp.invalid:
            continue
        slot = kvm.gfn_to_memslot(sp.gfn)
        if slot is None:
            continue
        for level in (1, 2, 3):
            for sptep in pte_list_entries(slot.rmap[level].get(sp.gfn >> (9 * (level - 1)), 0)):
                page = kvm.page_header.get(sptep_page(sptep))
                if page is not None and page.spt.get(sptep_index(sptep), 0) & PT_WRITABLE_MASK:
                    yield f"{_where(page, sptep_index(sptep))} maps the table of {sp!r}, in sync, writable"


def audit_parents(kvm: Kvm) -> Iterator[str]:
    """A page's parents are exactly the entries that lead to it."""
    expected: dict[int, Counter[int]] = {}
    for sp in kvm.active_mmu_pages.values():
        for index, spte in _tables(kvm, sp):
            child = spte & PT64_BASE_ADDR_MASK
            if child not in kvm.page_header:
                yield f"{_where(sp, index)} leads to a page that is gone"
            expected.setdefault(child, Counter())[sp.hpa + 8 * index] += 1
    for sp in kvm.active_mmu_pages.values():
        if Counter(pte_list_entries(sp.parent_ptes)) != expected.get(sp.hpa, Counter()):
            yield f"the parents of {sp!r} are not the entries that lead to it"


def audit_unsync(kvm: Kvm) -> Iterator[str]:
    """Counters of unsync children agree with their bits, and every unsync page is marked in all pages above it."""
    unsync = 0
    for sp in kvm.active_mmu_pages.values():
        if sp.unsync_children != len(sp.unsync_child_bitmap):
            yield f"{sp!r} counts {sp.unsync_children} unsync children, with {len(sp.unsync_child_bitmap)} bits set"
        if not sp.unsync and not sp.unsync_children:
            continue
        unsync += sp.unsync
        for sptep in pte_list_entries(sp.parent_ptes):
            parent = kvm.page_header.get(sptep_page(sptep))
            if parent is not None and sptep_index(sptep) not in parent.unsync_child_bitmap:
                yield f"{_where(parent, sptep_index(sptep))} leads to unsync pages, and is not marked"
    if unsync != kvm.stat.mmu_unsync:
        yield f"{unsync} pages are unsync, mmu_unsync says {kvm.stat.mmu_unsync}"


def audit_roots(kvm: Kvm) -> Iterator[str]:
    """root_count is the number of vCPUs' roots that a page is, or is about to be.

    A load that failed can leave counts behind that nobody gives back (bug A16).
    """
    used = Counter(
        sp.hpa for vcpu in kvm.vcpus for sp in root_pages(vcpu) + vcpu.mmu.loading_roots if sp is not None
    )
    for sp in kvm.active_mmu_pages.values():
        if sp.root_count != used[sp.hpa]:
            yield f"{sp!r} is the root of {used[sp.hpa]} vCPUs"
    for hpa in used:
        if hpa not in kvm.active_mmu_pages:
            yield f"a vCPU's root at {hpa:#x} is gone"


def audit_notrap(kvm: Kvm) -> Iterator[str]:
    """Entries that let faults go to the guest stand only in pages in sync that follow a guest table.

    (The rules of mmu_audit.c before "remove bypass_guest_pf".)
    """
    for sp in kvm.active_mmu_pages.values():
        notrap = [index for index, spte in sp.spt.items() if spte == SHADOW_NOTRAP_NONPRESENT_PTE]
        if not notrap:
            continue
        if not kvm.bypass_guest_pf:
            yield f"{_where(sp, notrap[0])} is notrap, without bypass_guest_pf"
        if sp.unsync:
            yield f"{_where(sp, notrap[0])} is notrap in an unsync page"
        if sp.direct:
            yield f"{_where(sp, notrap[0])} is notrap in a direct page"


def audit_write_count(kvm: Kvm) -> Iterator[str]:
    """Write counts are the numbers of shadowed tables in each block, plus one for incomplete blocks."""
    tables = [sp.gfn for sp in kvm.active_mmu_pages.values() if not sp.direct and not sp.invalid]
    if len(tables) != kvm.indirect_shadow_pages:
        yield f"{len(tables)} valid indirect pages, indirect_shadow_pages says {kvm.indirect_shadow_pages}"
    for slot in kvm.memslots:
        for level in (2, 3):
            shift = 9 * (level - 1)
            mask = kvm_pages_per_hpage(level) - 1
            expected = Counter(gfn >> shift for gfn in tables if gfn in slot)
            for block in {end >> shift for end in (slot.base_gfn, slot.end_gfn) if end & mask}:
                expected[block] += 1
            if expected != Counter(slot.write_count[level]):
                yield f"write counts of slot {slot.id}, level {level}, do not match the shadowed tables"


def audit_page_lists(kvm: Kvm) -> Iterator[str]:
    """The list of pages in use, the hash, the count and the look-up by address hold the same pages."""
    active = set(kvm.active_mmu_pages)
    if kvm.n_used_mmu_pages != len(active):
        yield f"{len(active)} pages in use, n_used_mmu_pages says {kvm.n_used_mmu_pages}"
    if active != set(kvm.page_header):
        yield "the look-up by address does not hold exactly the pages in use"
    if active != {sp.hpa for pages in kvm.mmu_page_hash.values() for sp in pages}:
        yield "the hash does not hold exactly the pages in use"


AUDIT_CHECKS: Final[dict[str, Callable[[Kvm], Iterator[str]]]] = {
    check.__name__.removeprefix("audit_"): check
    for check in (
        audit_mappings,
        audit_sptes_have_rmaps,
        audit_rmap_entries,
        audit_write_protection,
        audit_parents,
        audit_unsync,
        audit_roots,
        audit_notrap,
        audit_write_count,
        audit_page_lists,
    )
}
"""The checks by name."""


def mmu_audit(kvm: Kvm) -> list[AuditError]:
    """Every finding of every check. Only to be called while mmu_lock is free."""
    return [AuditError(name, text) for name, check in AUDIT_CHECKS.items() for text in check(kvm)]
