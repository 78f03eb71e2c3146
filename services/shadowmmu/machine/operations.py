"""From messages to the host operations of the model.

What KVM does between a vCPU's exit and its next entry is one operation here: handle the exit, then vcpu_enter_guest.
What the host agent asks for becomes the operation of that name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shadowmmu import kvm as k
from shadowmmu.kvm import GuestEntry, Instruction, InstructionKind, Operation
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag, DeviceStored

if TYPE_CHECKING:
    from shadowmmu.kvm import Kvm, Vcpu

__all__ = ["HostResult", "VcpuRun", "handle_exit", "host_operation"]


class VcpuRun(msgspec.Struct):
    """What came of an exit and the entry after it.

    `entry` is None if the vCPU halts. `name` and `outcome` are for the statistics.
    """

    name: str
    outcome: str = "done"
    entry: GuestEntry | None = None
    inject: m.InjectedFault | None = None
    completed: m.Completed | None = None
    general_protection: bool = False


class HostResult(msgspec.Struct):
    """What a host operation returned: a number, and frames for a dirty log."""

    result: int = 0
    gfns: list[int] = []


def _instruction(gva: int, asked: m.Instruction) -> Instruction:
    flags = asked.flags
    if asked.op is not None:
        kind = InstructionKind(asked.op.value)
    elif flags & AccessFlag.WRITE:
        kind = InstructionKind.WRITE
    elif flags & AccessFlag.FETCH:
        kind = InstructionKind.EXECUTE
    else:
        kind = InstructionKind.READ
    return Instruction(
        kind=kind,
        gva=gva,
        size=asked.size,
        value=asked.value,
        user=bool(flags & AccessFlag.USER),
        expected=asked.expected,
    )


def _fault(operation: Operation[k.FaultOutcome], run: VcpuRun) -> Operation[None]:
    outcome = yield from operation
    run.outcome = outcome.outcome.value
    match outcome.outcome:
        case k.Outcome.INJECT:
            assert outcome.inject is not None
            run.inject = m.InjectedFault(*outcome.inject)
        case k.Outcome.EMULATED:
            run.completed = m.Completed(outcome.value)
        case k.Outcome.MMIO:
            run.completed = m.Completed(0, mmio=True)
        case k.Outcome.RETRY:
            pass


def handle_exit(vcpu: Vcpu, reason: m.ExitReason | None) -> Operation[VcpuRun]:
    """The operation from an exit (None: the first entry, or one after a halt) to the next entry.

    A HaltExit is not for this function, and a SendIpiExit is delivered by the machine before.
    """
    run = VcpuRun("enter" if reason is None else m.tag_of(reason))
    match reason:
        case m.PageFaultExit(gva, error_code, asked):
            yield from _fault(k.kvm_mmu_page_fault(vcpu, gva, error_code, _instruction(gva, asked)), run)
        case m.EptMisconfigExit(gpa, asked):
            yield from _fault(k.handle_ept_misconfig(vcpu, gpa, _instruction(gpa, asked)), run)
        case m.InvlpgExit():
            yield from k.kvm_mmu_invlpg(vcpu, reason.gva)
        case m.RegisterWriteExit():
            match reason.register:
                case m.ControlRegister.CR0:
                    run.general_protection = yield from k.kvm_set_cr0(vcpu, reason.value)
                case m.ControlRegister.CR3:
                    run.general_protection = yield from k.kvm_set_cr3(vcpu, reason.value)
                case m.ControlRegister.CR4:
                    run.general_protection = yield from k.kvm_set_cr4(vcpu, reason.value)
                case m.ControlRegister.EFER:
                    run.general_protection = yield from k.set_efer(vcpu, reason.value)
            if run.general_protection:
                run.outcome = "general_protection"
            else:
                run.completed = m.Completed()
        case _:
            pass
    if run.completed is None and isinstance(reason, m.InvlpgExit | m.SendIpiExit | m.HaltExit):
        run.completed = m.Completed()
    run.entry = yield from k.vcpu_enter_guest(vcpu)
    return run


def _number(operation: Operation[int | bool]) -> Operation[HostResult]:
    result = yield from operation
    return HostResult(int(result))


def _nothing(operation: Operation[object]) -> Operation[HostResult]:
    yield from operation
    return HostResult()


def _if_present(kvm: Kvm, gfn: int, operation: Operation[None]) -> Operation[HostResult]:
    """Takes a page away, unless somebody has already: the host finds no entry to clear, and calls no notifier."""
    if not kvm.host.is_present(gfn):
        return HostResult(0)
    yield from operation
    return HostResult(1)


def _reclaim_idle(kvm: Kvm, gfns: list[int]) -> Operation[HostResult]:
    """Looks for pages that no shadow entry has used, and swaps them out."""
    gone = 0
    for gfn in gfns:
        if kvm.host.is_present(gfn) and not (
            yield from k.kvm_mmu_notifier_test_young(kvm, kvm.host.page(gfn))
        ):
            yield from k.host.reclaim(kvm, gfn)
            gone += 1
    return HostResult(gone)


def _dirty_log(kvm: Kvm, slot: int) -> Operation[HostResult]:
    dirty = yield from k.kvm_vm_ioctl_get_dirty_log(kvm, slot)
    return HostResult() if dirty is None else HostResult(len(dirty), sorted(dirty))


def _write_phys(kvm: Kvm, words: list[tuple[int, int]]) -> Operation[HostResult]:
    """A device writes: the frames are looked up for write, and the MMU hears nothing."""
    stored: list[tuple[int, int]] = []  # since anybody else could act
    try:
        for gpa, value in words:
            slot = kvm.host.slot(gpa >> 12)
            kvm.host.fault_in(slot, gpa >> 12)
            if not kvm.host.is_writable(gpa >> 12):
                _trace_stores(kvm, stored)
            yield from k.host.break_cow(kvm, slot, gpa >> 12)
            kvm.memory.write_in(slot, gpa, 8, value)
            if slot.memory.mapped:
                stored.append(((slot.memory.base_gfn - slot.base_gfn << 12) + gpa, value))
    finally:  # a slot may have gone
        _trace_stores(kvm, stored)
    return HostResult()


def _trace_stores(kvm: Kvm, stored: list[tuple[int, int]]) -> None:
    if stored and kvm.trace is not None:
        kvm.trace(DeviceStored(stored.copy()))
    stored.clear()


def _set_memory_region(kvm: Kvm, asked: m.SetMemoryRegion) -> Operation[HostResult]:
    """User space changes a slot; the memory of one that it has deleted it unmaps."""
    backing = k.Backing.HUGE_2M if asked.huge else k.Backing.SMALL
    region = k.MemorySlot(asked.slot, asked.gfn, asked.npages, backing)
    slot = yield from k.kvm_set_memory_region(kvm, region)
    if not asked.npages:
        yield from k.host.munmap(kvm, slot)
    return HostResult(1)


def _while_it_exists(operation: Operation[HostResult]) -> Operation[HostResult]:
    """Nothing happens if the memory slots are no longer such that the operation makes sense."""
    try:
        return (yield from operation)
    except k.KvmError:
        return HostResult(0)


def host_operation(kvm: Kvm, operation: m.HostOperation) -> Operation[HostResult]:
    """The model's operation for what the host agent asked."""
    return _while_it_exists(_host_operation(kvm, operation))


def _move(kvm: Kvm, gfn: int, writable: bool) -> Operation[HostResult]:
    yield from k.host.move(kvm, gfn, kvm.host.take_pfn(kvm.host.slot(gfn)), writable)
    return HostResult()


def _age(kvm: Kvm, gfn: int) -> Operation[HostResult]:
    return HostResult(int((yield from k.kvm_mmu_notifier_clear_flush_young(kvm, kvm.host.page(gfn)))))


def _test_age(kvm: Kvm, gfn: int) -> Operation[HostResult]:
    return HostResult(int((yield from k.kvm_mmu_notifier_test_young(kvm, kvm.host.page(gfn)))))


def _host_operation(kvm: Kvm, operation: m.HostOperation) -> Operation[HostResult]:
    match operation:
        case m.Unmap(gfn):
            return _if_present(kvm, gfn, k.host.unmap(kvm, gfn))
        case m.UnmapRange(gfn, npages):
            return _nothing(k.host.unmap_range(kvm, gfn, npages))
        case m.Reclaim(gfn):
            return _if_present(kvm, gfn, k.host.reclaim(kvm, gfn))
        case m.ReclaimIdle(gfns):
            return _reclaim_idle(kvm, gfns)
        case m.Move(gfn, writable):
            return _move(kvm, gfn, writable)
        case m.Age(gfn):
            return _age(kvm, gfn)
        case m.TestAge(gfn):
            return _test_age(kvm, gfn)
        case m.SetDirtyLog(slot, enable):
            return _nothing(k.set_dirty_logging(kvm, slot, enable))
        case m.GetDirtyLog(slot):
            return _dirty_log(kvm, slot)
        case m.SetMemoryRegion():
            return _set_memory_region(kvm, operation)
        case m.Shrink(n):
            return _number(k.mmu_shrink(kvm, n))
        case m.SetMmuPages(n):
            return _nothing(k.kvm_mmu_change_mmu_pages(kvm, n))
        case m.ZapAll():
            return _nothing(k.kvm_mmu_zap_all(kvm))
        case m.Migrate(vcpu, processor):
            return _nothing(k.migrate(kvm.vcpus[vcpu], processor))
        case m.WritePhys(words):
            return _write_phys(kvm, words)
        case m.SetRegisters(vcpu, cr0, cr3, cr4, efer):
            return _nothing(k.set_regs(kvm.vcpus[vcpu], cr0, cr3, cr4, efer))
