"""The guest of workload `modes`, on one vCPU: plans some instructions at a time, and takes faults as they come.

When its stack of instructions is empty the program plans again: a computation (`compute`), then a few episodes
(`episodes`), and so on. A plan is made of instructions only, with the records and registers as they are when it is
made. Faults put instructions on top of the stack or take some away (`faults`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.guest.modes.boot import first_mode, first_registers
from shadowmmu.cpu.guest.modes.compute import compute
from shadowmmu.cpu.guest.modes.episodes import episode
from shadowmmu.cpu.guest.modes.faults import Fault, handle_page_fault, rewrite
from shadowmmu.cpu.guest.modes.formats import Registers
from shadowmmu.cpu.guest.modes.layout import ModesLayout
from shadowmmu.cpu.guest.modes.tables import Tables, initial_tables
from shadowmmu.cpu.guest.prng import Prng
from shadowmmu.cpu.program import Halt, Op, Touches, WriteRegister
from shadowmmu.protocol.messages import GuestMode, RunConfig

__all__ = ["ModesProgram", "ModesState"]

MAX_EPISODES: Final = 3
"""Between two computations."""


class ModesState(msgspec.Struct):
    """Everything that the program's future depends on, beside the configuration.

    `before`: the registers before the last write of one. `faults`: page faults whose access is not yet executed or
    given up, outermost first. `daring`: this plan writes a register in a way that is to be refused. `episodes`:
    how many come before the next computation. `idling`: nothing is planned any more.
    """

    stack: list[Op]
    tables: Tables
    prng: Prng
    registers: Registers
    before: Registers
    faults: list[Fault] = []
    daring: bool = False
    episodes: int = 0
    idling: bool = False
    counts: dict[str, int] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ModesState).decode


class ModesProgram:
    """The program of `vcpu`, one of `vcpus`, for a run's configuration. Satisfies `Program`."""

    stack: list[Op]
    tables: Tables
    prng: Prng
    registers: Registers
    before: Registers
    faults: list[Fault]
    daring: bool
    episodes: int
    idling: bool
    counts: dict[str, int]

    def __init__(self, config: RunConfig, vcpu: int, vcpus: int) -> None:
        if not 0 <= vcpu < vcpus:
            raise ValueError(f"vCPU {vcpu} of {vcpus}")
        self.vcpu = vcpu
        self.vcpus = vcpus
        self.mixed = config.mode is GuestMode.MIXED and config.tdp is None
        self.first_mode = first_mode(config, vcpu)
        self.layout = ModesLayout(config, vcpus)
        self.frames = self.layout.frames(vcpu)
        first = first_registers(config, self.layout, vcpu)
        tables = initial_tables(self.layout, vcpu)
        prng = Prng.seeded(config.seed, vcpu)
        self._adopt(ModesState([], tables, prng, first, msgspec.structs.replace(first)))
        self.count(f"mode.{first.mode.value}")

    # --- what the processor calls ----------------------------------------------------------------------------------

    def fetch(self) -> Op:
        stack = self.stack
        while True:
            while not stack:
                self._plan()
            item = stack[-1]
            if type(item) is not Touches:
                return item
            if item.position < len(item.items):
                return item
            if item.again and item.items:
                item.again -= 1
                item.position = 0
                return item
            stack.pop()

    def _plan(self) -> None:
        self.faults.clear()
        self.daring = False
        if self.idling:
            self.stack.append(Halt())
            return
        if self.episodes:
            self.episodes -= 1
            self.push(*episode(self))
        else:
            self.episodes = 1 + self.prng.below(MAX_EPISODES)
            self.push(*compute(self))

    def retire(self, value: int) -> None:  # noqa: ARG002 - what was loaded decides nothing here
        op = self.stack.pop()
        if isinstance(op, WriteRegister):
            mode = self.registers.mode
            self.before = msgspec.structs.replace(self.registers)
            self.registers.write(op.register, op.value)
            if self.registers.mode is not mode and not self.daring:
                self.count("switches")
                self.count(f"mode.{self.registers.mode.value}")

    def interrupt(self, vector: int) -> None:  # noqa: ARG002 - nobody sends one
        self.count("interrupts")

    def page_fault(self, error_code: int, cr2: int) -> None:
        self.count("page_faults")
        handle_page_fault(self, error_code, cr2)

    def general_protection(self) -> None:
        self.registers = msgspec.structs.replace(self.before)
        self.count("refused" if self.daring else "refused_unexpectedly")
        if not self.daring and self.mode is not GuestMode.NONPAGING:
            self.push(*rewrite(self, None))

    def idle(self) -> None:
        self.idling = True
        self.stack.clear()

    def state(self) -> bytes:
        return _encode(ModesState(**{name: getattr(self, name) for name in ModesState.__struct_fields__}))

    def restore(self, data: bytes) -> None:
        self._adopt(_decode(data))

    def _adopt(self, state: ModesState) -> None:
        for name in ModesState.__struct_fields__:
            setattr(self, name, getattr(state, name))

    def counters(self) -> dict[str, int]:
        return dict(sorted(self.counts.items()))

    # --- what plans use --------------------------------------------------------------------------------------------

    def push(self, *ops: Op) -> None:
        """Puts these on top of the stack: the first is executed first."""
        self.stack.extend(reversed(ops))

    def count(self, name: str) -> None:
        """Counts an event of the program."""
        self.counts[name] = self.counts.get(name, 0) + 1

    @property
    def mode(self) -> GuestMode:
        """The paging mode that the vCPU is in."""
        return self.registers.mode

    @property
    def space(self) -> int | None:
        """The own address space in CR3, or None: another vCPU's."""
        mode = self.mode
        for space in range(2):
            if self.registers.cr3 == self.layout.cr3(self.vcpu, mode, space):
                return space
        return None
