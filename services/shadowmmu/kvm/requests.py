"""Requests to all vCPUs, and the remote TLB flush (make_all_cpus_request, kvm_flush_remote_tlbs)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.constants import KVM_REQ_MMU_RELOAD, KVM_REQ_TLB_FLUSH, VcpuMode
from shadowmmu.kvm.effects import Kick, Operation
from shadowmmu.protocol.events import TlbsDirtyCleared

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu
    from shadowmmu.kvm.vm import Kvm

__all__ = ["kvm_flush_remote_tlbs", "kvm_mmu_flush_tlb", "kvm_reload_remote_mmus"]


def make_all_cpus_request(kvm: Kvm, request: int) -> Kick:
    """Set a request on every vCPU and say whom to kick: those that are not outside guest mode.

    The request is set before the mode is read. A vCPU in guest mode is moved to EXITING_GUEST_MODE; one that is
    exiting already is waited for as well. Fix B22 (request-mode-barrier) is a barrier between the two that changes
    nothing on x86, where the bit is set, and the mode read, by locked operations.
    """
    targets = []
    for vcpu in kvm.vcpus:
        pending = vcpu.requests & request
        vcpu.requests |= request
        if vcpu.mode is VcpuMode.OUTSIDE_GUEST_MODE:
            continue
        # Bug B21: whoever has asked, or kicked, before is trusted to be done already.
        if pending and not kvm.profile.second_flusher_returns_early:
            continue
        if vcpu.mode is VcpuMode.EXITING_GUEST_MODE and not kvm.profile.second_flusher_exiting:
            continue
        vcpu.mode = VcpuMode.EXITING_GUEST_MODE
        targets.append(vcpu.vcpu_id)
    return Kick(tuple(targets))


def kvm_flush_remote_tlbs(kvm: Kvm) -> Operation[None]:
    """Have every vCPU flush its TLB before it runs guest code again; on return none uses an old translation.

    tlbs_dirty is read before and set to 0 after, unless it has grown meanwhile. May be called with or without
    mmu_lock.
    """
    dirty_count = kvm.tlbs_dirty
    if (yield make_all_cpus_request(kvm, KVM_REQ_TLB_FLUSH)):
        kvm.stat.remote_tlb_flush += 1
    if kvm.tlbs_dirty == dirty_count:
        kvm.tlbs_dirty = 0
        if dirty_count and kvm.trace is not None:
            kvm.trace(TlbsDirtyCleared(dirty_count))


def kvm_reload_remote_mmus(kvm: Kvm) -> Operation[None]:
    """Have every vCPU load its root anew before it runs guest code again.

    As in 3.1 this goes through make_all_cpus_request too: it kicks and waits like a flush, under mmu_lock, but is not
    counted as one and does not touch tlbs_dirty.
    """
    yield make_all_cpus_request(kvm, KVM_REQ_MMU_RELOAD)


def kvm_mmu_flush_tlb(vcpu: Vcpu) -> None:
    """Have this vCPU alone flush its TLB before it runs guest code again."""
    kvm = vcpu.kvm
    kvm.stat.tlb_flush += 1
    vcpu.requests |= KVM_REQ_TLB_FLUSH
    if kvm.tlbs_dirty and not kvm.profile.sync_drop_noflush_clear:  # bug B2: others may have what was dropped
        if kvm.trace is not None:
            kvm.trace(TlbsDirtyCleared(kvm.tlbs_dirty))
        kvm.tlbs_dirty = 0
