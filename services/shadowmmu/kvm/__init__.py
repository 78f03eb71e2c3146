"""The model of KVM's shadow MMU as of Linux 3.1; pure.

A virtual machine is made from a `KvmConfig`; each thing that KVM does with it is an *operation*: a generator that
yields effects (`effects`) and returns the result. This package knows no sockets, no clock and no chance.
"""

from shadowmmu.kvm import host
from shadowmmu.kvm.audit import AuditError, mmu_audit
from shadowmmu.kvm.constants import VcpuMode
from shadowmmu.kvm.dirty_log import kvm_vm_ioctl_get_dirty_log, set_dirty_logging
from shadowmmu.kvm.effects import (
    Effect,
    EmulatedStores,
    HostPageLock,
    Kick,
    MmuLock,
    Operation,
    SlotsLock,
    Srcu,
)
from shadowmmu.kvm.emulate import (
    FaultOutcome,
    Instruction,
    InstructionKind,
    Outcome,
    emulator_write_phys,
    x86_emulate_instruction,
)
from shadowmmu.kvm.entry import EntryStatus, GuestEntry, vcpu_enter_guest
from shadowmmu.kvm.errors import (
    ConfigError,
    KvmError,
    NoSuchFrameError,
    UnknownFixError,
    UnknownProfileError,
    VcpuModeError,
)
from shadowmmu.kvm.fault import handle_ept_misconfig, kvm_mmu_page_fault, page_fault, prefault
from shadowmmu.kvm.fixes import FIXES, Finding, Fix, FixStatus
from shadowmmu.kvm.guest_memory import GuestMemory
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.invlpg import kvm_mmu_invlpg
from shadowmmu.kvm.memslots import Backing, MemorySlot
from shadowmmu.kvm.migration import migrate
from shadowmmu.kvm.nested import NestedGuest, gva_to_gpa_nested
from shadowmmu.kvm.notifiers import (
    kvm_mmu_notifier_change_pte,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_invalidate_page,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_mmu_notifier_test_young,
)
from shadowmmu.kvm.page import ShadowPage
from shadowmmu.kvm.pages import kvm_mmu_unprotect_page_virt, kvm_pv_mmu_op_release_pt
from shadowmmu.kvm.points import MEMORY_POINTS, SCHEDULING_POINTS, Point, PointKind
from shadowmmu.kvm.profiles import BASE_PROFILES, KernelTree, Profile
from shadowmmu.kvm.registers import kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, set_efer, set_regs
from shadowmmu.kvm.requests import kvm_flush_remote_tlbs, kvm_reload_remote_mmus
from shadowmmu.kvm.roots import root_pages
from shadowmmu.kvm.set_memory_region import kvm_set_memory_region, memory_region_problem
from shadowmmu.kvm.shadow_walk import kvm_mmu_get_spte_hierarchy, shadow_walk_init
from shadowmmu.kvm.stats import COUNTERS, KvmStat
from shadowmmu.kvm.store_buffer import StoreBuffer
from shadowmmu.kvm.tracepoints import AuditPoint, Tracepoints
from shadowmmu.kvm.vcpu import Mmu, Vcpu
from shadowmmu.kvm.vm import Kvm, KvmConfig
from shadowmmu.kvm.zap import kvm_mmu_change_mmu_pages, kvm_mmu_zap_all, mmu_shrink

__all__ = [
    # A machine
    "Kvm",
    "KvmConfig",
    "MemorySlot",
    "Backing",
    "Profile",
    "Vcpu",
    "VcpuMode",
    # What a driver does with an operation
    "Operation",
    "Effect",
    "HostPageLock",
    "SlotsLock",
    "EmulatedStores",
    "Srcu",
    "MmuLock",
    "Kick",
    "StoreBuffer",
    "Point",
    "PointKind",
    "SCHEDULING_POINTS",
    "MEMORY_POINTS",
    # Running a guest
    "vcpu_enter_guest",
    "GuestEntry",
    "EntryStatus",
    "handle_ept_misconfig",
    "kvm_mmu_page_fault",
    "FaultOutcome",
    "Outcome",
    "Instruction",
    "InstructionKind",
    "kvm_mmu_invlpg",
    "kvm_set_cr0",
    "kvm_set_cr3",
    "kvm_set_cr4",
    "set_efer",
    "set_regs",
    "emulator_write_phys",
    "x86_emulate_instruction",
    "NestedGuest",
    "gva_to_gpa_nested",
    "page_fault",
    "prefault",
    # The host
    "host",
    "kvm_mmu_notifier_invalidate_page",
    "kvm_mmu_notifier_invalidate_range_start",
    "kvm_mmu_notifier_invalidate_range_end",
    "kvm_mmu_notifier_change_pte",
    "kvm_mmu_notifier_clear_flush_young",
    "kvm_mmu_notifier_test_young",
    "kvm_set_memory_region",
    "memory_region_problem",
    "set_dirty_logging",
    "kvm_vm_ioctl_get_dirty_log",
    "mmu_shrink",
    "migrate",
    "kvm_mmu_change_mmu_pages",
    "kvm_mmu_zap_all",
    "kvm_mmu_unprotect_page_virt",
    "kvm_pv_mmu_op_release_pt",
    "kvm_flush_remote_tlbs",
    "kvm_reload_remote_mmus",
    # Looking at it
    "Tracepoints",
    "AuditPoint",
    "ShadowPage",
    "Mmu",
    "GuestMemory",
    "HostMemory",
    "KvmStat",
    "COUNTERS",
    "root_pages",
    "shadow_walk_init",
    "kvm_mmu_get_spte_hierarchy",
    "mmu_audit",
    "AuditError",
    "FIXES",
    "Finding",
    "Fix",
    "FixStatus",
    "KernelTree",
    "BASE_PROFILES",
    # Errors
    "KvmError",
    "ConfigError",
    "NoSuchFrameError",
    "UnknownFixError",
    "UnknownProfileError",
    "VcpuModeError",
]
