"""A small world for tests of the model: guest tables, processors with TLBs, and drivers.

The processors here remember every translation they have used until they are flushed, which is as stale as a real TLB
may be.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

from shadowmmu.conform.hardware import Fault, Misconfiguration, hardware_walk
from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
)
from shadowmmu.kvm import (
    Effect,
    EntryStatus,
    FaultOutcome,
    Instruction,
    InstructionKind,
    Kick,
    Kvm,
    KvmConfig,
    MemorySlot,
    MmuLock,
    Operation,
    Outcome,
    Profile,
    Vcpu,
    VcpuMode,
    kvm_mmu_page_fault,
    set_regs,
    vcpu_enter_guest,
)
from shadowmmu.protocol.events import Event

P, W, U, A, D = PT_PRESENT_MASK, PT_WRITABLE_MASK, PT_USER_MASK, PT_ACCESSED_MASK, PT_DIRTY_MASK
TABLE = P | W | U | A
PAGE = P | W | U | A | D
READ, WRITE, EXECUTE = InstructionKind.READ, InstructionKind.WRITE, InstructionKind.EXECUTE
CR0 = X86_CR0_PG | X86_CR0_PE | X86_CR0_WP
EFER_64 = EFER_LME | EFER_LMA | EFER_NX


def drive(operation: Operation[Any]) -> Any:
    """Run an operation to its end with nobody else about and nobody to kick."""
    try:
        while True:
            next(operation)
    except StopIteration as stop:
        return stop.value


def points(operation: Operation[Any]) -> Iterator[Effect]:
    """The effects of an operation that runs alone."""
    try:
        while True:
            yield next(operation)
    except StopIteration:
        return


class Running:
    """An operation that a test runs step by step.

    Whose operations `Srcu.SYNCHRONIZE` waits for is the test's business.
    """

    def __init__(self, world: "World", operation: Operation[Any]) -> None:
        self._world = world
        self._operation = operation
        self.result: Any = None
        self.done = False
        self.effect: object = None

    def step(self) -> object:
        """One effect further; None at the end. Takes and releases mmu_lock, lets kicked vCPUs exit."""
        answer = None
        if isinstance(self.effect, Kick):
            for vcpu_id in self.effect.vcpus:
                self._world.exit(self._world.kvm.vcpus[vcpu_id])
            answer = bool(self.effect.vcpus)
        elif self.effect is MmuLock.ACQUIRE:
            assert self._world.lock_owner is None, "mmu_lock is not free"
            self._world.lock_owner = self
        try:
            self.effect = self._operation.send(answer) if self.effect is not None else next(self._operation)
        except StopIteration as stop:
            self.result, self.done, self.effect = stop.value, True, None
        if self.effect is MmuLock.RELEASE:
            assert self._world.lock_owner is self
            self._world.lock_owner = None
        return self.effect

    def until(self, effect: object) -> "Running":
        """Run up to that effect (not past it)."""
        while self.step() != effect:
            assert not self.done, f"{effect} was not reached"
        return self

    def finish(self) -> Any:
        """Run to the end; returns the result."""
        while not self.done:
            self.step()
        return self.result


class World:
    """A machine of some vCPUs with 4 KiB slots, 64-bit tables, and a TLB per vCPU.

    `root` is the guest frame of the top table. `tlbs[i]` maps a page number of vCPU i to (host frame, writable).
    """

    root = 16

    def __init__(self, vcpus: int = 2, profile: str = "linux-3.1", npages: int = 4096, **config: Any) -> None:
        self.events: list[Event] = []
        slots = config.pop("memslots", (MemorySlot(0, 0, npages),))
        self.kvm = Kvm(
            KvmConfig(memslots=slots, profile=Profile.parse(profile), **config), self.events.append
        )
        self.vcpus: list[Vcpu] = [self.kvm.create_vcpu() for _ in range(vcpus)]
        self.tlbs: list[dict[int, tuple[int, bool]]] = [{} for _ in range(vcpus)]
        self.lock_owner: object = None

    # Guest tables

    def gpte(self, table: int, index: int) -> int:
        return self.kvm.memory.read((table << 12) + 8 * index, 8)

    def set_gpte(self, table: int, index: int, gfn: int, bits: int = PAGE) -> None:
        """Write a guest entry behind the MMU's back."""
        self.kvm.memory.write((table << 12) + 8 * index, 8, gfn << 12 | bits if bits else 0)

    def boot(self) -> None:
        """All vCPUs in 64-bit mode on the root."""
        for vcpu in self.vcpus:
            drive(set_regs(vcpu, CR0, self.root << 12, X86_CR4_PAE, EFER_64))

    # Processors

    def exit(self, vcpu: Vcpu) -> None:
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE

    def run(self, operation: Operation[Any]) -> Any:
        return Running(self, operation).finish()

    def start(self, operation: Operation[Any]) -> Running:
        return Running(self, operation)

    def enter(self, vcpu: Vcpu) -> None:
        if vcpu.mode is VcpuMode.OUTSIDE_GUEST_MODE:
            entry = self.run(vcpu_enter_guest(vcpu))
            assert entry.status is EntryStatus.OK
            if entry.hw_flushes or entry.root_loaded:
                self.tlbs[vcpu.vcpu_id].clear()

    def translate(self, vcpu: Vcpu, gva: int, write: bool = False) -> Fault | int:
        """The host frame of an address by the TLB, or by a walk, which the TLB then remembers."""
        tlb = self.tlbs[vcpu.vcpu_id]
        page = gva >> 12
        if page in tlb and (tlb[page][1] or not write):
            return tlb[page][0]
        walk = hardware_walk(vcpu, gva, WRITE if write else READ, True)
        assert not isinstance(walk, Misconfiguration)
        if isinstance(walk, Fault):
            tlb.pop(page, None)
            return walk
        tlb[page] = (walk.pfn, write)
        return walk.pfn

    def access(self, vcpu: Vcpu, gva: int, write: bool = False, value: int = 0) -> FaultOutcome | int:
        """A user access of 8 bytes, with as many exits as it takes: the value loaded, or why it ended otherwise."""
        for _ in range(9):
            self.enter(vcpu)
            pfn = self.translate(vcpu, gva, write)
            if not isinstance(pfn, Fault):
                return self._perform(pfn, gva, write, value)
            self.exit(vcpu)
            kind = WRITE if write else READ
            instruction = Instruction(kind, gva, 8, value, user=True)
            outcome: FaultOutcome = self.run(kvm_mmu_page_fault(vcpu, gva, pfn.error_code, instruction))
            if outcome.outcome is not Outcome.RETRY:
                return outcome
        raise AssertionError("the access makes no progress")

    def try_store(self, vcpu: Vcpu, gva: int, value: int) -> bool:
        """A store that must not exit: returns whether it went through."""
        if vcpu.mode is VcpuMode.OUTSIDE_GUEST_MODE:
            return False
        pfn = self.translate(vcpu, gva, write=True)
        if isinstance(pfn, Fault):
            return False
        self._perform(pfn, gva, True, value)
        return True

    def _perform(self, pfn: int, gva: int, write: bool, value: int) -> int:
        located = self.kvm.host.locate(pfn)
        assert located is not None
        memory, page = located
        offset = page - memory.base << 12 | gva & 0xFFF
        if write:
            memory.write(offset, 8, value)
            return value
        return memory.read(offset, 8)

    # What must hold

    def is_write_protected(self, gfn: int) -> bool:
        """Whether KVM believes that no store to the frame goes by without an exit."""
        return any(not (sp.direct or sp.invalid or sp.unsync) for sp in self.kvm.mmu_page_hash.get(gfn, ()))

    def breaches(self) -> list[tuple[int, int]]:
        """(vCPU, guest frame) of each TLB entry that would let a vCPU write a protected table without an exit."""
        return [
            (vcpu.vcpu_id, gfn)
            for vcpu in self.vcpus
            if vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE
            for pfn, writable in self.tlbs[vcpu.vcpu_id].values()
            if writable and (gfn := self.kvm.host.gfn_of(pfn)) is not None and self.is_write_protected(gfn)
        ]


def gva(l4: int = 0, l3: int = 0, l2: int = 0, l1: int = 0, offset: int = 0) -> int:
    """The address with these table indices."""
    return l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12 | offset


def identity_map(world: World, first_table: int = 4, pages: int = 64) -> None:
    """Map frames 0 to `pages` - 1 at gva(l4=1, l1=frame), by three tables that nothing else uses."""
    world.set_gpte(world.root, 1, first_table, TABLE)
    world.set_gpte(first_table, 0, first_table + 1, TABLE)
    world.set_gpte(first_table + 1, 0, first_table + 2, TABLE)
    for frame in range(pages):
        world.set_gpte(first_table + 2, frame, frame)


def frame_address(gfn: int, offset: int = 0) -> int:
    """Where identity_map maps a frame."""
    return gva(l4=1, l1=gfn, offset=offset)


def choice(random: Random, *items: Any) -> Any:
    return items[random.randrange(len(items))]
