"""The state of the model in the form that recordings have it (FORMAT.md section 7)."""

from __future__ import annotations

from typing import Any

from shadowmmu.conform.recording import canonical_json
from shadowmmu.cpu.x86 import (
    PT64_BASE_ADDR_MASK,
    PT_PAGE_SIZE_MASK,
    PT_WRITABLE_MASK,
)
from shadowmmu.kvm import Kvm, ShadowPage, Vcpu, root_pages
from shadowmmu.kvm.page import sptep_index, sptep_page
from shadowmmu.kvm.pte_list import pte_list_len
from shadowmmu.kvm.role import role_text
from shadowmmu.kvm.spte import SPTE_HOST_WRITEABLE

__all__ = ["leaf_flags", "lru", "state"]

Json = Any


def page_id(sp: ShadowPage) -> str:
    """The name of a shadow page: its guest frame and the fields of its role."""
    return f"{sp.gfn}:{role_text(sp.role)}"


def leaf_flags(kvm: Kvm, spte: int, level: int) -> str:
    """The letters of a leaf entry; where the format has no such bit, there is no letter."""
    fmt = kvm.spte_format
    executable = spte & fmt.x_mask if fmt.x_mask else not spte & fmt.nx_mask
    return "".join(
        letter
        for letter, holds in (
            ("w", spte & PT_WRITABLE_MASK),
            ("u", spte & fmt.user_mask),
            ("x", executable),
            ("a", spte & fmt.accessed_mask),
            ("d", spte & fmt.dirty_mask),
            ("h", spte & SPTE_HOST_WRITEABLE),
            ("s", level > 1 and spte & PT_PAGE_SIZE_MASK),
        )
        if holds
    )


def _entry(kvm: Kvm, sp: ShadowPage, index: int, spte: int) -> list[Json]:
    fmt = kvm.spte_format
    if fmt.is_mmio(spte):
        return [index, "m", fmt.mmio_gfn(spte), fmt.mmio_access(spte)]
    if sp.level > 1 and not spte & PT_PAGE_SIZE_MASK:
        return [index, "t", page_id(kvm.child(spte))]
    pfn = (spte & PT64_BASE_ADDR_MASK) >> 12
    return [index, "l", pfn, leaf_flags(kvm, spte, sp.level), sp.get_gfn(index)]


def _runs(indices: list[int]) -> list[list[int]]:
    """Sorted indices as [first, count] of runs."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([index, 1])
    return runs


def _page(kvm: Kvm, sp: ShadowPage) -> dict[str, Json]:
    page: dict[str, Json] = {
        "id": page_id(sp),
        "root_count": sp.root_count,
        "unsync": int(sp.unsync),
        "unsync_children": sp.unsync_children,
        "unsync_bitmap": sorted(sp.unsync_child_bitmap),
        "parents": pte_list_len(sp.parent_ptes),
        "slots": [i for i in range(sp.slot_bitmap.bit_length()) if sp.slot_bitmap >> i & 1],
        "spt": [_entry(kvm, sp, index, spte) for index, spte in sorted(sp.spt.items()) if spte],
    }
    if kvm.bypass_guest_pf:
        page["notrap"] = _runs(sorted(index for index, spte in sp.spt.items() if not spte))
    return page


def _page_order(page: dict[str, Json]) -> tuple[list[int], int, str]:
    return [int(number) for number in page["id"].split(":")], page["root_count"], canonical_json(page)


def _vcpu(kvm: Kvm, vcpu: Vcpu) -> dict[str, Json]:
    last = vcpu.last_pte_updated
    return {
        "roots": [None if sp is None else page_id(sp) for sp in root_pages(vcpu)] or None,
        "requests": vcpu.request_names(),
        "last_pt_write": [vcpu.last_pt_write_gfn, vcpu.last_pt_write_count],
        "last_pte_updated": [page_id(kvm.page_header[sptep_page(last)]), sptep_index(last)] if last else None,
        "last_pte_gfn": vcpu.last_pte_gfn,
        "mmio": [vcpu.mmio_gva, vcpu.mmio_gfn, vcpu.mmio_access],
        "pdptrs": list(vcpu.pdptrs),
    }


def state(kvm: Kvm) -> dict[str, Json]:
    """The whole state. Only to be taken when no operation is in flight."""
    return {
        "sps": sorted((_page(kvm, sp) for sp in kvm.active_mmu_pages.values()), key=_page_order),
        "rmap": sorted(
            [level, block << (9 * (level - 1)), pte_list_len(rmap)]
            for slot in kvm.memslots
            for level in (1, 2, 3)
            for block, rmap in slot.rmap[level].items()
        ),
        "write_count": sorted(
            [slot.id, level, block << (9 * (level - 1)), count]
            for slot in kvm.memslots
            for level in (2, 3)
            for block, count in slot.write_count[level].items()
        ),
        "dirty": [
            [slot.id, sorted(slot.dirty_bitmap)]
            for slot in sorted(kvm.memslots, key=lambda s: s.id)
            if slot.dirty_bitmap is not None
        ],
        "host": [list(frame) for frame in kvm.host.deviations()],
        "vcpus": [_vcpu(kvm, vcpu) for vcpu in kvm.vcpus],
        "used": kvm.n_used_mmu_pages,
        "max": kvm.n_max_mmu_pages,
        "indirect": kvm.indirect_shadow_pages,
        "tlbs_dirty": kvm.tlbs_dirty,
        "invlpg_counter": kvm.invlpg_counter,
        "notifier_seq": kvm.mmu_notifier_seq,
    }


def lru(kvm: Kvm) -> list[str]:
    """All shadow pages, oldest first: the order in which they are recycled."""
    return [page_id(sp) for sp in kvm.active_mmu_pages.values()]
