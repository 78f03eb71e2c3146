"""Guest frames without memory: the per-vCPU cache of the last one, and faults on their shadow entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PAGE_MASK
from shadowmmu.kvm.shadow_walk import walk_shadow_page

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = [
    "handle_mmio_page_fault",
    "vcpu_cache_mmio_info",
    "vcpu_clear_mmio_info",
    "vcpu_match_mmio_gfn",
    "vcpu_match_mmio_gva",
]


def vcpu_cache_mmio_info(vcpu: Vcpu, gva: int, gfn: int, access: int) -> None:
    """Remember that the page of `gva` is guest frame `gfn`, without memory, with these rights (ACC_*)."""
    vcpu.mmio_gva = gva & PAGE_MASK
    vcpu.mmio_gfn = gfn
    vcpu.mmio_access = access
    vcpu.mmio_generation = vcpu.kvm.memslots_generation


def vcpu_clear_mmio_info(vcpu: Vcpu, gva: int | None = None) -> None:
    """Forget the address in the cache, if it is that of `gva` (None: whatever it is); the frame stays."""
    if gva is None or vcpu.mmio_gva == gva & PAGE_MASK:
        vcpu.mmio_gva = 0


def _outdated(vcpu: Vcpu) -> bool:
    """Whether the cache is of memory slots that have changed.

    Bug A12 (stale-mmio-cache): 3.1 does not ask, and takes a frame for MMIO that has memory by now.
    """
    kvm = vcpu.kvm
    return kvm.profile.stale_mmio_cache and vcpu.mmio_generation != kvm.memslots_generation


def vcpu_match_mmio_gva(vcpu: Vcpu, gva: int) -> bool:
    """Whether the cache is for the page of this address."""
    return vcpu.mmio_gva != 0 and vcpu.mmio_gva == gva & PAGE_MASK and not _outdated(vcpu)


def vcpu_match_mmio_gfn(vcpu: Vcpu, gfn: int) -> bool:
    """Whether the cache is for this guest frame."""
    return vcpu.mmio_gfn != 0 and vcpu.mmio_gfn == gfn and not _outdated(vcpu)


def handle_mmio_page_fault(vcpu: Vcpu, address: int, direct: bool) -> int:
    """A fault because of reserved bits in a shadow entry; returns 1 (emulate) or 0 (retry).

    The cache or the entry says it is MMIO: emulate. Otherwise another vCPU has changed the entry meanwhile: retry.
    In a `direct` map the address is the guest physical one. Takes no lock and changes only the cache.
    """
    if direct:
        if vcpu_match_mmio_gfn(vcpu, address >> 12):
            return 1
    elif vcpu_match_mmio_gva(vcpu, address):
        return 1
    spte = walk_shadow_page(vcpu, address)[-1:]
    fmt = vcpu.kvm.spte_format
    if spte and fmt.is_mmio(spte[0]):
        gva, gfn, access = 0 if direct else address, fmt.mmio_gfn(spte[0]), fmt.mmio_access(spte[0])
        if vcpu.kvm.tracepoints is not None:
            vcpu.kvm.tracepoints.handle_mmio_page_fault(vcpu.vcpu_id, gva, gfn, access)
        vcpu_cache_mmio_info(vcpu, gva, gfn, access)
        return 1
    return 0
