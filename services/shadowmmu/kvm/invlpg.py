"""INVLPG: dropping the shadow entry of one address, if its table is unsync (FNAME(invlpg), kvm_mmu_invlpg)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.emulated_stores import emulated_stores_settled
from shadowmmu.kvm.mmio import vcpu_clear_mmio_info
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_write import kvm_mmu_pte_write
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_mmu_flush_tlb
from shadowmmu.kvm.rmap import drop_spte
from shadowmmu.kvm.shadow_walk import shadow_walk_init

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["kvm_mmu_invlpg", "paging_invlpg"]


def paging_invlpg(vcpu: Vcpu, gva: int) -> Operation[None]:
    """Drop the entry of `gva` in an unsync page and map what the guest's entry says now. Takes mmu_lock, twice.

    Pages in sync need nothing: write protection keeps them exact. `invlpg_counter` tells a kvm_mmu_pte_write at work
    that the value it has read may be old.
    """
    kvm = vcpu.kvm
    yield from emulated_stores_settled(kvm)
    fmt = kvm.spte_format
    vcpu_clear_mmio_info(vcpu, gva)
    yield Point.INVLPG_LOCK
    yield MmuLock.ACQUIRE
    pte_gpa = None
    need_flush = False
    gfmt = vcpu.mmu.fmt
    sp, level = shadow_walk_init(vcpu, gva)
    while sp is not None:
        index = gva >> (12 + 9 * (level - 1)) & 511
        spte = sp.spt.get(index, 0)
        if level == 1 or spte & PT_PAGE_SIZE_MASK:
            if sp.unsync:
                # A 32-bit guest table is shadowed by 2**level pages, each of which stands for a part of it.
                offset = sp.quadrant << (12 - level) if gfmt.has_quadrants else 0
                if not kvm.profile.quadrant_invlpg:  # bug B29
                    offset = 0
                pte_gpa = (sp.gfn << 12) + offset + index * gfmt.entry_size
                need_flush = drop_spte(kvm, sp, index)
            break
        if spte & fmt.present_test != PT_PRESENT_MASK or not sp.unsync_children:
            break
        sp = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        level -= 1
    if need_flush and kvm.profile.invlpg_noremote:  # bug B9 without it
        yield from kvm_flush_remote_tlbs(kvm)
    kvm.invlpg_counter += 1
    yield MmuLock.RELEASE
    if pte_gpa is not None:
        yield Point.INVLPG_UNLOCKED
        yield from kvm_mmu_pte_write(vcpu, pte_gpa, None, gfmt.entry_size, False)


def kvm_mmu_invlpg(vcpu: Vcpu, gva: int) -> Operation[None]:
    """An intercepted INVLPG of the guest."""
    yield from vcpu.mmu.context.invlpg(vcpu, gva)
    kvm_mmu_flush_tlb(vcpu)
    vcpu.kvm.stat.invlpg += 1
