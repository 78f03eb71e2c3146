"""Walking the shadow tables as KVM does (kvm_shadow_walk_iterator)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import (
    PT32E_ROOT_LEVEL,
    PT64_BASE_ADDR_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
)
from shadowmmu.kvm.constants import INVALID_PAGE

if TYPE_CHECKING:
    from shadowmmu.kvm.page import ShadowPage
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["shadow_walk_init", "walk_shadow_page"]


def shadow_walk_init(vcpu: Vcpu, address: int) -> tuple[ShadowPage | None, int]:
    """The first table of a walk for `address` and its level; (None, 0) if there is none (no root, absent PAE root)."""
    mmu = vcpu.mmu
    level = mmu.shadow_root_level
    root = mmu.root_hpa
    if root == INVALID_PAGE:
        return None, 0
    if level == PT32E_ROOT_LEVEL:
        root = mmu.pae_root[(address >> 30) & 3] & PT64_BASE_ADDR_MASK
        level -= 1
        if not root:
            return None, 0
    return vcpu.kvm.page_header[root], level


def walk_shadow_page(vcpu: Vcpu, address: int) -> list[int]:
    """The shadow entries that a walk for `address` meets, from the root, up to the first that leads no further.

    The kernel does this without mmu_lock; here it is one step (no lockless walk is in flight while pages are freed).
    """
    kvm = vcpu.kvm
    present_test = kvm.spte_format.present_test
    sp, level = shadow_walk_init(vcpu, address)
    sptes = []
    while sp is not None:
        spte = sp.spt.get((address >> (12 + 9 * (level - 1))) & 511, 0)
        sptes.append(spte)
        if spte & present_test != PT_PRESENT_MASK or level == 1 or spte & PT_PAGE_SIZE_MASK:
            break
        sp = kvm.page_header[spte & PT64_BASE_ADDR_MASK]
        level -= 1
    return sptes


def kvm_mmu_get_spte_hierarchy(vcpu: Vcpu, address: int) -> list[int]:
    """The shadow entries of an address from the root down (kvm_mmu_get_spte_hierarchy); reads only."""
    return walk_shadow_page(vcpu, address)
