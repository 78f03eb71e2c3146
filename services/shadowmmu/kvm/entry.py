"""Entering the guest: serving requests, loading a root, going into guest mode (vcpu_enter_guest)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from shadowmmu.kvm.constants import (
    INVALID_PAGE,
    KVM_REQ_MMU_RELOAD,
    KVM_REQ_MMU_SYNC,
    KVM_REQ_TLB_FLUSH,
    KVM_REQ_TRIPLE_FAULT,
    VcpuMode,
)
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.errors import VcpuModeError
from shadowmmu.kvm.migration import kvm_arch_vcpu_load
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.roots import kvm_mmu_load, mmu_free_roots, root_pages
from shadowmmu.kvm.store_buffer import ModeStore
from shadowmmu.kvm.sync import kvm_mmu_sync_roots

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["EntryStatus", "GuestEntry", "vcpu_enter_guest"]


class EntryStatus(enum.Enum):
    """How an attempt to enter the guest ended."""

    OK = "ok"
    SHUTDOWN = "shutdown"


class GuestEntry(msgspec.Struct, frozen=True, gc=False):
    """A guest entry.

    `passes` of the request loop it took; `hw_flushes` TLB_FLUSH requests served; `root_loaded`: a root was loaded,
    which empties the TLB too. `root` is the serial number of the root shadow page (the first of four; -1 without one).
    """

    status: EntryStatus
    passes: int
    hw_flushes: int
    root_loaded: bool
    root: int


def vcpu_enter_guest(vcpu: Vcpu) -> Operation[GuestEntry]:
    """Enter the guest. On return the vCPU is IN_GUEST_MODE, or OUTSIDE after a shutdown.

    Each pass serves the pending requests and loads a root if there is none. Guest mode is set before requests are
    looked at for the last time, so that whoever sets one later sees that it must kick. Raises VcpuModeError unless
    the vCPU is OUTSIDE_GUEST_MODE: whoever handles its exits says so when an exit takes effect.
    """
    if vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE:
        raise VcpuModeError(vcpu.vcpu_id, vcpu.mode.name)
    passes = hw_flushes = 0
    root_loaded = False
    store_buffer = vcpu.store_buffer  # None with memory model sc
    while True:
        passes += 1
        if store_buffer and (vcpu.requests or vcpu.mmu.root_hpa == INVALID_PAGE):
            store_buffer.drain()  # clearing a request is a locked operation, and so is taking mmu_lock
        if vcpu.requests:
            if vcpu.requests & KVM_REQ_MMU_RELOAD:
                vcpu.requests &= ~KVM_REQ_MMU_RELOAD
                yield from mmu_free_roots(vcpu)
            if vcpu.requests & KVM_REQ_MMU_SYNC:
                vcpu.requests &= ~KVM_REQ_MMU_SYNC
                yield from kvm_mmu_sync_roots(vcpu)
            if vcpu.requests & KVM_REQ_TLB_FLUSH:
                vcpu.requests &= ~KVM_REQ_TLB_FLUSH
                vcpu.kvm.stat.hw_flush += 1
                hw_flushes += 1
            if vcpu.requests & KVM_REQ_TRIPLE_FAULT:
                vcpu.requests &= ~KVM_REQ_TRIPLE_FAULT
                return GuestEntry(EntryStatus.SHUTDOWN, passes, hw_flushes, root_loaded, -1)
            yield Point.ENTER_GUEST_RELOAD
        if vcpu.mmu.root_hpa == INVALID_PAGE:
            if not (yield from kvm_mmu_load(vcpu)):
                continue
            root_loaded = True
        yield Point.ENTER_GUEST_REQUESTS
        if kvm_arch_vcpu_load(vcpu):
            hw_flushes = 0  # those were on the other processor
        mode_first = vcpu.kvm.profile.mode_vs_request_order
        if not mode_first:
            # Bug B22: whoever sets a request between this test and the change of mode sees nobody to kick.
            if vcpu.requests:
                continue
            yield Point.ENTER_GUEST_LATE_MODE
        if store_buffer is None:
            vcpu.mode = VcpuMode.IN_GUEST_MODE
        else:
            store_buffer.put(ModeStore(VcpuMode.IN_GUEST_MODE))
            if vcpu.kvm.profile.mode_request_barrier:
                store_buffer.drain()
        if vcpu.requests and mode_first:
            if store_buffer:
                store_buffer.drain()
            vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
            continue
        if store_buffer:
            # Bug B22 (mode-request-barrier): whoever sets a request now reads that the vCPU is outside guest mode.
            yield Point.ENTER_GUEST_MODE_BUFFERED
            store_buffer.drain()  # the entry serialises
        root: ShadowPage | None = next((sp for sp in root_pages(vcpu) if sp is not None), None)
        return GuestEntry(
            EntryStatus.OK, passes, hw_flushes, root_loaded, -1 if root is None else root.serial
        )
