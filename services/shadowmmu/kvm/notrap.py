"""bypass_guest_pf: shadow entries that let the processor give not-present faults straight to the guest.

Before "KVM: MMU: remove bypass_guest_pf" an entry that maps nothing is either *trap* (the processor exits) or *notrap*
(the guest's entry is not present, so the fault is the guest's own and needs no exit). In `spt` of a shadow page notrap
is a stored 0, and trap is what an index holds that is not stored. Notrap may stand only where every store to the
guest's table is intercepted: in pages that are in sync and follow a guest table. All under mmu_lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shadowmmu.cpu.x86 import PT64_ENT_PER_PAGE, PT_PRESENT_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.rmap import drop_spte

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["SHADOW_NOTRAP_NONPRESENT_PTE", "drop_invalid_gpte", "mmu_convert_notrap", "paging_prefetch_page"]

SHADOW_NOTRAP_NONPRESENT_PTE: Final = 0
CHUNK_BYTES: Final = 256
"""Guest entries are read in pieces of so many bytes."""


def drop_invalid_gpte(vcpu: Vcpu, sp: ShadowPage, index: int, gpte: int) -> bool:
    """Drop the entry of a guest entry that cannot be mapped (prefetch_invalid_gpte); returns whether it is notrap now.

    It is if the guest entry is not present, has no reserved bit set, and cannot change without our notice.
    """
    kvm = vcpu.kvm
    drop_spte(kvm, sp, index)
    if not kvm.bypass_guest_pf or sp.unsync or gpte & PT_PRESENT_MASK:
        return False
    if gpte & vcpu.mmu.rsvd_bits_mask[gpte >> 7 & 1][0]:
        return False
    sp.spt[index] = SHADOW_NOTRAP_NONPRESENT_PTE
    return True


def mmu_convert_notrap(kvm: Kvm, sp: ShadowPage) -> None:
    """The guest may change the table of `sp` unseen from now on: let every fault trap."""
    notrap = [index for index, spte in sp.spt.items() if spte == SHADOW_NOTRAP_NONPRESENT_PTE]
    for index in notrap:
        del sp.spt[index]
    kvm.notrap.converted += len(notrap)


def paging_prefetch_page(vcpu: Vcpu, sp: ShadowPage) -> Operation[None]:
    """Fill a new shadow page: notrap where the guest entry is not present (FNAME(prefetch_page)).

    Direct pages, and those of a two-level guest's directory (two entries for one of the guest's), only trap. So do
    entries whose guest entries cannot be read without sleeping.
    """
    kvm = vcpu.kvm
    fmt = vcpu.mmu.fmt
    if sp.direct or (fmt.has_quadrants and sp.level > 1):
        return
    slot = kvm.visible_memslot(sp.gfn)
    if slot is None:
        return
    words = slot.words if fmt.entry_size == 8 else slot.dwords
    first = (sp.gfn - slot.base_gfn << 12) // fmt.entry_size + (sp.quadrant << 9)
    step = CHUNK_BYTES // fmt.entry_size
    for start in range(0, PT64_ENT_PER_PAGE, step):
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        if sp.gfn + slot.hva_delta & slot.host_mask in kvm.host.absent:
            return
        gptes = words[first + start : first + start + step]
        notrap = [index for index, gpte in enumerate(gptes, start) if not gpte & PT_PRESENT_MASK]
        if kvm.point_gpte_read:
            yield Point.GPTE_READ
        sp.spt.update(dict.fromkeys(notrap, SHADOW_NOTRAP_NONPRESENT_PTE))
        kvm.notrap.prefetched += len(notrap)
