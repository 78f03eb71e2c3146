"""What a guest program is to the processor that executes it: instructions, one or a run at a time.

The processor (`vcpu_core`) asks a program for its next instruction with `fetch` and tells it what came of it. Most
instructions touch memory and do not use what they read: programs hand these out as runs, `Touches`, and the processor
notes in the run how far it got. Everything else is an instruction of its own. Where code comes from is not modelled.

Interrupts, page faults and refused register writes are told to the program between two instructions; its handlers
run before the instruction that was next, which is then fetched again. Relies on the protocol's message types.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import msgspec

from shadowmmu.protocol.messages import ControlRegister, LockedOp

__all__ = [
    "Halt",
    "Invlpg",
    "LockedAccess",
    "Op",
    "Program",
    "SendIpi",
    "Touch",
    "Touches",
    "UsedLoad",
    "WriteRegister",
]

Touch: TypeAlias = tuple[int, int, int, int]
"""A plain access: (AccessFlag WRITE, FETCH, USER or none, gva, size in bytes, value stored or 0).

It never crosses a page.
"""


class Touches(msgspec.Struct, tag="touches"):
    """A run of plain accesses. `position`: how many are executed. `again`: how many more times the run is executed."""

    items: list[Touch]
    position: int = 0
    again: int = 0


class UsedLoad(msgspec.Struct, tag="load"):
    """A load whose value the program uses: it retires with the value. `flags`: AccessFlag USER or none."""

    gva: int
    flags: int = 0
    size: int = 8


class LockedAccess(msgspec.Struct, tag="locked"):
    """A locked read-modify-write; retires with the old value. `value`: the operand; `expected` for CMPXCHG."""

    gva: int
    op: LockedOp
    value: int
    expected: int = 0
    flags: int = 0
    size: int = 8


class Invlpg(msgspec.Struct, tag="invlpg"):
    """INVLPG."""

    gva: int


class WriteRegister(msgspec.Struct, tag="write_register"):
    """MOV to a control register, or WRMSR to EFER."""

    register: ControlRegister
    value: int


class SendIpi(msgspec.Struct, tag="send_ipi"):
    """An interrupt `vector` to each of `targets` (not the sender itself)."""

    targets: list[int]
    vector: int


class Halt(msgspec.Struct, tag="halt"):
    """HLT. `unless_woken`: not executed if a handler ran since the program last looked (STI; HLT)."""

    unless_woken: bool = False


Op: TypeAlias = Touches | UsedLoad | LockedAccess | Invlpg | WriteRegister | SendIpi | Halt


class Program(Protocol):
    """An endless guest program on one virtual processor, deterministic given what it is told."""

    def fetch(self) -> Op:
        """The next instruction. Without anything told in between, the same one again. A `Touches` is not at its end."""
        ...

    def retire(self, value: int) -> None:
        """The instruction that was fetched last, not a `Touches`, is executed; `value`: loaded, or old."""
        ...

    def interrupt(self, vector: int) -> None:
        """Take this interrupt before the next instruction."""
        ...

    def page_fault(self, error_code: int, cr2: int) -> None:
        """The instruction fetched last (a run's access at its position) raised #PF; it is fetched again afterwards."""
        ...

    def general_protection(self) -> None:
        """The register write that was executed last was refused."""
        ...

    def idle(self) -> None:
        """From now on only serve interrupts."""
        ...

    def state(self) -> bytes:
        """Everything that its continuation depends on."""
        ...

    def restore(self, data: bytes) -> None:
        """Go on from what `state` returned, for the same configuration and vCPU."""
        ...

    def counters(self) -> dict[str, int]:
        """What the program did, in its own terms."""
        ...
