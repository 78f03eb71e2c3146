"""The page fault exit: the fault handler of the paging mode, then emulation if it asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.kvm.constants import INVALID_PAGE
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.emulate import (
    RETRY,
    FaultOutcome,
    Instruction,
    InstructionKind,
    Outcome,
    x86_emulate_instruction,
)
from shadowmmu.kvm.mmio import handle_mmio_page_fault
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.roots import kvm_mmu_load
from shadowmmu.protocol.events import MmioAccess

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["handle_ept_misconfig", "kvm_mmu_page_fault", "page_fault", "prefault"]


def page_fault(vcpu: Vcpu, gva: int, error_code: int, prefault: bool = False) -> Operation[int]:
    """The fault handler of the vCPU's paging mode. 1: emulate the instruction; 0: go on.

    0 with `vcpu.exception` set: the fault is the guest's own. `error_code` holds PFERR_* bits.
    """
    return vcpu.mmu.context.page_fault(vcpu, gva, error_code, prefault)


def kvm_mmu_page_fault(
    vcpu: Vcpu, cr2: int, error_code: int, instruction: Instruction
) -> Operation[FaultOutcome]:
    """Handle a page fault exit at address `cr2`: map the page, inject the fault, or emulate `instruction`."""
    vcpu.exception = None
    result = yield from vcpu.mmu.context.page_fault(vcpu, cr2, error_code, False)
    if result == 0:
        return _retry_or_inject(vcpu)
    yield Point.EMULATE_FAULT
    outcome = yield from _emulate(vcpu, instruction)
    if outcome.outcome is Outcome.MMIO:
        vcpu.kvm.stat.mmio_exits += 1
    return outcome


def handle_ept_misconfig(vcpu: Vcpu, gpa: int, instruction: Instruction) -> Operation[FaultOutcome]:
    """Handle the exit of an access that met a misconfigured EPT entry: that is how MMIO entries are made."""
    vcpu.exception = None
    if not handle_mmio_page_fault(vcpu, gpa, direct=True):
        return RETRY
    yield Point.EMULATE_FAULT
    return (yield from _emulate(vcpu, instruction))


def _emulate(vcpu: Vcpu, instruction: Instruction) -> Operation[FaultOutcome]:
    outcome = yield from x86_emulate_instruction(vcpu, instruction)
    trace = vcpu.kvm.trace
    if outcome.outcome is Outcome.MMIO and trace is not None:
        writes = instruction.kind not in (InstructionKind.READ, InstructionKind.EXECUTE)
        trace(MmioAccess(vcpu.vcpu_id, outcome.gpa, instruction.size, writes))
    return outcome


def _retry_or_inject(vcpu: Vcpu) -> FaultOutcome:
    return RETRY if vcpu.exception is None else FaultOutcome(Outcome.INJECT, inject=vcpu.exception)


def prefault(vcpu: Vcpu, gva: int) -> Operation[int | None]:
    """Map the page of an asynchronous fault that is done (kvm_arch_async_page_ready); None if no root can be loaded.

    Pending requests are not served.
    """
    if vcpu.mmu.root_hpa == INVALID_PAGE and not (yield from kvm_mmu_load(vcpu)):
        return None
    return (yield from page_fault(vcpu, gva, 0, True))
