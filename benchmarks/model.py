"""Page faults per second of the model alone: no scheduler, no processor, no sockets.

A 64-bit guest touches pages that nothing maps yet, each with its walk, frame look-up, fetch, link, prefetch of its
neighbours and the guest entry after it. Every so often all shadow pages are dropped, outside the measured time.
"""

from __future__ import annotations

import time

from benchmarks.figures import Figure
from shadowmmu.cpu.x86 import PFERR_USER_MASK, PFERR_WRITE_MASK
from shadowmmu.kvm import (
    Instruction,
    InstructionKind,
    Kvm,
    KvmConfig,
    MemorySlot,
    MmuLock,
    Operation,
    Profile,
    VcpuMode,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all,
    set_regs,
    vcpu_enter_guest,
)

__all__ = ["page_faults"]

PAGES = 8192
STRIDE = 8  # pages from one fault to the next: prefetch maps seven neighbours
ROUNDS = 8
TABLES = 0x100  # first frame of the guest's tables
GUEST_ENTRY = 0x067  # P, W, U, A, D
PAGING = (0x8001_0011, TABLES << 12, 0x20, 0xD00)  # CR0 (PG, WP), CR3, CR4 (PAE), EFER (LME, LMA, NXE)


def _drain(operation: Operation[object]) -> None:
    """Runs an operation to its end; nothing else happens, and nobody is ever kicked."""
    try:
        while True:
            effect = next(operation)
            assert effect in (MmuLock.ACQUIRE, MmuLock.RELEASE) or effect is not None
    except StopIteration:
        return


def _guest() -> Kvm:
    """A guest whose first PAGES pages map themselves."""
    kvm = Kvm(
        KvmConfig((MemorySlot(0, 0, PAGES + 1024),), n_max_mmu_pages=4096, profile=Profile.parse("fixed"))
    )
    vcpu = kvm.create_vcpu()
    kvm.memory.write(TABLES << 12, 8, (TABLES + 1) << 12 | GUEST_ENTRY)
    kvm.memory.write((TABLES + 1) << 12, 8, (TABLES + 2) << 12 | GUEST_ENTRY)
    for table in range(PAGES // 512):
        frame = TABLES + 3 + table
        kvm.memory.write(((TABLES + 2) << 12) + 8 * table, 8, frame << 12 | GUEST_ENTRY)
        for index in range(512):
            kvm.memory.write((frame << 12) + 8 * index, 8, (table * 512 + index) << 12 | GUEST_ENTRY)
    _drain(set_regs(vcpu, *PAGING))
    _drain(vcpu_enter_guest(vcpu))
    return kvm


def page_faults(runs: int) -> Figure:
    """Page faults per second; `runs` measurements."""
    kvm = _guest()
    vcpu = kvm.vcpus[0]
    addresses = [page << 12 for page in range(4096, PAGES, STRIDE)]
    error_code = PFERR_USER_MASK | PFERR_WRITE_MASK
    values = []
    for _ in range(runs):
        elapsed = 0.0
        before = kvm.stat.pf_fixed
        for _ in range(ROUNDS):
            _drain(kvm_mmu_zap_all(kvm))
            started = time.perf_counter()
            for gva in addresses:
                instruction = Instruction(kind=InstructionKind.WRITE, gva=gva, size=8, value=0, user=True)
                vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
                _drain(kvm_mmu_page_fault(vcpu, gva, error_code, instruction))
                _drain(vcpu_enter_guest(vcpu))
            elapsed += time.perf_counter() - started
        values.append((kvm.stat.pf_fixed - before) / elapsed)
    return Figure("page faults of the model alone", "1/s", values, aim=20_000)
