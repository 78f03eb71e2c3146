"""Emulated stores to guest memory that the shadow does not know of yet.

The emulator stores, and only then does kvm_mmu_pte_write bring the shadow in line. A vCPU that has seen the store in
between and invalidates its translations (INVLPG, a write to a control register, a page fault) is owed what the new
entry says, but finds the shadow of a page in sync, which such an invalidation leaves alone. Not in the catalogue:
finding N1, docs/findings/emulated-store-window.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.effects import EmulatedStores, Operation

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["emulated_stores_settled"]


def emulated_stores_settled(kvm: Kvm) -> Operation[None]:
    """Wait until the shadow knows of every emulated store that is in memory now; without the fix nobody waits.

    A vCPU that makes another one meanwhile is waited for as well.
    """
    if not kvm.emulated_stores or not kvm.profile.emulated_store_window:
        return
    unsettled = set(kvm.emulated_stores)
    while not unsettled.isdisjoint(kvm.emulated_stores):
        yield EmulatedStores.BUSY
