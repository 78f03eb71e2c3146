"""Dirty logging: which guest frames were written since the log was last read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu.x86 import PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, PT_WRITABLE_MASK
from shadowmmu.kvm.effects import MmuLock, Operation
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.rmap import drop_spte
from shadowmmu.protocol.events import DirtyLogRead

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_mmu_slot_remove_write_access", "kvm_vm_ioctl_get_dirty_log", "set_dirty_logging"]


def _slot(kvm: Kvm, slot_id: int) -> KvmMemorySlot:
    slot = kvm.memslot(slot_id)
    if slot is None:
        raise ConfigError(f"there is no memory slot {slot_id}")
    return slot


def kvm_mmu_slot_remove_write_access(kvm: Kvm, slot_id: int) -> Operation[None]:
    """Let no leaf of a page that ever mapped the slot be writable; always flushes all TLBs. Under mmu_lock.

    Leaves that map other slots lose write access too.
    """
    bit = 1 << slot_id
    present_test = kvm.spte_format.present_test
    for sp in reversed(kvm.active_mmu_pages.values()):
        if not sp.slot_bitmap & bit:
            continue
        for index, spte in list(sp.spt.items()):
            if spte & present_test != PT_PRESENT_MASK or not (sp.level == 1 or spte & PT_PAGE_SIZE_MASK):
                continue
            if spte & PT_PAGE_SIZE_MASK:
                drop_spte(kvm, sp, index)
                kvm.stat.lpages -= 1
            elif spte & PT_WRITABLE_MASK:
                old = sp.spt[index]
                if kvm.point_spte_update:
                    yield Point.SPTE_UPDATE
                sp.spt[index] = old & ~PT_WRITABLE_MASK
    yield from kvm_flush_remote_tlbs(kvm)


def _remove_write_access(kvm: Kvm, slot_id: int) -> Operation[None]:
    yield MmuLock.ACQUIRE
    yield from kvm_mmu_slot_remove_write_access(kvm, slot_id)
    yield MmuLock.RELEASE


def set_dirty_logging(kvm: Kvm, slot_id: int, enable: bool) -> Operation[None]:
    """Turn dirty logging of a slot on (with an empty log, unless it is on) or off. Takes mmu_lock.

    Raises ConfigError if there is no such slot; so does get_dirty_log.
    """
    slot = _slot(kvm, slot_id)
    if not enable:
        slot.dirty_bitmap = None
    elif slot.dirty_bitmap is None:
        slot.dirty_bitmap = set()
    yield Point.DIRTY_LOG_SWAPPED
    yield from _remove_write_access(kvm, slot_id)


def kvm_vm_ioctl_get_dirty_log(kvm: Kvm, slot_id: int) -> Operation[list[int] | None]:
    """The guest frames written since the last call, and start anew; None without logging. Takes mmu_lock.

    The bitmap is swapped first, then write access is removed, then the old one is returned: a write in between is in
    one of the two. (The kernel waits for SRCU readers after the swap; here they mark the new bitmap at once.)
    """
    slot = _slot(kvm, slot_id)
    dirty = slot.dirty_bitmap
    if dirty:
        slot.dirty_bitmap = set()
        yield Point.DIRTY_LOG_SWAPPED
        yield from _remove_write_access(kvm, slot_id)
        yield Point.DIRTY_LOG_COPY
    gfns = None if dirty is None else sorted(dirty)
    if gfns is not None and kvm.trace is not None:
        kvm.trace(DirtyLogRead(slot_id, gfns))
    return gfns
