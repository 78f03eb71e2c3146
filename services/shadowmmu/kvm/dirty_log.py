"""Dirty logging: which guest frames were written since the log was last read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.effects import MmuLock, Operation, Srcu
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.memslots import KvmMemorySlot, MemorySlot
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs
from shadowmmu.kvm.set_memory_region import lock_slots, set_memory_region_locked, unlock_slots
from shadowmmu.kvm.slot_write_access import kvm_mmu_slot_remove_write_access, remove_write_access
from shadowmmu.protocol.events import DirtyLogRead, DirtyLogStarted

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_vm_ioctl_get_dirty_log", "set_dirty_logging"]


def _slot(kvm: Kvm, slot_id: int) -> KvmMemorySlot:
    slot = kvm.memslot(slot_id)
    if slot is None:
        raise ConfigError(f"there is no memory slot {slot_id}")
    return slot


def set_dirty_logging(kvm: Kvm, slot_id: int, enable: bool) -> Operation[None]:
    """Turn dirty logging of a slot on (with an empty log, unless it is on) or off, as kvm_set_memory_region does.

    Raises ConfigError if there is no such slot; so does get_dirty_log.
    """
    yield from lock_slots(kvm)
    try:
        slot = _slot(kvm, slot_id)
        region = MemorySlot(slot.id, slot.base_gfn, slot.npages, slot.backing)
        yield from set_memory_region_locked(kvm, region, enable)
    finally:
        unlock_slots(kvm)


def kvm_vm_ioctl_get_dirty_log(kvm: Kvm, slot_id: int) -> Operation[list[int] | None]:
    """The guest frames written since the last call, and start anew; None without logging. Takes slots_lock, mmu_lock.

    The bitmap is swapped first, then write access is removed, then the old one is returned: a write in between is in
    one of the two. Who found the old bitmap is waited for.
    """
    yield from lock_slots(kvm)
    try:
        slot = _slot(kvm, slot_id)
        dirty = slot.dirty_bitmap
        if dirty is not None and kvm.trace is not None:
            kvm.trace(DirtyLogStarted(slot_id))
        if dirty:
            slot.dirty_bitmap = set()
            yield Srcu.SYNCHRONIZE
            yield Point.DIRTY_LOG_SWAPPED
            yield MmuLock.ACQUIRE
            if kvm.profile.wp_race_dirty_log:
                yield from kvm_mmu_slot_remove_write_access(kvm, slot_id)
                yield MmuLock.RELEASE
            else:  # bug C1: others find entries read-only that TLBs still have writable
                yield from remove_write_access(kvm, slot_id)
                yield MmuLock.RELEASE
                yield Point.DIRTY_LOG_UNLOCKED
                yield from kvm_flush_remote_tlbs(kvm)
            yield Point.DIRTY_LOG_COPY
        gfns = None if dirty is None else sorted(dirty)
        if gfns is not None and kvm.trace is not None:
            kvm.trace(DirtyLogRead(slot_id, gfns))
        return gfns
    finally:
        unlock_slots(kvm)
