"""The last stretch of a recorded run as a scenario: what the vCPUs executed and the host did before a violation.

A real run has hundreds of thousands of instructions; a race needs a few dozen. The scenario begins with the guest's
memory, registers and slots as they were some messages before the violation, and with empty shadow tables and TLBs,
and has the instructions and host operations that came after. Whether the violation can be had from that is for a search
to find out: what was left out may have mattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from shadowmmu.cpu.x86 import PT_PAGE_SIZE_MASK, PT_PRESENT_MASK
from shadowmmu.explorer.actors import Actor, host, vcpu
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    ChangeRegister,
    HostStep,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    MachineSpec,
    Registers,
    Scenario,
    SendIpi,
    SetupStep,
    Slot,
    Step,
)
from shadowmmu.explorer.workload import describe_operation
from shadowmmu.explorer.workload_program import describe_instruction
from shadowmmu.kvm import Kvm
from shadowmmu.kvm.gpte import GuestFormat
from shadowmmu.machine import Attached, Header, HostAsked, JournalError, Machine, Record, Replayer, VcpuSent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag

__all__ = ["Window", "journal_window"]

_EVERY_BIT: Final = (1 << 64) - 1


class Window(NamedTuple):
    """The scenario, and the order in which instructions (`vN`) and host operations (`h0`) were executed in the run."""

    scenario: Scenario
    order: tuple[Actor, ...]


def journal_window(records: Sequence[Record], end: int, messages: int) -> Window:
    """The last `messages` messages of vCPUs up to record number `end`, none from before all vCPUs were ready.

    `records` are those of a journal, the header first. Raises JournalError if they do not begin with one.
    """
    header = records[0]
    if not isinstance(header, Header):
        raise JournalError("record 0: a header is expected")
    start = end
    left = messages
    first = 1 + max((number for number in range(1, end + 1) if _prepares(records[number])), default=0)
    while start > first and left:
        start -= 1
        left -= isinstance(records[start], VcpuSent)
    replayer = Replayer(header)
    for number in range(1, start):
        replayer.consume(number, records[number])
    machine = replayer.machine
    window = records[start : end + 1]
    config = header.config
    steps, operations, order = _executed(window, len(machine.kvm.vcpus))
    scenario = Scenario(
        name=f"{config.workload.value}-{config.seed}-record-{end}",
        machine=MachineSpec(
            slots=tuple(
                Slot(slot.id, slot.base_gfn, slot.npages, slot.backing.value) for slot in machine.kvm.memslots
            ),
            registers=tuple(Registers(v.cr0, v.cr3, v.cr4, v.efer) for v in machine.kvm.vcpus),
            mmu_pages=config.mmu_pages,
            vpid=config.vpid,
            tdp=config.tdp,
            tso=config.memory_model is m.MemoryModel.TSO,
        ),
        words=tuple(_words(machine)),
        setup=tuple(_logging(machine)),
        programs=tuple(map(tuple, steps)),
        hosts=(tuple(operations),) if operations else (),
        title=f"records {start} to {end} of a run of workload {config.workload.value}, seed {config.seed}",
        profile=config.profile,
    )
    return Window(scenario, tuple(order))


def _prepares(record: Record) -> bool:
    """Whether it is part of a vCPU's beginning, which scenarios have behind them."""
    return isinstance(record, Attached) or (
        isinstance(record, HostAsked) and isinstance(record.operation, m.SetRegisters)
    )


def _words(machine: Machine) -> Iterator[tuple[int, int]]:
    """(gpa, value) of each word that is not 0 in a frame that some vCPU's walk may read as a table.

    What else the memory holds is data, and nobody decides anything by it.
    """
    tables: set[int] = set()
    for unit in machine.kvm.vcpus:
        if unit.is_paging:
            _tables(machine.kvm, unit.mmu.fmt, unit.cr3 >> 12, tables)
    for gfn in sorted(tables):
        slot = machine.kvm.visible_memslot(gfn)
        assert slot is not None
        first = gfn - slot.base_gfn << 9
        for index, word in enumerate(slot.words[first : first + 512]):
            if word:
                yield (gfn << 12) + (index << 3), word


def _tables(kvm: Kvm, fmt: GuestFormat, root: int, tables: set[int]) -> None:
    """Adds the frames below `root` that may be read as tables, whatever they hold."""
    todo = [(root, fmt.root_level)]
    seen: set[tuple[int, int]] = set()
    while todo:
        gfn, level = todo.pop()
        slot = kvm.visible_memslot(gfn)
        if slot is None or (gfn, level) in seen:
            continue
        seen.add((gfn, level))
        tables.add(gfn)
        if level == 1:
            continue
        entries = slot.words if fmt.entry_size == 8 else slot.dwords
        first = (gfn - slot.base_gfn << 12) // fmt.entry_size
        for entry in entries[first : first + 4096 // fmt.entry_size]:
            large = entry & PT_PAGE_SIZE_MASK and fmt.large_levels >> level & 1
            if entry & PT_PRESENT_MASK and not large:
                todo.append(((entry & fmt.base_addr_mask) >> 12, level - 1))


def _logging(machine: Machine) -> Iterator[SetupStep]:
    """What turns dirty logging on again where it was."""
    for slot in machine.kvm.memslots:
        if slot.dirty_bitmap is not None:
            operation = m.SetDirtyLog(slot.id, enable=True)
            yield SetupStep(-1, HostStep(describe_operation(operation), operation))


def _executed(window: Sequence[Record], vcpus: int) -> tuple[list[list[Step]], list[HostStep], list[Actor]]:
    """What each vCPU executed, what the host did, and the order of it all.

    An access that exited and was tried again counts once.
    """
    bodies = [
        [record.body for record in window if isinstance(record, VcpuSent) and record.vcpu == number]
        for number in range(vcpus)
    ]
    position = [0] * vcpus
    steps: list[list[Step]] = [[] for _ in range(vcpus)]
    operations: list[HostStep] = []
    order: list[Actor] = []
    for record in window:
        match record:
            case VcpuSent(number, body):
                position[number] += 1
                for instruction in _instructions(body, bodies[number][position[number] :]):
                    steps[number].append(Step(describe_instruction(instruction), instruction))
                    order.append(vcpu(number))
            case HostAsked(_, operation) if not isinstance(operation, m.SetRegisters):
                operations.append(HostStep(describe_operation(operation), operation))
                order.append(host(0))
            case _:
                pass
    return steps, operations, order


def _instructions(body: object, later: Sequence[object]) -> Iterator[Instruction]:
    match body:
        case m.Log():
            for flags, gva, _, size, value in body.accesses:
                yield _access(flags, gva, size, value)
        case m.Load():
            flags, gva, _, size, _ = body.access
            yield _access(flags, gva, size, 0)
        case m.Locked():
            flags, gva, _, size, operand = body.access
            user = bool(flags & AccessFlag.USER)
            yield Locked(body.op, gva, operand, body.expected, size, user)
        case m.Exit(_, m.PageFaultExit(gva, _, asked)):
            instruction = _asked(gva, asked)
            if instruction != next((i for other in later for i in _instructions(other, ())), None):
                yield instruction
        case m.Exit(_, m.InvlpgExit(gva)):
            yield Invlpg(gva)
        case m.Exit(_, m.RegisterWriteExit(m.ControlRegister.CR3, value)):
            yield LoadCr3(value)
        case m.Exit(_, m.RegisterWriteExit(register, value)):
            yield ChangeRegister(register, value, ~value & _EVERY_BIT)
        case m.Exit(_, m.SendIpiExit(targets, vector)):
            yield SendIpi(tuple(targets), vector)
        case _:
            return


def _access(flags: int, gva: int, size: int, value: int) -> Access:
    kind = AccessKind.LOAD
    if flags & AccessFlag.WRITE:
        kind = AccessKind.STORE
    elif flags & AccessFlag.FETCH:
        kind = AccessKind.FETCH
    stored = value if kind is AccessKind.STORE else 0
    return Access(kind, gva, size, stored, bool(flags & AccessFlag.USER))


def _asked(gva: int, asked: m.Instruction) -> Instruction:
    if asked.op is not None:
        user = bool(asked.flags & AccessFlag.USER)
        return Locked(asked.op, gva, asked.value, asked.expected, asked.size, user)
    return _access(asked.flags, gva, asked.size, asked.value)
