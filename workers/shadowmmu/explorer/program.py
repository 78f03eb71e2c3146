"""A vCPU's program of a scenario, as the processor model executes it.

The processor asks for one instruction after another. A page fault that reaches the guest is noted as the result of the
instruction that took it, and the program goes on with the next one, as if its handler had given the access up. When an
interrupt arrives, the steps of the interrupt handler come first.
"""

from __future__ import annotations

from shadowmmu.cpu import program as cpu
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    Await,
    ChangeRegister,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    Registers,
    SendIpi,
    Step,
)
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.messages import ControlRegister

__all__ = ["FaultTaken", "LitmusProgram"]

_KIND_FLAGS = {
    AccessKind.LOAD: 0,
    AccessKind.STORE: int(AccessFlag.WRITE),
    AccessKind.FETCH: int(AccessFlag.FETCH),
}


class FaultTaken(int):
    """The result of an instruction that took a page fault: its error code (PFERR bits)."""

    def __repr__(self) -> str:
        return f"#PF({int(self):#x})"


class LitmusProgram:
    """`shadowmmu.cpu.program.Program` for some steps, on a vCPU that begins with `registers`.

    `handler`: the steps of its interrupt handler, which is not itself interrupted. `results` maps a register of the
    program to what was loaded, to the old value of a locked operation, or to the fault that was taken. `done`: there is
    nothing left.
    """

    def __init__(self, registers: Registers, handler: tuple[Step, ...] = ()) -> None:
        self._registers = {
            ControlRegister.CR0: registers.cr0,
            ControlRegister.CR3: registers.cr3,
            ControlRegister.CR4: registers.cr4,
            ControlRegister.EFER: registers.efer,
        }
        self._steps: tuple[Step, ...] = ()
        self._next = 0
        self._handler = handler
        self._interrupted: tuple[tuple[Step, ...], int] | None = (
            None  # what the handler has interrupted, and where
        )
        self._pending = False  # another interrupt, which arrived while the handler runs
        self._op: cpu.Op | None = None
        self.results: dict[str, int] = {}
        self.faults = 0

    def load(self, steps: tuple[Step, ...]) -> None:
        """Execute these from now on."""
        self._steps = steps
        self._next = 0
        self._op = None

    @property
    def done(self) -> bool:
        """Every step is executed."""
        self._skip_retired()
        return self._next >= len(self._steps)

    @property
    def position(self) -> int:
        """How many steps are executed."""
        self._skip_retired()
        return self._next

    @property
    def handling(self) -> bool:
        """Its steps are those of the interrupt handler."""
        self._skip_retired()
        return self._interrupted is not None

    @property
    def step(self) -> Step | None:
        """The next step."""
        self._skip_retired()
        return self._steps[self._next] if self._next < len(self._steps) else None

    @property
    def awaits(self) -> tuple[int, int] | None:
        """(gpa, value) that memory must have before the next step is executed."""
        step = self.step
        if step is not None and isinstance(step.instruction, Await):
            return step.instruction.gpa, step.instruction.value
        return None

    def key(self) -> tuple[object, ...]:
        """Everything that its continuation depends on, for comparison."""
        self._skip_retired()
        interrupted = -1 if self._interrupted is None else self._interrupted[1]
        results = tuple(
            (name, isinstance(value, FaultTaken), value) for name, value in sorted(self.results.items())
        )
        return (self._next, interrupted, self._pending, results, tuple(self._registers.values()))

    def _skip_retired(self) -> None:
        """A plain access is retired by the processor, which counts it in the run that it was given."""
        op = self._op
        if isinstance(op, cpu.Touches) and op.position:
            self._advance(None)

    def _advance(self, result: int | None) -> None:
        step = self._steps[self._next]
        if step.into:
            self.results[step.into] = 0 if result is None else result
        self._next += 1
        self._op = None
        if self._interrupted is not None and self._next == len(self._steps):
            if self._pending:
                self._pending = False
                self._next = 0
            else:
                self._steps, self._next = self._interrupted
                self._interrupted = None

    # --- the processor's side ------------------------------------------------------------------------------------

    def fetch(self) -> cpu.Op:
        """The next instruction; an endless HLT after the last."""
        step = self.step
        if step is None:
            return cpu.Halt()
        if self._op is None:
            self._op = self._make(step.instruction, step.into)
        return self._op

    def _make(self, instruction: Instruction, into: str) -> cpu.Op:
        match instruction:
            case Access(AccessKind.LOAD, gva, size, _, user) if into:
                return cpu.UsedLoad(gva, int(AccessFlag.USER) if user else 0, size)
            case Access(kind, gva, size, value, user):
                flags = _KIND_FLAGS[kind] | (int(AccessFlag.USER) if user else 0)
                return cpu.Touches([(flags, gva, size, value)])
            case Locked(op, gva, value, expected, size, user):
                flags = int(AccessFlag.USER) if user else 0
                return cpu.LockedAccess(gva, op, value, expected, flags, size)
            case Await(gva):
                return cpu.UsedLoad(gva)
            case Invlpg(gva):
                return cpu.Invlpg(gva)
            case SendIpi(targets, vector):
                return cpu.SendIpi(list(targets), vector)
            case LoadCr3(value):
                if value is not None:
                    self._registers[ControlRegister.CR3] = value
                return cpu.WriteRegister(ControlRegister.CR3, self._registers[ControlRegister.CR3])
            case ChangeRegister(register, set_bits, clear_bits):
                value = self._registers[register] & ~clear_bits | set_bits
                self._registers[register] = value
                return cpu.WriteRegister(register, value)

    def retire(self, value: int) -> None:
        """The instruction is executed."""
        self._advance(value)

    def page_fault(self, error_code: int, cr2: int) -> None:  # noqa: ARG002 - the protocol's
        """The instruction took a page fault: that is its result."""
        self.faults += 1
        self._skip_retired()
        self._advance(FaultTaken(error_code))

    def interrupt(self, vector: int) -> None:  # noqa: ARG002 - the protocol's
        """The handler's steps come next, or once more after those that it is at."""
        self._skip_retired()
        if self._interrupted is not None:
            self._pending = True
        elif self._handler:
            self._interrupted = self._steps, self._next
            self._steps, self._next, self._op = self._handler, 0, None

    def general_protection(self) -> None:
        """A register write was refused: the program has gone on already."""

    def idle(self) -> None:
        """Nothing is left to do."""

    def state(self) -> bytes:
        """A scenario is never resumed."""
        return b""

    def restore(self, data: bytes) -> None:
        """See `state`."""

    def counters(self) -> dict[str, int]:
        """Page faults that the guest took."""
        return {"faults": self.faults}
