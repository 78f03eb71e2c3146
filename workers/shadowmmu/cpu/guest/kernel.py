"""The guest kernel of one vCPU: executes a stack of instructions and steps, takes interrupts and faults.

Interrupts and page faults put their handler's steps on top of the stack; when these are done, what was interrupted goes
on. All of the program is in `KernelState`: the stack, the records of `memory`, and a few registers. What several vCPUs
must agree on is not here but in guest memory, as in any kernel. When the stack is empty the workload puts the next
episode on it.
"""

from __future__ import annotations

import msgspec

from shadowmmu.cpu.guest.boot import EFER
from shadowmmu.cpu.guest.faults import handle_page_fault
from shadowmmu.cpu.guest.layout import Layout
from shadowmmu.cpu.guest.memory import Arena, Memory, initial_memory
from shadowmmu.cpu.guest.prng import Prng
from shadowmmu.cpu.guest.shootdown import SHOOTDOWN_VECTOR, serve_requests
from shadowmmu.cpu.guest.steps import STEPS, Item, Step, call, step
from shadowmmu.cpu.guest.touching import Hot
from shadowmmu.cpu.guest.workloads import episode
from shadowmmu.cpu.program import Halt, Op, Touches, WriteRegister
from shadowmmu.protocol.messages import ControlRegister, RunConfig

__all__ = ["Kernel", "KernelState"]


class KernelState(msgspec.Struct):
    """Everything that a kernel's future depends on, beside the configuration.

    `value`: of the last load or locked operation. `woken`: an interrupt came since the kernel last looked. `space`:
    the address space in CR3. `hot`: the pages in use. `fault`: (cr2, position in its run, how often in a row) of the
    last page fault. `efer`: as last written.
    """

    stack: list[Item]
    memory: Memory
    prng: Prng
    value: int = 0
    woken: bool = False
    space: int = 0
    hot: list[Hot] = []
    fault: tuple[int, int, int] = (0, 0, 0)
    efer: int = EFER
    counts: dict[str, int] = {}


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(KernelState).decode


class Kernel:
    """The program of `vcpu`, one of `vcpus`, for a run's configuration. Satisfies `Program`."""

    stack: list[Item]
    memory: Memory
    prng: Prng
    value: int
    woken: bool
    space: int
    hot: list[Hot]
    fault: tuple[int, int, int]
    efer: int
    counts: dict[str, int]

    def __init__(self, config: RunConfig, vcpu: int, vcpus: int) -> None:
        if not 0 <= vcpu < vcpus:
            raise ValueError(f"vCPU {vcpu} of {vcpus}")
        self.workload = config.workload
        self.vcpu = vcpu
        self.vcpus = vcpus
        self.layout = Layout(config, vcpus)
        memory = initial_memory(self.layout, vcpu)
        self._adopt(KernelState([], memory, Prng.seeded(config.seed, vcpu)))

    # --- what the processor calls ----------------------------------------------------------------------------------

    def fetch(self) -> Op:
        stack = self.stack
        while True:
            if not stack:
                stack.append(call(episode))
            item = stack[-1]
            if type(item) is Touches:
                if item.position < len(item.items):
                    return item
                if item.again and item.items:
                    item.again -= 1
                    item.position = 0
                    return item
                stack.pop()
            elif isinstance(item, Step):
                stack.pop()
                STEPS[item.name](self, *item.args)
            elif type(item) is Halt and item.unless_woken and self.woken:
                stack.pop()
            else:
                return item

    def retire(self, value: int) -> None:
        self.stack.pop()
        self.value = value

    def interrupt(self, vector: int) -> None:
        self.woken = True
        if vector == SHOOTDOWN_VECTOR:
            self.push(call(serve_requests), call(restore_value, self.value))

    def page_fault(self, error_code: int, cr2: int) -> None:
        self.count("page_faults")
        top = self.stack[-1]
        position = top.position if isinstance(top, Touches) else 0
        last_cr2, last_position, times = self.fault
        same = (last_cr2, last_position) == (cr2, position)
        self.fault = (cr2, position, times + 1 if same else 1)
        depth, value = len(self.stack), self.value
        handle_page_fault(self, error_code, cr2, self.fault[2])
        if len(self.stack) > depth:
            self.stack.insert(depth, call(restore_value, value))

    def general_protection(self) -> None:
        self.count("general_protection")

    def idle(self) -> None:
        # Not before the handlers that are under way are done: others may be waiting for them.
        handlers = (
            n for n, item in enumerate(self.stack) if isinstance(item, Step) and item.name == _HANDLER_END
        )
        self.stack.insert(next(handlers, len(self.stack)), call(idle_for_ever))

    def state(self) -> bytes:
        return _encode(KernelState(**{name: getattr(self, name) for name in KernelState.__struct_fields__}))

    def restore(self, data: bytes) -> None:
        self._adopt(_decode(data))

    def _adopt(self, state: KernelState) -> None:
        for name in KernelState.__struct_fields__:
            setattr(self, name, getattr(state, name))

    def counters(self) -> dict[str, int]:
        return dict(sorted(self.counts.items()))

    # --- what steps use --------------------------------------------------------------------------------------------

    def push(self, *items: Item) -> None:
        """Puts these on top of the stack: the first is executed first."""
        self.stack.extend(reversed(items))

    def count(self, name: str) -> None:
        """Counts an event of the program."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def arena_here(self) -> int:
        """The index of the own arena in the current address space."""
        return self.layout.own_spaces(self.vcpu).index(self.space)

    def arena(self, index: int) -> Arena:
        """An own arena: of the shared address spaces first, then of the private ones."""
        return self.memory.arenas[index]

    def reload_cr3(self) -> WriteRegister:
        """The instruction that writes CR3's own value to it."""
        return WriteRegister(ControlRegister.CR3, self.layout.cr3(self.space))


@step
def restore_value(kernel: Kernel, value: int) -> None:
    """End of an interrupt handler: what the interrupted code had loaded."""
    kernel.value = value


_HANDLER_END = restore_value.__name__


@step
def idle_for_ever(kernel: Kernel) -> None:
    """The idle loop."""
    kernel.push(Halt(), call(idle_for_ever))
