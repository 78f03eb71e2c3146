"""The program of a load on one vCPU: a stack of instructions and steps, as `guest.kernel` has it.

When the stack is empty an iteration is complete, and the next one begins. Page faults put the handler's steps on top of
the stack; when these are done the access is executed again. Interrupts have nothing to do: processes of different vCPUs
share nothing. All of the program is in `LoadState`.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.prng import Prng
from shadowmmu.cpu.guest.steps import Item, Step
from shadowmmu.cpu.loads.config import LoadConfig
from shadowmmu.cpu.loads.faults import handle_page_fault
from shadowmmu.cpu.loads.iterations import iteration
from shadowmmu.cpu.loads.layout import LoadLayout
from shadowmmu.cpu.loads.memory import LoadMemory, Space, initial_memory, mapped_page, text_page
from shadowmmu.cpu.loads.steps import LOAD_STEPS
from shadowmmu.cpu.program import Halt, Op, Touches
from shadowmmu.protocol.messages import RunConfig

__all__ = ["LoadProgram", "LoadState", "make_load"]

MAX_FAULTS: Final = 8
"""Faults in a row of the same access, after which it is skipped: nothing faults for ever."""


class LoadState(msgspec.Struct):
    """Everything that a load's future depends on, beside the configuration.

    `space`: the process that runs. `fault`: (cr2, position in its run, how often in a row) of the last page fault.
    """

    stack: list[Item]
    memory: LoadMemory
    prng: Prng
    space: int = 0
    fault: tuple[int, int, int] = (0, 0, 0)
    begun: int = 0
    idling: bool = False
    work: dict[str, int] = {}
    counts: dict[str, int] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(LoadState).decode


class LoadProgram:
    """The program of `vcpu`, one of `vcpus`. Satisfies `Program`.

    `iterations`: completed so far. `work`: the guest's own work by the names of `WORK`, since the driver last emptied
    it; what belongs to an instruction is there when `fetch` returns it, or when the fault before it was told.
    """

    stack: list[Item]
    memory: LoadMemory
    prng: Prng
    space: int
    fault: tuple[int, int, int]
    begun: int
    idling: bool
    work: Counter[str]
    counts: dict[str, int]

    def __init__(self, config: LoadConfig, run: RunConfig, vcpu: int, vcpus: int) -> None:
        if not 0 <= vcpu < vcpus:
            raise ValueError(f"vCPU {vcpu} of {vcpus}")
        self.config = config
        self.vcpu = vcpu
        self.layout = LoadLayout(config, run, vcpus)
        memory = initial_memory(self.layout, config, vcpu)
        self._adopt(LoadState([], memory, Prng.seeded(run.seed, vcpu)))

    # --- what the processor calls ----------------------------------------------------------------------------------

    def fetch(self) -> Op:
        if self.idling:
            return Halt()
        stack = self.stack
        while True:
            if not stack:
                self.begun += 1
                self.fault = (0, 0, 0)
                self.push(*iteration(self))
            item = stack[-1]
            if type(item) is Touches:
                if item.position < len(item.items):
                    return item
                stack.pop()
            elif isinstance(item, Step):
                stack.pop()
                LOAD_STEPS[item.name](self, *item.args)
            else:
                return item

    def retire(self, value: int) -> None:  # noqa: ARG002  (no load uses what it reads)
        if not self.idling:
            self.stack.pop()

    def interrupt(self, vector: int) -> None:
        pass

    def page_fault(self, error_code: int, cr2: int) -> None:
        top = self.stack[-1]
        assert isinstance(top, Touches)
        last_cr2, last_position, times = self.fault
        same = (last_cr2, last_position) == (cr2, top.position)
        self.fault = (cr2, top.position, times + 1 if same else 1)
        if self.fault[2] > MAX_FAULTS:
            self.count("skipped")
            top.position += 1
            return
        self.count("page_faults")
        handle_page_fault(self, error_code, cr2)

    def general_protection(self) -> None:
        self.count("general_protection")

    def idle(self) -> None:
        self.idling = True

    def state(self) -> bytes:
        return _encode(LoadState(**{name: getattr(self, name) for name in LoadState.__struct_fields__}))

    def restore(self, data: bytes) -> None:
        self._adopt(_decode(data))

    def _adopt(self, state: LoadState) -> None:
        for name in LoadState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.work = Counter(state.work)
        self.files = self._files()

    def _files(self) -> dict[int, int]:
        """The frames of what files may be mapped at, by gva."""
        config, memory = self.config, self.memory
        text = {text_page(len(memory.text), number): frame for number, frame in enumerate(memory.text)}
        return text | {mapped_page(config, number): frame for number, frame in enumerate(memory.file)}

    def counters(self) -> dict[str, int]:
        return dict(sorted(self.counts.items())) | {"iterations": self.iterations}

    # --- what drivers see ------------------------------------------------------------------------------------------

    @property
    def iterations(self) -> int:
        """Completed so far."""
        return max(0, self.begun - 1)

    # --- what steps use --------------------------------------------------------------------------------------------

    def push(self, *items: Item) -> None:
        """Puts these on top of the stack: the first is executed first."""
        self.stack.extend(reversed(items))

    def count(self, name: str) -> None:
        """Counts an event of the program."""
        self.counts[name] = self.counts.get(name, 0) + 1

    @property
    def here(self) -> Space:
        """The address space of the process that runs."""
        return self.memory.spaces[self.space]

    def cr3(self, user: bool) -> int:
        """The value that CR3 has in the kernel, or in user mode."""
        return self.here.roots()[-1 if user else 0].frame << x86.PAGE_SHIFT


def make_load(config: LoadConfig, run: RunConfig, vcpu: int, vcpus: int) -> LoadProgram:
    """The program of `vcpu`. Raises ValueError if memory is too small for so many vCPUs."""
    return LoadProgram(config, run, vcpu, vcpus)
