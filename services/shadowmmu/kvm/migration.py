"""vCPUs on physical processors: their threads move, and the TLBs do not come along (kvm_arch_vcpu_load).

A processor keeps the translations that it has cached under a vCPU's tag (VPID) while the vCPU runs elsewhere, and
flushes only reach the processor on which the vCPU enters the guest next. So whoever is loaded on another processor than
before flushes there first. Relies on `entry` for the moment: right before guest mode, after which a thread cannot move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.constants import KVM_REQ_TLB_FLUSH, VcpuMode
from shadowmmu.kvm.effects import Kick, Operation

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["kvm_arch_vcpu_load", "migrate"]


def migrate(vcpu: Vcpu, processor: int) -> Operation[None]:
    """The host's scheduler puts the vCPU's thread on a physical processor; it leaves the guest if it is there."""
    vcpu.next_cpu = processor
    if vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE and vcpu.cpu != processor:
        vcpu.mode = VcpuMode.EXITING_GUEST_MODE
        yield Kick((vcpu.vcpu_id,))


def kvm_arch_vcpu_load(vcpu: Vcpu) -> bool:
    """The thread goes on where the scheduler has put it; returns whether that is another processor.

    Bug B30 (stale-on-old-pcpu): without the request, translations of the last stay on that processor are used.
    """
    if vcpu.cpu == vcpu.next_cpu:
        return False
    if vcpu.store_buffer is not None:
        vcpu.store_buffer.drain()
    vcpu.cpu = vcpu.next_cpu
    if vcpu.kvm.profile.stale_on_old_pcpu:
        vcpu.requests |= KVM_REQ_TLB_FLUSH
    return True
