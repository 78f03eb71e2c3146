"""Memory slots that come and go: user space creates, deletes and moves them, and switches their dirty logs.

The list of slots is replaced as a whole; who looked it up before is waited for (`Srcu`). A slot that goes is made
invalid first: from then on nobody maps its frames anew, but what KVM keeps for it is still found while the shadow is
flushed. Relies on the driver for the wait, and on `host.munmap` for what user space does with the memory afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.constants import kvm_pages_per_hpage
from shadowmmu.kvm.effects import MmuLock, Operation, SlotsLock, Srcu
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.memslots import KVM_MEMORY_SLOTS, Backing, KvmMemorySlot, MemorySlot
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.requests import kvm_reload_remote_mmus
from shadowmmu.kvm.slot_write_access import kvm_mmu_slot_remove_write_access
from shadowmmu.kvm.zap import kvm_mmu_zap_all
from shadowmmu.protocol.events import SlotSettled

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "kvm_set_memory_region",
    "lock_slots",
    "memory_region_problem",
    "set_memory_region_locked",
    "unlock_slots",
]


def lock_slots(kvm: Kvm) -> Operation[None]:
    """Take slots_lock."""
    yield Point.SLOTS_LOCK
    while kvm.slots_locked:
        yield SlotsLock.BUSY
    kvm.slots_locked = True


def unlock_slots(kvm: Kvm) -> None:
    """Release slots_lock."""
    kvm.slots_locked = False


def _blocks(base_gfn: int, npages: int, level: int) -> tuple[int, bool, bool]:
    """How many blocks of large pages a slot touches, and whether the first and the last are incomplete."""
    shift = 9 * (level - 1)
    mask = kvm_pages_per_hpage(level) - 1
    end = base_gfn + npages
    return (end - 1 >> shift) - (base_gfn >> shift), base_gfn & mask != 0, end & mask != 0


def _move_problem(old: KvmMemorySlot, region: MemorySlot) -> str | None:
    """3.1 keeps what it knows of large pages, whatever their new alignment (until edd4fa37baa6, 2020)."""
    for level in (2, 3):
        if _blocks(old.base_gfn, old.npages, level) != _blocks(region.base_gfn, region.npages, level):
            return f"memory slot {old.id} cannot move to frame {region.base_gfn}: its large pages would lie otherwise"
    pages = 512 if old.backing is Backing.THP else -old.host_mask
    if (region.base_gfn - old.base_gfn) % pages:
        return f"memory slot {old.id} has host pages of {pages} frames: it moves by multiples of that"
    return None


def memory_region_problem(kvm: Kvm, region: MemorySlot) -> str | None:
    """Why the request makes no sense for the slots as they are, None if it does. Changes nothing.

    As 3.1: a slot keeps its size, and slots do not overlap. Unlike there, a slot that does not exist cannot be
    deleted, and the last one not either.
    """
    if not 0 <= region.id < KVM_MEMORY_SLOTS:
        return f"there is no memory slot {region.id}: they are numbered from 0 to {KVM_MEMORY_SLOTS - 1}"
    if region.base_gfn < 0 or region.npages < 0:
        return f"memory slot {region.id} cannot have a negative frame or size"
    if region.base_gfn + region.npages > 1 << kvm.config.guest_maxphyaddr - 12:
        return f"memory slot {region.id} ends beyond {kvm.config.guest_maxphyaddr} bits of guest physical address"
    old = kvm.memslot(region.id)
    if not region.npages:
        if old is None:
            return f"there is no memory slot {region.id} to delete"
        return "the last memory slot cannot be deleted" if len(kvm.memslots) == 1 else None
    if old is not None and region.npages != old.npages:
        return f"memory slot {region.id} has {old.npages} pages: it cannot be resized to {region.npages}"
    if old is not None and region.backing is not old.backing:
        return f"memory slot {region.id} is backed by {old.backing.value} pages: its memory cannot be changed"
    for other in kvm.memslots:
        end = region.base_gfn + region.npages
        if other is not old and region.base_gfn < other.end_gfn and other.base_gfn < end:
            return f"frames {region.base_gfn} to {end - 1} overlap memory slot {other.id}"
    return None if old is None else _move_problem(old, region)


def kvm_set_memory_region(
    kvm: Kvm, region: MemorySlot, log_dirty_pages: bool | None = None
) -> Operation[KvmMemorySlot]:
    """Create, move or delete a slot, or switch its dirty log (__kvm_set_memory_region). Takes slots_lock and mmu_lock.

    `region.npages` is 0 to delete; otherwise the slot is created, or, if it exists, is at `region.base_gfn`
    afterwards. Contents and host frames go with a slot that moves; a new one is zero. Dirty logging is on or off as
    `log_dirty_pages` says, its log empty if it was off; None: as it was. Returns the slot, a deleted one too.
    Raises ConfigError, and changes nothing, where memory_region_problem says so.
    """
    yield from lock_slots(kvm)
    try:
        problem = memory_region_problem(kvm, region)
        if problem is not None:
            raise ConfigError(problem)
        return (yield from set_memory_region_locked(kvm, region, log_dirty_pages))
    finally:
        unlock_slots(kvm)


def set_memory_region_locked(
    kvm: Kvm, region: MemorySlot, log_dirty_pages: bool | None
) -> Operation[KvmMemorySlot]:
    """The same for who holds slots_lock and knows that the request makes sense."""
    old = kvm.memslot(region.id)
    others = [slot for slot in kvm.memslots if slot is not old]
    moves = old is not None and region.npages > 0 and region.base_gfn != old.base_gfn
    # Bug A14 (gpa-base-change): 3.1 makes only slots invalid that are deleted. What maps a slot that moves is found at
    # its old place after it has gone from there.
    if old is not None and (not region.npages or (moves and kvm.profile.gpa_base_change)):
        yield from _make_invalid(kvm, old)
    if old is None:
        slot = KvmMemorySlot(region, kvm.host.map_memory(region))
        _count_tables(kvm, slot)
    elif moves:
        slot = old.moved(region.base_gfn)
        slot.memory.base_gfn = region.base_gfn
        _count_tables(kvm, slot)
    else:
        slot = old
    if not region.npages or log_dirty_pages is False:
        slot.dirty_bitmap = None
    elif log_dirty_pages is None:
        pass
    elif slot.dirty_bitmap is None:
        slot.dirty_bitmap = set()
    kvm.publish_memslots([*others, slot] if region.npages else others)
    yield Srcu.SYNCHRONIZE
    yield Point.MEMSLOT_PUBLISHED
    yield MmuLock.ACQUIRE
    yield from kvm_mmu_slot_remove_write_access(kvm, region.id)
    yield MmuLock.RELEASE
    # MMIO entries for frames that have memory now must go. A quirk: a slot is compared with what it was, and one that
    # was not there was at frame 0.
    if kvm.mmio_sptes and region.npages and region.base_gfn != (0 if old is None else old.base_gfn):
        yield Point.MEMSLOT_COMMITTED
        yield from kvm_arch_flush_shadow(kvm)
        kvm.memslots_generation += 1  # what MMIO caches took from such an entry meanwhile
    if kvm.trace is not None:
        kvm.trace(SlotSettled(slot.id, slot.base_gfn, region.npages, slot.dirty_bitmap is not None))
    return slot


def _count_tables(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """Tables that are shadowed already where the slot comes: there are some only with bug A14 or B25."""
    for sp in kvm.active_mmu_pages.values():
        if sp.gfn in slot and not (sp.direct or sp.invalid):
            for level in (2, 3):
                block = sp.gfn >> (9 * (level - 1))
                slot.write_count[level][block] = slot.write_count[level].get(block, 0) + 1


def _make_invalid(kvm: Kvm, slot: KvmMemorySlot) -> Operation[None]:
    """From now on no shadow page maps the slot's frames, or is made for a table in it."""
    profile = kvm.profile
    if not profile.memslot_delete_flush_early:  # bug B25: faults map the slot's frames again
        yield from kvm_arch_flush_shadow(kvm)
    slot.invalid = True
    kvm.publish_memslots(kvm.memslots)
    yield Srcu.SYNCHRONIZE
    if profile.memslot_delete_flush and profile.memslot_delete_flush_early:  # bug B25 without one of them
        yield Point.MEMSLOT_INVALID
        yield from kvm_arch_flush_shadow(kvm)


def kvm_arch_flush_shadow(kvm: Kvm) -> Operation[None]:
    """Drop every shadow page, and have every vCPU load its root anew. Takes mmu_lock."""
    yield from kvm_mmu_zap_all(kvm)
    yield Point.FLUSH_SHADOW_ZAPPED
    yield from kvm_reload_remote_mmus(kvm)
