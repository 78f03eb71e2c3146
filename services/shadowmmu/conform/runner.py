"""Doing the operations of a recording with the model, one after another (FORMAT.md sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from shadowmmu.conform.hardware import Fault, Misconfiguration, Translation, hardware_walk
from shadowmmu.conform.recording import Header, Line
from shadowmmu.conform.state import leaf_flags
from shadowmmu.cpu.x86 import PFERR_PRESENT_MASK
from shadowmmu.kvm import (
    EntryStatus,
    FaultOutcome,
    GuestEntry,
    Instruction,
    InstructionKind,
    Kvm,
    MmuLock,
    Operation,
    Outcome,
    Profile,
    Vcpu,
    VcpuMode,
    emulator_write_phys,
    handle_ept_misconfig,
    host,
    kvm_mmu_change_mmu_pages,
    kvm_mmu_get_spte_hierarchy,
    kvm_mmu_invlpg,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_test_young,
    kvm_mmu_page_fault,
    kvm_mmu_unprotect_page_virt,
    kvm_mmu_zap_all,
    kvm_pv_mmu_op_release_pt,
    kvm_set_cr3,
    kvm_vm_ioctl_get_dirty_log,
    mmu_shrink,
    prefault,
    set_dirty_logging,
    set_regs,
    vcpu_enter_guest,
)

__all__ = ["Runner", "drive"]

MAX_ATTEMPTS = 9
STATUS = {
    Outcome.INJECT: "injected",
    Outcome.EMULATED: "emulated",
    Outcome.MMIO: "mmio",
}
"""The status of an access that ended with an exit."""

Result = dict[str, Any]
T = TypeVar("T")


def drive(operation: Operation[T]) -> T:
    """Run an operation to its end with nobody else about; every kick is answered with "somebody was kicked".

    Raises AssertionError if the operation takes mmu_lock twice, releases it unheld or keeps it.
    """
    locked = False
    try:
        effect = next(operation)
        while True:
            if effect is MmuLock.ACQUIRE or effect is MmuLock.RELEASE:
                if locked is (effect is MmuLock.ACQUIRE):
                    raise AssertionError(f"mmu_lock: {effect.value} while {'held' if locked else 'free'}")
                locked = not locked
            effect = operation.send(True)
    except StopIteration as stop:
        if locked:
            raise AssertionError("mmu_lock is still held at the end of an operation") from None
        result: T = stop.value
        return result


class Runner:
    """A virtual machine as a recording's header describes it, and the operations on it."""

    def __init__(self, header: Header, profile: Profile) -> None:
        self.kvm = Kvm(header.config(profile))
        for _ in range(header.vcpus):
            self.kvm.create_vcpu()
        self.kvm.memory.start_recording()

    def perform(self, line: Line) -> Result:
        """Do one operation; returns its `result`. Raises KeyError for an operation that the format does not have."""
        return _OPERATIONS[line["op"]](self, line)

    def _vcpu(self, line: Line) -> Vcpu:
        return self.kvm.vcpus[line["vcpu"]]

    def _enter(self, vcpu: Vcpu) -> GuestEntry:
        entry = drive(vcpu_enter_guest(vcpu))
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        return entry

    def _store(self, gpa: int, size: int, value: int) -> None:
        """A store behind the MMU's back."""
        kvm = self.kvm
        slot = kvm.host.slot(gpa >> 12)
        kvm.host.fault_in(slot, gpa >> 12)
        drive(host.break_cow(kvm, slot, gpa >> 12))
        kvm.memory.write(gpa, size, value)

    # Operations

    def load(self, line: Line) -> Result:
        for gpa, value in line["words"]:
            self._store(gpa, 8, value)
        self.kvm.memory.take_changes()
        return {}

    def write_phys(self, line: Line) -> Result:
        self._store(line["gpa"], line["size"], line["value"])
        return {}

    def emul_write(self, line: Line) -> Result:
        done = drive(emulator_write_phys(self._vcpu(line), line["gpa"], line["size"], line["value"]))
        return {"ok": int(done)}

    def set_regs(self, line: Line) -> Result:
        drive(set_regs(self._vcpu(line), line["cr0"], line["cr3"], line["cr4"], line["efer"]))
        return {}

    def mov_cr3(self, line: Line) -> Result:
        return {"gp": int(drive(kvm_set_cr3(self._vcpu(line), line["cr3"])))}

    def enter(self, line: Line) -> Result:
        entry = self._enter(self._vcpu(line))
        return {"status": entry.status.value, "passes": entry.passes}

    def access(self, line: Line) -> Result:
        vcpu = self._vcpu(line)
        kind = InstructionKind(line["kind"])
        gva, size, user = line["gva"], line["size"], line["user"]
        instruction = Instruction(kind, gva, size, line.get("value", 0), user)
        exits: list[Result] = []
        result: Result = {"exits": exits}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if self._enter(vcpu).status is EntryStatus.SHUTDOWN:
                return result | {"status": "shutdown"}
            walk = hardware_walk(vcpu, gva, kind, user)
            if isinstance(walk, Translation):
                return result | self._access_memory(instruction, walk)
            if isinstance(walk, Fault) and self._bypasses(walk):
                return result | {"status": "bypassed", "inject": [walk.error_code, gva]}
            if attempt == MAX_ATTEMPTS:
                break
            if isinstance(walk, Misconfiguration):
                outcome = drive(handle_ept_misconfig(vcpu, gva, instruction))
            else:
                outcome = drive(kvm_mmu_page_fault(vcpu, gva, walk.error_code, instruction))
            error_code = "misconfig" if isinstance(walk, Misconfiguration) else walk.error_code
            exits.append({"error_code": error_code, "outcome": outcome.outcome.value})
            if outcome.outcome is not Outcome.RETRY:
                return result | _end_of_access(instruction, outcome)
        return result | {"status": "stuck"}

    def _access_memory(self, instruction: Instruction, walk: Translation) -> Result:
        """The access happens."""
        result: Result = {
            "status": "ok",
            "pfn": walk.pfn,
            "gfn": walk.gfn,
            "level": walk.level,
            "flags": leaf_flags(self.kvm, walk.spte, walk.level),
        }
        gpa = walk.gfn << 12 | instruction.gva & 0xFFF
        if instruction.kind is InstructionKind.READ:
            result["value"] = self.kvm.memory.read(gpa, instruction.size)
        elif instruction.kind is InstructionKind.WRITE:
            self.kvm.memory.write(gpa, instruction.size, instruction.value)
        return result

    def _bypasses(self, fault: Fault) -> bool:
        """Whether the fault goes to the guest without an exit."""
        return self.kvm.bypass_guest_pf and not fault.error_code & PFERR_PRESENT_MASK

    def invlpg(self, line: Line) -> Result:
        vcpu = self._vcpu(line)
        entry = self._enter(vcpu)
        if entry.status is EntryStatus.OK:
            drive(kvm_mmu_invlpg(vcpu, line["gva"]))
        return {"status": entry.status.value}

    def prefault(self, line: Line) -> Result:
        ret = drive(prefault(self._vcpu(line), line["gva"]))
        return {"ret": "noload" if ret is None else ret}

    def unprotect(self, line: Line) -> Result:
        return {"ret": int(drive(kvm_mmu_unprotect_page_virt(self._vcpu(line), line["gva"])))}

    def pv_release_pt(self, line: Line) -> Result:
        return {"ret": drive(kvm_pv_mmu_op_release_pt(self._vcpu(line), line["gpa"]))}

    def hierarchy(self, line: Line) -> Result:
        return {"n": len(kvm_mmu_get_spte_hierarchy(self._vcpu(line), line["gva"]))}

    def unmap(self, line: Line) -> Result:
        drive(host.unmap(self.kvm, line["gfn"]))
        return {}

    def unmap_range(self, line: Line) -> Result:
        drive(host.unmap_range(self.kvm, line["gfn"], line["npages"]))
        return {}

    def split(self, line: Line) -> Result:
        return {"split": int(drive(host.split(self.kvm, line["gfn"])))}

    def move(self, line: Line) -> Result:
        drive(host.move(self.kvm, line["gfn"], line["pfn"], bool(line["writable"])))
        return {}

    def age(self, line: Line) -> Result:
        return {"young": int(drive(kvm_mmu_notifier_clear_flush_young(self.kvm, line["gfn"])))}

    def test_age(self, line: Line) -> Result:
        return {"young": int(drive(kvm_mmu_notifier_test_young(self.kvm, line["gfn"])))}

    def set_dirty_log(self, line: Line) -> Result:
        drive(set_dirty_logging(self.kvm, line["slot"], bool(line["enable"])))
        return {}

    def dirty_log(self, line: Line) -> Result:
        return {"dirty": drive(kvm_vm_ioctl_get_dirty_log(self.kvm, line["slot"]))}

    def zap_all(self, line: Line) -> Result:  # noqa: ARG002 - as all operations
        drive(kvm_mmu_zap_all(self.kvm))
        return {}

    def shrink(self, line: Line) -> Result:
        return {"total": drive(mmu_shrink(self.kvm, line["n"]))}

    def set_mmu_pages(self, line: Line) -> Result:
        drive(kvm_mmu_change_mmu_pages(self.kvm, line["n"]))
        return {}


def _end_of_access(instruction: Instruction, outcome: FaultOutcome) -> Result:
    result: Result = {"status": STATUS[outcome.outcome]}
    if outcome.outcome is Outcome.INJECT and outcome.inject is not None:
        result["inject"] = list(outcome.inject)
    elif outcome.outcome in (Outcome.EMULATED, Outcome.MMIO):
        result["gpa"] = outcome.gpa
        if outcome.outcome is Outcome.EMULATED and instruction.kind is InstructionKind.READ:
            result["value"] = outcome.value
    return result


_OPERATIONS: dict[str, Callable[[Runner, Line], Result]] = {
    function.__name__: function
    for function in (
        Runner.load,
        Runner.write_phys,
        Runner.emul_write,
        Runner.set_regs,
        Runner.mov_cr3,
        Runner.enter,
        Runner.access,
        Runner.invlpg,
        Runner.prefault,
        Runner.unprotect,
        Runner.pv_release_pt,
        Runner.hierarchy,
        Runner.unmap,
        Runner.unmap_range,
        Runner.split,
        Runner.move,
        Runner.age,
        Runner.test_age,
        Runner.set_dirty_log,
        Runner.dirty_log,
        Runner.zap_all,
        Runner.shrink,
        Runner.set_mmu_pages,
    )
}
"""What to do for each `op`."""
