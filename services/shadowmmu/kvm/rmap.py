"""Reverse maps: which shadow entries map a guest frame; and dropping and write-protecting entries through them.

All under mmu_lock. A reverse map belongs to a slot and a level: level 1 per frame, levels 2 and 3 per block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_list import pte_list_add, pte_list_entries, pte_list_first, pte_list_remove
from shadowmmu.kvm.spte_update import mmu_spte_update
from shadowmmu.protocol.events import AuditFailed

if TYPE_CHECKING:
    from shadowmmu.kvm.memslots import KvmMemorySlot
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "drop_parent_pte",
    "drop_spte",
    "has_wrprotected_page",
    "kvm_unmap_rmapp",
    "rmap_add",
    "rmap_write_protect",
]


def rmap_add(slot: KvmMemorySlot, gfn: int, level: int, sptep: int) -> int:
    """Note that the entry at `sptep` maps `gfn`; returns the kernel's count of entries before it."""
    rmap = slot.rmap[level]
    block = gfn >> (9 * (level - 1))
    old = rmap.get(block)
    if old is None:
        rmap[block] = sptep
        return 0
    rmap[block], count = pte_list_add(old, sptep)
    return count


def rmap_remove(kvm: Kvm, sp: ShadowPage, index: int) -> None:
    """Take the entry out of the reverse map of the frame that the page records for it."""
    gfn = sp.gfn + (index << (9 * (sp.level - 1))) if sp.direct else sp.gfns[index]
    kvm.work.rmap_entries += 1
    slot = kvm.gfn_to_memslot(gfn)
    if slot is None:
        _rmap_lost(kvm, sp, index, f"frame {gfn}, which is in no slot")
        return
    rmap = slot.rmap[sp.level]
    block = gfn >> (9 * (sp.level - 1))
    try:
        rest = pte_list_remove(rmap.get(block, 0), sp.hpa + (index << 3))
    except ValueError:
        _rmap_lost(kvm, sp, index, f"frame {gfn}, whose reverse map does not have it")
        return
    if rest:
        rmap[block] = rest
    else:
        del rmap[block]


def _rmap_lost(kvm: Kvm, sp: ShadowPage, index: int, text: str) -> None:
    """What a memory slot that went or moved without its mappings leaves behind (bugs A14, B25), or a wrong page (A8).

    The kernel uses a null pointer here, or stops with BUG. Here the run is told, and goes on: the entry is taken out
    of whatever reverse map has it.
    """
    if kvm.trace is not None:
        kvm.trace(AuditFailed("rmap_remove", f"entry {index} of {sp!r} maps {text}: the kernel stops here"))
    sptep = sp.hpa + (index << 3)
    for slot in kvm.memslots:
        rmap = slot.rmap[sp.level]
        for block, sptes in list(rmap.items()):
            if sptep in pte_list_entries(sptes):
                rest = pte_list_remove(sptes, sptep)
                if rest:
                    rmap[block] = rest
                else:
                    del rmap[block]


def drop_spte(kvm: Kvm, sp: ShadowPage, index: int, seen: int | None = None) -> bool:
    """Clear a leaf entry (also an MMIO one) and forget it in the reverse map; returns whether it mapped something.

    The host is told of a dirty frame; if entries have no D bit, of each. With `seen` (a bug) the value before is not
    what was exchanged for 0, but what was read some time ago.
    """
    old = sp.spt.pop(index, 0)
    fmt = kvm.spte_format
    if old:
        kvm.work.sptes_dropped += 1
    if old & fmt.present_test == 1:
        if (old if seen is None else seen) & fmt.dirty_mask or not fmt.dirty_mask:
            kvm.host.set_pfn_dirty((old & PT64_BASE_ADDR_MASK) >> 12, sp.level)
        rmap_remove(kvm, sp, index)
        return True
    return False


def drop_parent_pte(child: ShadowPage, parent: ShadowPage, index: int) -> None:
    """Unlink `child` from entry `index` of `parent`. The parent's unsync bitmap is left as it is."""
    child.parent_ptes = pte_list_remove(child.parent_ptes, parent.hpa + (index << 3))
    parent.spt.pop(index, None)


def rmap_write_protect(kvm: Kvm, gfn: int) -> Operation[bool]:
    """Let no shadow entry map the guest frame writable; returns whether any did.

    Small entries lose W; writable large ones are dropped. Does not flush: the caller does, if anything changed.
    """
    slot = kvm.gfn_to_memslot(gfn)
    if slot is None:
        return False
    protected = False
    rmap = slot.rmap[1].get(gfn, 0)
    if rmap:
        page_header = kvm.page_header
        for sptep in pte_list_entries(rmap):
            kvm.work.rmap_entries += 1
            sp = page_header[sptep & ~0xFFF]
            index = (sptep & 0xFFF) >> 3
            spte = sp.spt[index]
            if spte & PT_WRITABLE_MASK:
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                exchange = kvm.profile.ad_bit_loss_update  # bug B20 without it
                mmu_spte_update(kvm, sp, index, spte, spte & ~PT_WRITABLE_MASK, exchange=exchange)
                protected = True
    for level in (2, 3):
        if slot.rmap[level]:
            block = gfn >> (9 * (level - 1))
            for sptep in list(pte_list_entries(slot.rmap[level].get(block, 0))):
                sp = kvm.page_header[sptep & ~0xFFF]
                index = (sptep & 0xFFF) >> 3
                if sp.spt[index] & PT_WRITABLE_MASK:
                    drop_spte(kvm, sp, index)
                    kvm.stat.lpages -= 1
                    protected = True
                    if not kvm.profile.wp_huge_iteration:  # bug B16: nothing follows what is gone
                        break
    return protected


def kvm_unmap_rmapp(kvm: Kvm, slot: KvmMemorySlot, level: int, block: int) -> Operation[bool]:
    """Drop every entry of one reverse map; returns whether there was one."""
    rmap = slot.rmap[level]
    if block not in rmap:
        return False
    while block in rmap:
        sptep = pte_list_first(rmap[block])
        sp, index = kvm.page_header[sptep & ~0xFFF], (sptep & 0xFFF) >> 3
        seen = None
        if kvm.point_spte_update and not kvm.profile.ad_bit_loss:  # bug B20: a load, and later a store
            seen = sp.spt[index]
            yield Point.SPTE_UPDATE
        drop_spte(kvm, sp, index, seen)
    return True


def has_wrprotected_page(kvm: Kvm, gfn: int, level: int) -> bool:
    """Whether the block of `level` (2 or 3) around `gfn` may not be one large page: it has shadowed tables in it."""
    slot = kvm.gfn_to_memslot(gfn)
    return slot is None or slot.write_count[level].get(gfn >> (9 * (level - 1)), 0) > 0
