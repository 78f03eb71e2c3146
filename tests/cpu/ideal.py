"""A machine without a hypervisor's tricks: guest tables are walked as they are, memory is a bytearray.

It plays the MMU service for some `VcpuCore`s, message by message, in an order that a seeded generator chooses, with
kicks that come out of the blue. Both ends of each conversation are real `Session`s, so every message's legality is
checked. Everything that the guest does is as on a processor with ideal nested paging, whose TLB is the core's.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator

from shadowmmu.cpu import Translation, VcpuCore, WalkFault, boot_image, hardware_walk, make_program
from shadowmmu.cpu.guest.kernel import Kernel
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.session import Session
from shadowmmu.protocol.states import MMU, Side

WRITE = int(AccessFlag.WRITE)


class IdealTables:
    """Guest tables as `hardware_walk` wants them; a table is its frame."""

    def __init__(self, machine: IdealMachine) -> None:
        self.machine = machine

    def read(self, table: int, index: int) -> int:
        if table >= self.machine.config.memory_pages:
            return 0
        return self.machine.load((table << 12) + 8 * index, 8)

    def child(self, table: int, index: int, entry: int) -> int:
        return (entry & ((1 << 52) - 1)) >> 12

    def set_bits(self, table: int, index: int, expected: int, bits: int) -> bool:
        assert self.read(table, index) == expected
        self.machine.store((table << 12) + 8 * index, 8, expected | bits)
        return True


def finish(walk: Iterator[None]) -> Translation | WalkFault:
    while True:
        try:
            next(walk)
        except StopIteration as stop:
            result: Translation | WalkFault = stop.value
            return result


class Vcpu:
    """A core, its conversation, and the registers that the service keeps for it."""

    def __init__(self, core: VcpuCore, registers: m.SetRegisters) -> None:
        self.core = core
        self.peer = Session(MMU, Side.PEER)
        self.service = Session(MMU, Side.SERVICE)
        self.up: deque[m.Envelope] = deque()
        self.down: deque[m.Envelope] = deque()
        self.cr0 = registers.cr0
        self.cr3 = registers.cr3
        self.entry = 0
        self.in_guest = False
        self.halted = False
        self.detached = False
        self.interrupts: set[int] = set()
        self.service.receive(self.peer.send(m.Attach(m.Role.VCPU, "test")))
        self.peer.receive(self.service.send(m.Attached(registers.vcpu, 1, vpid=True, heartbeat=1.0)))


class IdealMachine:
    """`vcpus` cores that run `config`'s workload.

    `kick_rate`: kicks per message; `emulate_rate`: share of the walks that fault although they need not, and whose
    instruction is then executed by the service; `watch(vcpu, access)` sees every access when it is applied.
    """

    def __init__(
        self,
        config: m.RunConfig,
        vcpus: int,
        *,
        kick_rate: float = 0.02,
        emulate_rate: float = 0.02,
        flush_rate: float = 0.01,
        watch: Callable[[int, m.LoggedAccess], None] | None = None,
    ) -> None:
        self.config = config
        self.memory = bytearray(config.memory_pages << 12)
        self.random = random.Random(config.seed)
        self.kick_rate = kick_rate
        self.emulate_rate = emulate_rate
        self.flush_rate = flush_rate
        self.watch = watch
        self.counts: Counter[str] = Counter()
        self.tables = IdealTables(self)
        image = boot_image(config, vcpus)
        for gpa, value in image.words:
            self.store(gpa, 8, value)
        self.programs = [make_program(config, n, vcpus) for n in range(vcpus)]
        self.vcpus = [
            Vcpu(VcpuCore(config, n, vcpus, program), image.registers[n])
            for n, program in enumerate(self.programs)
        ]

    def kernel(self, vcpu: int) -> Kernel:
        program = self.programs[vcpu]
        assert isinstance(program, Kernel)
        return program

    # --- memory --------------------------------------------------------------------------------------------------

    def load(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.memory[gpa : gpa + size], "little")

    def store(self, gpa: int, size: int, value: int) -> None:
        assert gpa + size <= len(self.memory)
        self.memory[gpa : gpa + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def walk(self, vcpu: Vcpu, gva: int, flags: int) -> Translation | WalkFault:
        return finish(hardware_walk(self.tables, vcpu.cr3 >> 12, gva, flags))

    # --- the order of things -------------------------------------------------------------------------------------

    def run(self, rounds: int = 1_000_000) -> None:
        """Until all programs have executed their share; then lets them leave."""
        for vcpu in self.vcpus:
            vcpu.core.start()
        for _ in range(rounds):
            if not self.round():
                break
            if all(vcpu.core.done for vcpu in self.vcpus):
                break
        assert all(vcpu.core.done for vcpu in self.vcpus), self.describe()
        for vcpu in self.vcpus:
            vcpu.core.drain()
        while self.round():
            pass
        assert all(vcpu.detached and vcpu.core.left for vcpu in self.vcpus)

    def describe(self) -> str:
        return "; ".join(
            f"{n}: {v.core.instructions} waiting={v.core.waiting} halted={v.halted} top={self.kernel(n).stack[-3:]}"
            for n, v in enumerate(self.vcpus)
        )

    def round(self) -> bool:
        """Lets each vCPU do a bit, in random order. False if nothing could be done at all."""
        moved = False
        for number in self.random.sample(range(len(self.vcpus)), len(self.vcpus)):
            vcpu = self.vcpus[number]
            if not vcpu.core.waiting and self.random.random() < 0.8:
                moved |= vcpu.core.run(1 + self.random.randrange(100)) > 0
            if vcpu.core.log_pending and self.random.random() < 0.1:
                vcpu.core.ship_log()
            for body in vcpu.core.take_output():
                vcpu.up.append(vcpu.peer.send(body))
                moved = True
            for _ in range(self.random.randrange(4)):
                moved |= self.step(number)
            if vcpu.down and self.random.random() < 0.9:
                moved = True
                envelope = vcpu.down.popleft()
                if vcpu.peer.receive(envelope):
                    vcpu.core.receive(envelope.body)  # type: ignore[arg-type]
        return moved or any(v.up or v.down or not v.core.waiting or v.core.log_pending for v in self.vcpus)

    def reply(self, vcpu: Vcpu, body: m.MmuMessage) -> None:
        vcpu.down.append(vcpu.service.send(body))

    def step(self, number: int) -> bool:
        """The service takes one message of a vCPU."""
        vcpu = self.vcpus[number]
        if not vcpu.up:
            return False
        envelope = vcpu.up.popleft()
        assert vcpu.service.receive(envelope)
        self.serve(number, vcpu, envelope.body)
        if self.random.random() < self.kick_rate:
            target = self.random.choice(self.vcpus)
            if target.in_guest:
                self.counts["kicks"] += 1
                self.reply(target, m.Kick(target.entry))
        return True

    # --- the service ---------------------------------------------------------------------------------------------

    def serve(self, number: int, vcpu: Vcpu, body: m.Message) -> None:
        match body:
            case m.Enter():
                self.enter(vcpu)
            case m.Log():
                for access in body.accesses:
                    self.apply(number, access)
                self.reply(vcpu, m.Applied(1))
            case m.Load():
                self.reply(vcpu, m.Loaded(vcpu.entry, self.apply(number, body.access)))
            case m.Locked():
                _, gva, pfn, size, value = body.access
                old = self.locked((pfn << 12) + (gva & 0xFFF), size, body.op, value, body.expected)
                if self.watch is not None:
                    self.watch(number, body.access)
                self.reply(vcpu, m.Loaded(vcpu.entry, old))
            case m.Walk():
                self.serve_walk(vcpu, body)
            case m.Exit():
                vcpu.in_guest = False
                self.exit(number, vcpu, body.reason)
            case m.Detach():
                vcpu.detached = True
                vcpu.in_guest = False
            case _:
                raise AssertionError(body)

    def apply(self, number: int, access: m.LoggedAccess) -> int:
        flags, gva, pfn, size, value = access
        if self.watch is not None:
            self.watch(number, access)
        gpa = (pfn << 12) + (gva & 0xFFF)
        if flags & WRITE:
            self.store(gpa, size, value)
            return value
        return self.load(gpa, size)

    def locked(self, gpa: int, size: int, op: m.LockedOp, value: int, expected: int) -> int:
        old = self.load(gpa, size)
        match op:
            case m.LockedOp.XCHG:
                self.store(gpa, size, value)
            case m.LockedOp.XADD:
                self.store(gpa, size, old + value)
            case m.LockedOp.CMPXCHG:
                if old == expected:
                    self.store(gpa, size, value)
        return old

    def serve_walk(self, vcpu: Vcpu, walk: m.Walk) -> None:
        self.counts["walks"] += 1
        result = self.walk(vcpu, walk.gva, walk.flags)
        if isinstance(result, WalkFault):
            self.reply(vcpu, m.WalkFault(vcpu.entry, walk.walk, result.error_code))
        elif result.pfn >= self.config.memory_pages or self.random.random() < self.emulate_rate:
            self.reply(vcpu, m.WalkFault(vcpu.entry, walk.walk, 1))
        else:
            self.reply(vcpu, m.Walked(vcpu.entry, walk.walk, result.pfn, result.level, result.flags))

    def enter(self, vcpu: Vcpu, **what: object) -> None:
        vcpu.entry += 1
        vcpu.in_guest = True
        vcpu.halted = False
        vectors = sorted(vcpu.interrupts)
        vcpu.interrupts.clear()
        flush = bool(what.pop("flush", False)) or self.random.random() < self.flush_rate
        self.reply(vcpu, m.Entered(vcpu.entry, flush=flush, interrupts=vectors, **what))  # type: ignore[arg-type]

    def exit(self, number: int, vcpu: Vcpu, reason: m.ExitReason) -> None:
        self.counts[reason.__struct_config__.tag] += 1  # type: ignore[index]
        match reason:
            case m.PageFaultExit():
                self.page_fault(number, vcpu, reason)
            case m.RegisterWriteExit():
                if reason.register is m.ControlRegister.CR3:
                    vcpu.cr3 = reason.value
                elif reason.register is m.ControlRegister.CR0:
                    vcpu.cr0 = reason.value
                self.enter(vcpu, flush=True)
            case m.SendIpiExit():
                for target in reason.targets:
                    assert target != number
                    self.vcpus[target].interrupts.add(reason.vector)
                    if self.vcpus[target].halted:
                        self.enter(self.vcpus[target])
                    elif self.vcpus[target].in_guest:
                        self.reply(self.vcpus[target], m.Kick(self.vcpus[target].entry))
                self.enter(vcpu)
            case m.HaltExit():
                if vcpu.interrupts:
                    self.enter(vcpu)
                else:
                    vcpu.halted = True
            case m.InvlpgExit() | m.ExternalInterruptExit():
                self.enter(vcpu)

    def page_fault(self, number: int, vcpu: Vcpu, reason: m.PageFaultExit) -> None:
        instruction = reason.instruction
        flags = instruction.flags
        result = self.walk(vcpu, reason.gva, flags)
        if isinstance(result, WalkFault) and not vcpu.cr0 & (1 << 16) and not flags & AccessFlag.USER:
            result = self.walk(vcpu, reason.gva, flags & ~WRITE)  # CR0.WP is off
        if isinstance(result, WalkFault):
            self.enter(vcpu, inject=m.InjectedFault(result.error_code, reason.gva))
            return
        if result.pfn >= self.config.memory_pages:
            self.counts["mmio"] += 1
            self.enter(vcpu, completed=m.Completed(0, mmio=True))
            return
        frame = result.pfn + ((reason.gva >> 12) & 511 if result.level > 1 else 0)
        gpa = (frame << 12) + (reason.gva & 0xFFF)
        if instruction.op is not None:
            value = self.locked(
                gpa, instruction.size, instruction.op, instruction.value, instruction.expected
            )
        else:
            value = self.apply(number, (flags, reason.gva, frame, instruction.size, instruction.value))
        self.enter(vcpu, completed=m.Completed(value))
