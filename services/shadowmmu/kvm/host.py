"""The rest of the host, as far as the guest's memory goes: taking pages away, moving them, breaking copy on write.

Operations (generators), each of which changes the host's own tables first and then tells KVM through the MMU
notifiers. As in the kernel, where the page-table lock sees to it, a page is not changed again before KVM knows of the
last change. Unlike there, a look-up may bring a page back while the notifier that took it away is still at work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shadowmmu.kvm.effects import HostPageLock, Operation
from shadowmmu.kvm.errors import ConfigError, NoSuchFrameError
from shadowmmu.kvm.host_memory import BAD_PFN
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.notifiers import (
    kvm_mmu_notifier_change_pte,
    kvm_mmu_notifier_invalidate_page,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
)
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.set_spte import NO_SLOT_PFN
from shadowmmu.protocol.events import FrameRevoked

if TYPE_CHECKING:
    from shadowmmu.kvm.vm import Kvm

__all__ = [
    "break_cow",
    "gfn_to_pfn_prot",
    "move",
    "munmap",
    "reclaim",
    "sleeping_lookup",
    "split",
    "unmap",
    "unmap_range",
]


def _revoked(kvm: Kvm, slot: KvmMemorySlot, gone: Iterable[tuple[int, int]]) -> None:
    """Trace the (page, host frame) pairs of the slot's memory that do not hold any more."""
    if kvm.trace is None:
        return
    host = kvm.host
    for page, pfn in gone:
        present = page & slot.host_mask not in host.absent and slot.memory.mapped
        if not (present and host.page_pfn(slot, page) == pfn):
            kvm.trace(FrameRevoked(slot.memory.gfn(page), pfn))


def _frames(kvm: Kvm, slot: KvmMemorySlot, key: int) -> list[tuple[int, int]]:
    """(page, host frame) of each page of a host page that is present."""
    if kvm.trace is None or key in kvm.host.absent:
        return []
    return [(page, kvm.host.page_pfn(slot, page)) for page in kvm.host.pages(slot, key)]


def _begin_change(kvm: Kvm, keys: list[int]) -> Operation[None]:
    """Take the page-table lock, so to speak: wait until KVM knows of all earlier changes of these host pages."""
    in_change = kvm.host.in_change
    yield Point.HOST_PAGE_LOCK
    while any(key in in_change for key in keys):
        yield HostPageLock.BUSY
    in_change.update(keys)


def _changed(kvm: Kvm, keys: list[int]) -> None:
    """KVM knows of the changes of these host pages now."""
    kvm.host.in_change.difference_update(keys)


def _flush_host_tlbs(kvm: Kvm) -> None:
    """The host flushes its own translations of what it has just changed: an interrupt to each processor.

    So the stores that its threads have made to the page are in the page.
    """
    for vcpu in kvm.vcpus:
        if vcpu.store_buffer is not None:
            vcpu.store_buffer.interrupt()


def _host_pages(slot: KvmMemorySlot, pages: range) -> list[int]:
    """The first page of each host page that has one of the pages."""
    return list(range(pages.start & slot.host_mask, pages.stop, -slot.host_mask))


def _set_pte_at_notify(kvm: Kvm, slot: KvmMemorySlot, page: int, pfn: int, writable: bool) -> Operation[None]:
    """Let host frame `pfn` hold the page, and tell KVM (change_pte). Under the page-table lock.

    Bug A13 (change-pte-order): in 3.1 host threads find the new frame before KVM hears of it, so that a guest does not
    see what they store. With the fix nobody finds a frame until KVM knows.
    """
    host = kvm.host
    key = page & slot.host_mask
    gone = _frames(kvm, slot, key)
    old_pfn = host.page_pfn(slot, page)
    old = -1
    if kvm.profile.change_pte_order:
        host.clear_pte(key)
    else:
        old = host.keep_old_frame(slot, page, pfn)
        host.set_pte(key, writable)
    host.assign(slot, key, pfn)
    host.backed(slot, key)
    _flush_host_tlbs(kvm)
    yield Point.HOST_COW
    yield from kvm_mmu_notifier_change_pte(kvm, page, pfn, writable)
    if kvm.profile.change_pte_order:
        host.set_pte(key, writable)
    host.old_frames.pop(old, None)
    host.carry_dirty(slot, page, old_pfn)
    _revoked(kvm, slot, gone)


def sleeping_lookup(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> Operation[None]:
    """Bring the page of a frame back, and wait for whoever is about to put another frame there."""
    host = kvm.host
    while gfn + slot.hva_delta & slot.host_mask in host.cleared:
        yield HostPageLock.BUSY
    host.fault_in(slot, gfn)


def break_cow(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> Operation[None]:
    """What a sleeping look-up for write does next: a frame that is not writable is replaced by a new, writable one.

    The notifier change_pte tells KVM; contents stay.
    """
    host = kvm.host
    page = gfn + slot.hva_delta
    key = page & slot.host_mask
    if key not in host.readonly:
        return
    yield from _begin_change(kvm, [key])
    if key not in host.readonly:  # somebody else was quicker
        _changed(kvm, [key])
        return
    host.fault_in(slot, gfn)
    yield from _set_pte_at_notify(kvm, slot, page, host.take_pfn(slot), True)
    _changed(kvm, [key])


def gfn_to_pfn_prot(kvm: Kvm, gfn: int, write: bool) -> Operation[tuple[int, bool]]:
    """The fault handler's frame look-up: (host frame, may it be mapped writable); NO_SLOT_PFN outside all slots.

    Sleeps: brings the page back, and for a write fault breaks copy on write.
    """
    slot = kvm.visible_memslot(gfn)
    if slot is None:
        return NO_SLOT_PFN, True
    host = kvm.host
    kvm.work.frame_lookups += 1
    pfn = host.atomic_pfn(slot, gfn)
    if pfn != BAD_PFN:
        return pfn, True
    yield from sleeping_lookup(kvm, slot, gfn)
    if write:
        yield from break_cow(kvm, slot, gfn)
        slot.memory.written.add(gfn - slot.base_gfn)  # the host's entry for the page has its D bit now
    page = gfn + slot.hva_delta
    return host.page_pfn(slot, page), page & slot.host_mask not in host.readonly


def unmap(kvm: Kvm, gfn: int) -> Operation[None]:
    """Take one page away (invalidate_page). It comes back, in the same frame, when somebody looks for it.

    Raises NoSuchFrameError; so do the others here.
    """
    slot = kvm.host.slot(gfn)
    yield from _unmap_page(kvm, slot, gfn, swap=False)


def reclaim(kvm: Kvm, gfn: int) -> Operation[None]:
    """Swap one page out (invalidate_page). It comes back in a frame never used before, with its contents."""
    slot = kvm.host.slot(gfn)
    yield from _unmap_page(kvm, slot, gfn, swap=True)


def _unmap_page(kvm: Kvm, slot: KvmMemorySlot, gfn: int, swap: bool) -> Operation[None]:
    page = gfn + slot.hva_delta
    key = page & slot.host_mask
    yield from _split(kvm, slot, page)
    yield from _begin_change(kvm, [key])
    if slot.memory.mapped:
        gone = _frames(kvm, slot, key)
        pfn = kvm.host.page_pfn(slot, page)
        kvm.host.absent.add(key)
        if swap:
            kvm.host.swapped.add(key)
        _flush_host_tlbs(kvm)
        yield Point.HOST_UNMAPPED
        yield from kvm_mmu_notifier_invalidate_page(kvm, page)
        if swap:
            kvm.host.page_out(slot, page, pfn)
        _revoked(kvm, slot, gone)
    _changed(kvm, [key])


def unmap_range(kvm: Kvm, gfn: int, npages: int) -> Operation[None]:
    """Take `npages` pages away from `gfn` on (invalidate_range_start and _end); they come back in the same frames.

    They must all be in one slot.
    """
    host = kvm.host
    if npages <= 0:
        raise ConfigError("a range to unmap must have pages")
    slot = host.slot(gfn)
    if gfn + npages > slot.end_gfn:
        raise NoSuchFrameError(slot.end_gfn)
    pages = range(gfn + slot.hva_delta, gfn + slot.hva_delta + npages)
    keys = _host_pages(slot, pages)
    for block in range(pages.start & ~511, pages.stop, 512):
        yield from _split(kvm, slot, max(block, pages.start))
    yield from _begin_change(kvm, keys)
    if not slot.memory.mapped:
        _changed(kvm, keys)
        return
    gone = [pair for key in keys for pair in _frames(kvm, slot, key)]
    host.absent.update(keys)
    _flush_host_tlbs(kvm)
    yield Point.HOST_UNMAPPED
    yield from kvm_mmu_notifier_invalidate_range_start(kvm, pages)
    _changed(kvm, keys)
    _revoked(kvm, slot, gone)
    yield Point.NOTIFIER_RANGE_STARTED
    yield from kvm_mmu_notifier_invalidate_range_end(kvm)


def munmap(kvm: Kvm, slot: KvmMemorySlot) -> Operation[None]:
    """User space unmaps the memory of a slot that it has deleted: frames and contents are the host's again.

    The notifiers are called as for any range; they find no slot that has it.
    """
    host = kvm.host
    keys = host.keys(slot)
    yield Point.HOST_MUNMAP
    yield from _begin_change(kvm, keys)
    gone = [pair for key in keys for pair in _frames(kvm, slot, key)]
    _flush_host_tlbs(kvm)
    host.forget(slot.memory, keys)
    yield Point.HOST_UNMAPPED
    yield from kvm_mmu_notifier_invalidate_range_start(kvm, range(slot.memory.base, slot.memory.end))
    _changed(kvm, keys)
    _revoked(kvm, slot, gone)
    yield Point.NOTIFIER_RANGE_STARTED
    yield from kvm_mmu_notifier_invalidate_range_end(kvm)


def split(kvm: Kvm, gfn: int) -> Operation[bool]:
    """Split the transparent huge page that holds the frame, for ever; returns whether there was one."""
    slot = kvm.host.slot(gfn)
    return (yield from _split(kvm, slot, gfn + slot.hva_delta))


def _split(kvm: Kvm, slot: KvmMemorySlot, page: int) -> Operation[bool]:
    host = kvm.host
    if not host.is_trans_huge(slot, page - slot.hva_delta):
        return False
    first = page & ~511
    host.split_blocks.add(first)
    yield from kvm_mmu_notifier_invalidate_range_start(kvm, range(first, first + 512))
    yield Point.NOTIFIER_RANGE_STARTED
    yield from kvm_mmu_notifier_invalidate_range_end(kvm)
    return True


def move(kvm: Kvm, gfn: int, pfn: int, writable: bool) -> Operation[None]:
    """Back the page by host frame `pfn`, present and writable or not (change_pte)."""
    host = kvm.host
    slot = host.slot(gfn)
    page = gfn + slot.hva_delta
    key = page & slot.host_mask
    yield from _split(kvm, slot, page)
    yield from _begin_change(kvm, [key])
    if slot.memory.mapped:
        yield from _set_pte_at_notify(kvm, slot, page, pfn, writable)
    _changed(kvm, [key])
