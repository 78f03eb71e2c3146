"""A machine's state as plain data, for people who stop a replay to look at it."""

from __future__ import annotations

from shadowmmu.kvm import Kvm, ShadowPage, Vcpu, root_pages
from shadowmmu.machine.machine import Machine

__all__ = ["dump_state"]


def _page(sp: ShadowPage) -> dict[str, object]:
    return {
        "sp": sp.serial,
        "gfn": sp.gfn,
        "level": sp.level,
        "direct": sp.direct,
        "access": sp.access,
        "invalid": sp.invalid,
        "root_count": sp.root_count,
        "unsync": sp.unsync,
        "unsync_children": sp.unsync_children,
        "spt": {str(index): f"{spte:#x}" for index, spte in sorted(sp.spt.items())},
    }


def _vcpu(vcpu: Vcpu) -> dict[str, object]:
    return {
        "vcpu": vcpu.vcpu_id,
        "mode": vcpu.mode.name,
        "requests": vcpu.request_names(),
        "processor": vcpu.cpu,
        "buffered_stores": 0 if vcpu.store_buffer is None else len(vcpu.store_buffer),
        "cr0": f"{vcpu.cr0:#x}",
        "cr3": f"{vcpu.cr3:#x}",
        "cr4": f"{vcpu.cr4:#x}",
        "efer": f"{vcpu.efer:#x}",
        "roots": [sp.serial for sp in root_pages(vcpu) if sp is not None],
    }


def _kvm(kvm: Kvm) -> dict[str, object]:
    return {
        "sps": [_page(sp) for sp in kvm.active_mmu_pages.values()],
        "vcpus": [_vcpu(vcpu) for vcpu in kvm.vcpus],
        "n_used_mmu_pages": kvm.n_used_mmu_pages,
        "n_max_mmu_pages": kvm.n_max_mmu_pages,
        "indirect_shadow_pages": kvm.indirect_shadow_pages,
        "tlbs_dirty": kvm.tlbs_dirty,
        "mmu_notifier_seq": kvm.mmu_notifier_seq,
        "mmu_notifier_count": kvm.mmu_notifier_count,
        "invlpg_counter": kvm.invlpg_counter,
        "host": kvm.host.deviations(),
    }


def dump_state(machine: Machine) -> dict[str, object]:
    """The MMU's state (shadow pages oldest first), the operations under way, and what waits in the vCPUs' lanes."""
    return {
        **_kvm(machine.kvm),
        "step": machine.steps,
        "operations": machine.operations_under_way(),
        "lanes": [
            {
                "vcpu": lane.number,
                "incarnation": lane.incarnation,
                "entry": lane.entry,
                "halted": lane.halted,
                "queue": [type(item).__name__ for item in lane.queue],
            }
            for lane in machine.lanes
        ],
    }
