"""A workload's program in an exploration: it runs as anywhere, and what it executes is written down.

`workload` makes scenarios of the record.
"""

from __future__ import annotations

from shadowmmu.cpu import Program, make_program
from shadowmmu.cpu import program as cpu
from shadowmmu.explorer.program import FaultTaken
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    ChangeRegister,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    SendIpi,
    Step,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag

__all__ = ["WorkloadProgram"]


class WorkloadProgram:
    """A workload's program that also writes down what it executes, as `record`.

    For the rest as `LitmusProgram`: `done` when its share of instructions is executed and it only waits.
    """

    def __init__(self, config: m.RunConfig, vcpu: int, vcpus: int) -> None:
        self._inner: Program = make_program(config, vcpu, vcpus)
        self._op: cpu.Op | None = None
        self._noted = 0  # accesses of the run at hand that are in the record
        self._idle = False
        self.record: list[Step] = []
        self.results: dict[str, int] = {}

    def load(self, steps: tuple[Step, ...]) -> None:
        """There is nothing to be loaded."""

    @property
    def done(self) -> bool:
        """Its share is executed, and no handler has anything left to do."""
        return self._idle and isinstance(self.fetch(), cpu.Halt)

    @property
    def awaits(self) -> tuple[int, int] | None:
        """A workload polls."""
        return None

    @property
    def step(self) -> Step | None:
        """The next step, None if it is HLT."""
        op = self.fetch()
        return None if isinstance(op, cpu.Halt) else _step_of(op)

    @property
    def position(self) -> int:
        """How many steps are executed."""
        self._note_accesses()
        return len(self.record)

    def key(self) -> tuple[object, ...]:
        """Everything that its continuation depends on."""
        return (self._inner.state(),)

    def _note_accesses(self) -> None:
        """The processor counts the accesses of a run that it has executed in the run itself."""
        op = self._op
        if isinstance(op, cpu.Touches):
            for number in range(self._noted, op.position):
                self.record.append(_step_of(op, number))
            self._noted = op.position

    def fetch(self) -> cpu.Op:
        """The next instruction."""
        self._note_accesses()
        op = self._inner.fetch()
        self._op = op
        self._noted = op.position if isinstance(op, cpu.Touches) else 0
        return op

    def retire(self, value: int) -> None:
        """The instruction is executed."""
        if self._op is not None and not isinstance(self._op, cpu.Halt):
            self.record.append(_step_of(self._op))
        self._op = None
        self._inner.retire(value)

    def interrupt(self, vector: int) -> None:
        """An interrupt."""
        self._note_accesses()
        self._inner.interrupt(vector)

    def page_fault(self, error_code: int, cr2: int) -> None:
        """The attempt is a step of the record: there it takes the fault, and nothing handles it."""
        self._note_accesses()
        if self._op is not None:
            self.record.append(_step_of(self._op))
        self.results["faults"] = FaultTaken(error_code)
        self._inner.page_fault(error_code, cr2)

    def general_protection(self) -> None:
        """A register write was refused."""
        self._inner.general_protection()

    def idle(self) -> None:
        """Its share is executed."""
        self._idle = True
        self._inner.idle()

    def state(self) -> bytes:
        """Everything that its continuation depends on."""
        return self._inner.state()

    def restore(self, data: bytes) -> None:
        """Go on from there."""
        self._inner.restore(data)

    def counters(self) -> dict[str, int]:
        """What the program did."""
        return self._inner.counters()


def _step_of(op: cpu.Op, number: int | None = None) -> Step:
    instruction = _instruction_of(op, number)
    return Step(describe_instruction(instruction), instruction)


def _instruction_of(op: cpu.Op, number: int | None) -> Instruction:
    match op:
        case cpu.Touches():
            flags, gva, size, value = op.items[op.position if number is None else number]
            if flags & AccessFlag.WRITE:
                kind = AccessKind.STORE
            else:
                kind = AccessKind.FETCH if flags & AccessFlag.FETCH else AccessKind.LOAD
            return Access(kind, gva, size, value, bool(flags & AccessFlag.USER))
        case cpu.UsedLoad(gva, flags, size):
            return Access(AccessKind.LOAD, gva, size, 0, bool(flags & AccessFlag.USER))
        case cpu.LockedAccess(gva, kind, value, expected, flags, size):
            return Locked(kind, gva, value, expected, size, bool(flags & AccessFlag.USER))
        case cpu.Invlpg(gva):
            return Invlpg(gva)
        case cpu.WriteRegister(m.ControlRegister.CR3, value):
            return LoadCr3(value)
        case cpu.WriteRegister(register, value):
            return ChangeRegister(register, value, ~value & (1 << 64) - 1)
        case cpu.SendIpi(targets, vector):
            return SendIpi(tuple(targets), vector)
    raise TypeError(f"no instruction: {op!r}")


def describe_instruction(instruction: Instruction) -> str:
    """An instruction as one line, with plain numbers."""
    match instruction:
        case Access(kind, gva, size, value, user):
            stored = f" = {value:#x}" if kind is AccessKind.STORE else ""
            return f"{'u' * user}{kind.value}.{size} {gva:#x}{stored}"
        case Locked(op, gva, value, expected, size, user):
            old = f"{expected:#x} -> " if op is m.LockedOp.CMPXCHG else ""
            return f"{'u' * user}{op.value}.{size} {gva:#x} = {old}{value:#x}"
        case Invlpg(gva):
            return f"invlpg {gva:#x}"
        case LoadCr3(value):
            return "cr3" if value is None else f"cr3 {value >> 12:#x}"
        case ChangeRegister(register, set_bits):
            return f"{register.value} = {set_bits:#x}"
        case SendIpi(targets):
            return f"ipi {' '.join(f'v{target}' for target in targets)}"
        case _:
            return str(instruction)
