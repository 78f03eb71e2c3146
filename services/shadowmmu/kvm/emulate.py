"""Emulating one guest instruction that accesses memory, as far as the MMU is concerned.

The emulator of the model fetches no code: it is told what the instruction does.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from shadowmmu.cpu.x86 import PFERR_FETCH_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK, X86_CR0_WP
from shadowmmu.kvm.constants import ACC_USER_MASK, ACC_WRITE_MASK
from shadowmmu.kvm.effects import Operation
from shadowmmu.kvm.host import break_cow
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.mmio import vcpu_match_mmio_gfn, vcpu_match_mmio_gva
from shadowmmu.kvm.points import Point
from shadowmmu.kvm.pte_write import kvm_mmu_pte_write
from shadowmmu.kvm.store_buffer import GuestStore
from shadowmmu.kvm.walker import inject_page_fault
from shadowmmu.protocol.events import EmulatedLoad, LockedRead

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = [
    "FaultOutcome",
    "Instruction",
    "InstructionKind",
    "Outcome",
    "emulator_write_phys",
    "x86_emulate_instruction",
]


class InstructionKind(enum.Enum):
    """What an instruction does with its memory operand."""

    READ = "r"
    WRITE = "w"
    EXECUTE = "x"  # is fetched from it
    CMPXCHG = "cmpxchg"
    XCHG = "xchg"
    XADD = "xadd"


class Instruction(msgspec.Struct, frozen=True, gc=False):
    """One instruction: it accesses `size` bytes (1, 2, 4, 8) at `gva`, within one page, with user rights or not.

    `value` is what a write or exchange stores, what xadd adds, what cmpxchg stores if memory holds `expected`.
    """

    kind: InstructionKind
    gva: int
    size: int = 8
    value: int = 0
    user: bool = False
    expected: int = 0


class Outcome(enum.Enum):
    """What came of a page fault exit."""

    RETRY = "retry"  # enter the guest and try the access again
    INJECT = "inject"  # a page fault is queued for the guest
    EMULATED = "emulate"  # the instruction was executed
    MMIO = "mmio"  # it was, as far as KVM could: the address has no memory


class FaultOutcome(msgspec.Struct, frozen=True, gc=False):
    """What came of a page fault exit, with the emulated instruction's result.

    `value`: what was loaded (for a locked operation: the old value). `gpa`: where (bytes; -1 if it did not come to
    that). `inject`: error code and cr2 of the queued page fault.
    """

    outcome: Outcome
    value: int = 0
    gpa: int = -1
    inject: tuple[int, int] | None = None


RETRY = FaultOutcome(Outcome.RETRY)
"""The outcome of most exits."""


def _mmio_cached(vcpu: Vcpu, instruction: Instruction) -> bool:
    """Whether the vCPU's MMIO cache has the address, with the rights that the instruction needs."""
    if not vcpu_match_mmio_gva(vcpu, instruction.gva):
        return False
    access = vcpu.mmio_access
    if instruction.user and not access & ACC_USER_MASK:
        return False
    writes = instruction.kind is not InstructionKind.READ
    return not (writes and not access & ACC_WRITE_MASK and (instruction.user or vcpu.cr0 & X86_CR0_WP))


def x86_emulate_instruction(vcpu: Vcpu, instruction: Instruction) -> Operation[FaultOutcome]:
    """Execute one instruction; if the guest's tables forbid it, a page fault is queued."""
    kind = instruction.kind
    gva = instruction.gva
    kvm = vcpu.kvm
    kvm.work.emulations += 1
    if kind is not InstructionKind.EXECUTE and _mmio_cached(vcpu, instruction):
        return FaultOutcome(Outcome.MMIO, gpa=vcpu.mmio_gfn << 12 | gva & 0xFFF)
    access = PFERR_USER_MASK if instruction.user else 0
    if kind is InstructionKind.EXECUTE:
        access |= PFERR_FETCH_MASK
    elif kind is not InstructionKind.READ:
        access |= PFERR_WRITE_MASK
    walk = yield from vcpu.mmu.context.gva_to_gpa(vcpu, gva, access)
    if walk.fault is not None:
        if kvm.profile.pf_injection_no_sync:  # bug A6
            yield from vcpu.mmu.context.invlpg(vcpu, gva)
        inject_page_fault(vcpu, walk.fault, gva)
        return FaultOutcome(Outcome.INJECT, inject=(walk.fault, gva))
    gpa = walk.gpa
    mmio = FaultOutcome(Outcome.MMIO, gpa=gpa)
    data_access = kind is not InstructionKind.EXECUTE
    if kvm.visible_memslot(walk.gfn) is None or (data_access and vcpu_match_mmio_gfn(vcpu, walk.gfn)):
        return mmio
    yield Point.EMULATE_TRANSLATED
    slot = kvm.visible_memslot(walk.gfn)
    if slot is None:  # the slot has gone meanwhile
        return mmio
    value = 0
    if kind is InstructionKind.READ:
        if kvm.point_read_guest_memory:
            yield Point.READ_GUEST_MEMORY
        kvm.host.fault_in(slot, walk.gfn)
        value = kvm.memory.read_in(slot, gpa, instruction.size)
        if kvm.trace is not None:
            kvm.trace(EmulatedLoad(vcpu.vcpu_id, gpa, instruction.size, value))
    elif kind is InstructionKind.WRITE:
        yield from emulator_write_phys(vcpu, gpa, instruction.size, instruction.value)
    elif kind is not InstructionKind.EXECUTE:
        value = yield from _emulator_cmpxchg(vcpu, slot, gpa, instruction)
    return FaultOutcome(Outcome.EMULATED, value=value, gpa=gpa)


def emulator_write_phys(vcpu: Vcpu, gpa: int, size: int, value: int) -> Operation[bool]:
    """Store to guest memory, then tell the MMU of the table write; False outside of memory (nothing happens)."""
    kvm = vcpu.kvm
    slot = kvm.visible_memslot(gpa >> 12)
    if slot is None:
        return False
    kvm.host.fault_in(slot, gpa >> 12)
    yield from break_cow(kvm, slot, gpa >> 12)
    yield from _store(vcpu, slot, gpa, size, value, locked=False)
    return True


def _emulator_cmpxchg(vcpu: Vcpu, slot: KvmMemorySlot, gpa: int, instruction: Instruction) -> Operation[int]:
    """A locked read-modify-write, atomically on memory (emulator_cmpxchg_emulated); returns the old value.

    The kernel compares and exchanges with the value that the emulator read before, and runs the instruction again if
    that fails; both are one step here. The frame is marked dirty in the log, which 3.1 seems to forget on this path.
    """
    kvm = vcpu.kvm
    kvm.host.fault_in(slot, gpa >> 12)
    yield from break_cow(kvm, slot, gpa >> 12)
    if kvm.point_read_guest_memory:
        yield Point.READ_GUEST_MEMORY
    size = instruction.size
    mask = (1 << 8 * size) - 1
    old = kvm.memory.read_in(slot, gpa, size)
    if kvm.trace is not None:
        kvm.trace(LockedRead(vcpu.vcpu_id, gpa, size, old))
    if instruction.kind is InstructionKind.XADD:
        new = old + instruction.value & mask
    elif instruction.kind is InstructionKind.XCHG or old == instruction.expected & mask:
        new = instruction.value & mask
    else:
        new = old  # a failed cmpxchg writes the old value back
    if not kvm.profile.locked_op_emulation:  # bug B23: an exchange as a plain write
        yield Point.LOCKED_OP_COMPARED
        yield from emulator_write_phys(vcpu, gpa, size, new)
        return old
    yield from _store(vcpu, slot, gpa, size, new, locked=True)
    return old


def _store(
    vcpu: Vcpu, slot: KvmMemorySlot, gpa: int, size: int, value: int, *, locked: bool
) -> Operation[None]:
    """The store itself, the dirty log, and then kvm_mmu_pte_write: memory changes before the shadow does.

    With memory model `tso` a store that is not `locked` may become visible to others later than that.
    """
    kvm = vcpu.kvm
    store = GuestStore(slot, gpa, size, value, slot.dirty_bitmap)
    kvm.emulated_stores.add(vcpu.vcpu_id)
    if vcpu.store_buffer is None or locked:
        store.perform(vcpu)
    else:
        vcpu.store_buffer.put(store)
    yield Point.PTE_WRITE_STORED
    yield from kvm_mmu_pte_write(vcpu, gpa, value, size, True)
    kvm.emulated_stores.discard(vcpu.vcpu_id)
