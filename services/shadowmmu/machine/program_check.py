"""The proof that a run lost nothing of its programs and executed nothing twice, whatever became of the workers.

A journal has all that the machine applied and told. So each vCPU's program can be executed once more along it, as if
there had been one processor from beginning to end: every access that was applied, and everything that was asked, must
be what the program does next. What a worker had executed without its being applied may be lost; that shows nowhere.

Relies on programs being made by `make_program`, on replay, and on the same `Execution` as the processors. A run with
mutant answer-before-log fails here too: it tells of interrupts before it ships what was executed before them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import msgspec

from shadowmmu.cpu import instruction_share, make_program
from shadowmmu.cpu.execution import (
    EXECUTED_BY_EXIT,
    Execution,
    access_type,
    address_of,
    exit_of,
    instruction_of,
)
from shadowmmu.cpu.program import LockedAccess, Op, Touches, UsedLoad
from shadowmmu.cpu.resume import load_state
from shadowmmu.machine.choices import ChoicesExhaustedError
from shadowmmu.machine.journal import Header, JournalError, Record
from shadowmmu.machine.replay import Replayer
from shadowmmu.machine.trail import Answer, Question, Trail, asked_by
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import RemoteProtocolError
from shadowmmu.protocol.messages import Asked, LoggedAccess, RunConfig

__all__ = ["Difference", "ProgramCheck", "check_programs"]

_KIND: Final = 0x1F
"""The AccessFlag bits of the instruction; those above are the translation's."""


class Difference(msgspec.Struct, frozen=True):
    """The first place at which what was applied is not what the program of `vcpu` does.

    `instruction`: how many of the program's were executed before; `record`: of the journal, which was being consumed.
    """

    vcpu: int
    instruction: int
    record: int
    expected: str
    found: str

    def __str__(self) -> str:
        return (
            f"vCPU {self.vcpu}, after {self.instruction} instructions (record {self.record}):"
            f" {self.found}, where the program has {self.expected}"
        )


class ProgramCheck(msgspec.Struct, frozen=True):
    """What came of a check.

    `instructions`: how many took effect, by vCPU (of one with a difference: up to there).
    """

    instructions: dict[int, int]
    differences: list[Difference]


class _UnlikeError(Exception):
    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


class _Before(msgspec.Struct, frozen=True):
    """An execution before a page fault that the worker perhaps did not take, because it was leaving guest mode."""

    instructions: int
    done: bool
    program: bytes


class _Witness:
    """One vCPU's program, executed along what is applied."""

    def __init__(self, config: RunConfig, vcpu: int, vcpus: int) -> None:
        self._config = config
        self._vcpu = vcpu
        self._vcpus = vcpus
        self.begin()

    def begin(self) -> None:
        """The program begins anew."""
        program = make_program(self._config, self._vcpu, self._vcpus)
        share = instruction_share(self._config.ops, self._vcpu, self._vcpus)
        self.execution = Execution(program, share)
        self._asked: Asked | None = None
        self._before: _Before | None = None

    def applied(self, accesses: Sequence[LoggedAccess]) -> None:
        """Accesses of a log."""
        self._before = None
        for flags, gva, _, size, value in accesses:
            op = self.execution.fetch()
            if not isinstance(op, Touches) or op.items[op.position] != (flags & _KIND, gva, size, value):
                raise _UnlikeError(_describe(op), _access_text(flags, gva, size, value))
            self.execution.advance(op, 1)

    def asks(self, question: Question) -> None:
        """A message takes effect."""
        before, self._before = self._before, None
        asked = asked_by(question)
        if isinstance(question, m.Load | m.Locked | m.Exit) and question.state is not None:
            self._compare_state(question.state, before if asked is Asked.EXTERNAL_INTERRUPT else None)
        op = self.execution.fetch()
        if not _asks_so(op, question):
            raise _UnlikeError(_describe(op), _question_text(question))
        self._asked = asked
        if isinstance(question, m.Walk):
            execution = self.execution
            self._before = _Before(execution.instructions, execution.done, execution.program.state())

    def told(self, answer: Answer) -> None:
        """The answer to what was asked last."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        op = self.execution.fetch()
        match answer:
            case m.Loaded():
                self.execution.loaded(answer.value)
            case m.WalkFault():
                self.execution.fault_bypassed(answer.error_code, address_of(op))
            case m.Entered():
                if asked in EXECUTED_BY_EXIT:
                    self.execution.retire(op, 0)
                self.execution.entered(asked, answer)

    def _compare_state(self, data: bytes, before: _Before | None) -> None:
        """The worker's program must be where this one is."""
        execution = self.execution
        execution.fetch()
        try:
            saved = load_state(data)
        except RemoteProtocolError as error:
            raise _UnlikeError("a state of its own", str(error)) from error
        found = (saved.instructions, saved.done, saved.program)
        if found == (execution.instructions, execution.done, execution.program.state()):
            return
        if before is not None and found == (before.instructions, before.done, before.program):
            # The kick came before the fault: the walk was abandoned, and nothing of it was told.
            execution.program.restore(before.program)
            return
        raise _UnlikeError(
            f"a state after {execution.instructions} instructions",
            f"another state after {saved.instructions} instructions",
        )

    def withdraw(self) -> None:
        """What was asked last has not happened."""
        self._asked = None


class _Check:
    """The witnesses of a run, and what they have found."""

    def __init__(self, replayer: Replayer, only: Collection[int] | None) -> None:
        self._replayer = replayer
        self._only = only
        self._witnesses: dict[int, _Witness] = {}
        self._differences: dict[int, Difference] = {}
        self.record = 0

    def consume(self, number: int, record: Record) -> None:
        """Executes a record. Raises JournalError if it does not give what the journal says."""
        self.record = number
        try:
            difference = self._replayer.consume(number, record)
        except ChoicesExhaustedError as error:
            difference = str(error)
        if difference is not None:
            raise JournalError(f"record {number}: {difference}")
        for lane in self._replayer.machine.lanes:
            # A lane begins with an empty trail, in the record of its first worker.
            if not isinstance(lane.trail, _Tap) and (self._only is None or lane.number in self._only):
                lane.trail = _Tap(check=self, vcpu=lane.number)

    def heard(self, vcpu: int, hear: Callable[[_Witness], None]) -> None:
        """Something became of the vCPU's trail."""
        if vcpu in self._differences:
            return
        witness = self._witnesses.get(vcpu)
        if witness is None:
            # By the time at which a vCPU has something to say, all vCPUs are there.
            machine = self._replayer.machine
            witness = self._witnesses[vcpu] = _Witness(machine.config, vcpu, len(machine.lanes))
        try:
            hear(witness)
        except _UnlikeError as unlike:
            self._differences[vcpu] = Difference(
                vcpu, witness.execution.instructions, self.record, unlike.expected, unlike.found
            )

    def result(self) -> ProgramCheck:
        """What was found."""
        witnesses = sorted(self._witnesses.items())
        return ProgramCheck(
            {vcpu: witness.execution.instructions for vcpu, witness in witnesses},
            [self._differences[vcpu] for vcpu in sorted(self._differences)],
        )


class _Tap(Trail, kw_only=True):
    """A lane's trail that tells a check what becomes of it."""

    check: _Check
    vcpu: int

    def begin(self) -> None:
        super().begin()
        self.check.heard(self.vcpu, lambda witness: witness.begin())

    def applied(self, accesses: Sequence[LoggedAccess]) -> None:
        super().applied(accesses)
        self.check.heard(self.vcpu, lambda witness: witness.applied(accesses))

    def asks(self, question: Question) -> None:
        super().asks(question)
        self.check.heard(self.vcpu, lambda witness: witness.asks(question))

    def told(self, answer: Answer) -> None:
        super().told(answer)
        self.check.heard(self.vcpu, lambda witness: witness.told(answer))

    def withdraw(self) -> None:
        super().withdraw()
        self.check.heard(self.vcpu, lambda witness: witness.withdraw())


def check_programs(records: Iterable[Record], only: Collection[int] | None = None) -> ProgramCheck:
    """Executes the programs of a run once more, along the records of its journal, the header first.

    `only`: the vCPUs whose workers run the programs of `make_program` (None: all do). Raises JournalError if the
    records are no journal, or do not give what they say.
    """
    source = iter(records)
    header = next(source, None)
    if not isinstance(header, Header):
        raise JournalError("record 0: a header is expected")
    check = _Check(Replayer(header), only)
    for number, record in enumerate(source, start=1):
        check.consume(number, record)
    return check.result()


def _asks_so(op: Op, question: Question) -> bool:
    """Whether a processor at this instruction may ask that."""
    match question:
        case m.Enter() | m.Exit(_, m.ExternalInterruptExit()):
            return True
        case m.Load(_, (flags, gva, _, size, _)):
            return isinstance(op, UsedLoad) and (access_type(op), op.gva, op.size) == (
                flags & _KIND,
                gva,
                size,
            )
        case m.Locked(_, (flags, gva, _, size, value), kind, expected):
            return isinstance(op, LockedAccess) and (
                (access_type(op), op.gva, op.size, op.value, op.op, op.expected)
                == (flags & _KIND, gva, size, value, kind, expected)
            )
        case m.Walk():
            return _walk_of(op) == (question.gva, question.flags)
        case m.Exit(_, m.PageFaultExit(gva, _, instruction) | m.EptMisconfigExit(gva, instruction)):
            return _walk_of(op) is not None and (address_of(op), instruction_of(op)) == (gva, instruction)
        case m.Exit():
            return _walk_of(op) is None and exit_of(op) == question.reason


def _walk_of(op: Op) -> tuple[int, int] | None:
    """The gva and the access type of the access that is next, if one is."""
    if isinstance(op, Touches | UsedLoad | LockedAccess):
        return address_of(op), instruction_of(op).flags
    return None


def _access_text(flags: int, gva: int, size: int, value: int) -> str:
    return f"an access with flags {flags & _KIND:#x} to {gva:#x}, {size} bytes, value {value:#x}"


def _describe(op: Op) -> str:
    if isinstance(op, Touches):
        return _access_text(*op.items[op.position])
    return str(op)


def _question_text(question: Question) -> str:
    if isinstance(question, m.Exit):
        return str(question.reason)
    if isinstance(question, m.Load | m.Locked):
        return str(msgspec.structs.replace(question, state=None))
    return str(question)
