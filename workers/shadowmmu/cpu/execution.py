"""How far a program is executed, whoever executes it, and what it is told between two instructions.

A program's course is a function of how many accesses were executed and of the answers that it was given in between.
That holds only if everybody asks the program at the same moments, so what they have in common is here: the
processor (`vcpu_core`) executes a program, a replacement follows the trail of one that was lost (`resume`), and the
check of a whole run (`shadowmmu.machine.program_check`) goes along with it. Relies on the interface in `program`.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.cpu.program import (
    Halt,
    Invlpg,
    LockedAccess,
    Op,
    Program,
    SendIpi,
    Touches,
    UsedLoad,
    WriteRegister,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.messages import Asked

__all__ = [
    "EXECUTED_BY_EXIT",
    "FAULTS",
    "Execution",
    "access_type",
    "address_of",
    "exit_of",
    "instruction_of",
]

FAULTS: Final = (Asked.PAGE_FAULT, Asked.EPT_MISCONFIG)
"""Exits in the middle of an access: the answer says what becomes of it."""
EXECUTED_BY_EXIT: Final = (Asked.INVLPG, Asked.REGISTER_WRITE, Asked.SEND_IPI, Asked.HALT)
"""Exits whose instruction is executed."""
_BETWEEN_INSTRUCTIONS: Final = (Asked.ENTER, Asked.EXTERNAL_INTERRUPT)

_USED: Final = int(AccessFlag.USED)
_LOCKED: Final = int(AccessFlag.USED | AccessFlag.LOCKED | AccessFlag.WRITE)


class Execution:
    """`program` with a share of `share` instructions; `instructions` are executed, `done`: the share is."""

    __slots__ = ("done", "instructions", "program", "share")

    def __init__(self, program: Program, share: int) -> None:
        self.program = program
        self.share = share
        self.instructions = 0
        self.done = False

    def fetch(self) -> Op:
        """The next instruction; the program idles from the moment at which its share is executed."""
        if self.instructions >= self.share and not self.done:
            self.done = True
            self.program.idle()
        return self.program.fetch()

    def accesses_left(self, run: Touches) -> int:
        """How many accesses of a run that was fetched can be executed before it has to be fetched again."""
        left = len(run.items) - run.position
        return left if self.done else min(left, self.share - self.instructions)

    def advance(self, run: Touches, accesses: int) -> None:
        """So many accesses of the run are executed."""
        run.position += accesses
        self.instructions += accesses

    def retire(self, op: Op, value: int) -> None:
        """The instruction `op`, or the access at its position, is executed."""
        self.instructions += 1
        if isinstance(op, Touches):
            op.position += 1
        else:
            self.program.retire(value)

    def loaded(self, value: int) -> None:
        """The load or locked operation that was fetched is executed."""
        self.instructions += 1
        self.program.retire(value)

    def fault_bypassed(self, error_code: int, gva: int) -> None:
        """The access that was fetched, to `gva`, raised a page fault that does not exit."""
        self.program.page_fault(error_code, gva)

    def entered(self, asked: Asked, entered: m.Entered) -> None:
        """Guest mode again, after what was `asked`: a fault, the instruction's completion, interrupts."""
        if entered.inject is not None:
            self.program.page_fault(entered.inject.error_code, entered.inject.cr2)
        elif entered.completed is not None and asked in FAULTS:
            self.retire(self.program.fetch(), entered.completed.value)
        if entered.general_protection:
            self.program.general_protection()
        if entered.interrupts and asked in _BETWEEN_INSTRUCTIONS:
            # Whether the next instruction was fetched before the entry ended is nothing that anybody else can know.
            self.fetch()
        for vector in entered.interrupts:
            self.program.interrupt(vector)


def access_type(op: UsedLoad | LockedAccess) -> int:
    """AccessFlag bits 0 to 4 of an access whose value is used."""
    return op.flags | (_LOCKED if isinstance(op, LockedAccess) else _USED)


def address_of(op: Op) -> int:
    """The gva of the access that is next. Raises TypeError if the instruction is none."""
    match op:
        case Touches():
            return op.items[op.position][1]
        case UsedLoad() | LockedAccess():
            return op.gva
        case _:
            raise TypeError(f"no access: {op!r}")


def instruction_of(op: Op) -> m.Instruction:
    """The access that is next, as an exit describes it. Raises TypeError if the instruction is none."""
    match op:
        case Touches():
            flags, _, size, value = op.items[op.position]
            return m.Instruction(flags, size, value)
        case UsedLoad():
            return m.Instruction(access_type(op), op.size)
        case LockedAccess():
            return m.Instruction(access_type(op), op.size, op.value, op.op, op.expected)
        case _:
            raise TypeError(f"no access: {op!r}")


def exit_of(op: Op) -> m.ExitReason:
    """The exit that executes the instruction. Raises TypeError if none does."""
    match op:
        case Invlpg():
            return m.InvlpgExit(op.gva)
        case WriteRegister():
            return m.RegisterWriteExit(op.register, op.value)
        case SendIpi():
            return m.SendIpiExit(op.targets, op.vector)
        case Halt():
            return m.HaltExit()
        case _:
            raise TypeError(f"no instruction that exits: {op!r}")
