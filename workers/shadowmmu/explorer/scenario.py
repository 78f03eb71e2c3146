"""What is explored: a small virtual machine, a program per vCPU and per host thread, and what must never happen.

A scenario is plain immutable data. `litmus` reads it from a file, `generate` draws it at random, `shrink` makes it
smaller; `world` runs it.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

from shadowmmu.protocol import messages as m

__all__ = [
    "Access",
    "AccessKind",
    "Await",
    "ChangeRegister",
    "Expectation",
    "HostStep",
    "Instruction",
    "Invlpg",
    "LoadCr3",
    "Locked",
    "MachineSpec",
    "Registers",
    "Scenario",
    "SendIpi",
    "SetupStep",
    "Slot",
    "Step",
]


class AccessKind(enum.Enum):
    """What a plain access does."""

    LOAD = "load"
    STORE = "store"
    FETCH = "fetch"


class Access(msgspec.Struct, frozen=True, tag="access"):
    """A plain access of `size` bytes at `gva`; `user`: with user rights. The program does not use what it loads."""

    kind: AccessKind
    gva: int
    size: int = 8
    value: int = 0
    user: bool = False


class Locked(msgspec.Struct, frozen=True, tag="locked"):
    """A locked read-modify-write; `expected` is for CMPXCHG."""

    op: m.LockedOp
    gva: int
    value: int
    expected: int = 0
    size: int = 8
    user: bool = False


class Await(msgspec.Struct, frozen=True, tag="await"):
    """Goes on when the guest's memory at `gpa` has `value` (8 bytes), which it then loads through `gva`.

    Stands for a loop that polls: the turns that change nothing are left out.
    """

    gva: int
    gpa: int
    value: int


class Invlpg(msgspec.Struct, frozen=True, tag="invlpg"):
    """INVLPG."""

    gva: int


class LoadCr3(msgspec.Struct, frozen=True, tag="cr3"):
    """MOV to CR3; without a value the one that it has."""

    value: int | None = None


class ChangeRegister(msgspec.Struct, frozen=True, tag="register"):
    """MOV to CR0 or CR4, or WRMSR to EFER, that sets some bits and clears some."""

    register: m.ControlRegister
    set_bits: int = 0
    clear_bits: int = 0


class SendIpi(msgspec.Struct, frozen=True, tag="ipi"):
    """An interrupt to each of `targets`: each leaves guest mode, and takes the steps of its handler.

    Nobody waits for anything. An interrupt that arrives while the handler runs is taken after it; several are one.
    """

    targets: tuple[int, ...]
    vector: int = 0


Instruction: TypeAlias = Access | Locked | Await | Invlpg | LoadCr3 | ChangeRegister | SendIpi


class Step(msgspec.Struct, frozen=True, tag="step"):
    """One instruction of a vCPU's program, as it was written, and the register that gets its result ("" for none)."""

    text: str
    instruction: Instruction
    into: str = ""


class Word(msgspec.Struct, frozen=True):
    """`value` in the 8 bytes of the guest's memory at `gpa`."""

    gpa: int
    value: int


class HostStep(msgspec.Struct, frozen=True, tag="host", omit_defaults=True):
    """One operation of a host thread, as it was written. It begins when memory holds `when`, None for at once."""

    text: str
    operation: m.HostOperation
    when: Word | None = None


class SetupStep(msgspec.Struct, frozen=True):
    """A step that is executed to its end before the exploration begins, by a vCPU, or by the host (`vcpu` -1)."""

    vcpu: int
    step: Step | HostStep


class Slot(msgspec.Struct, frozen=True):
    """A memory slot; `backing` as in `shadowmmu.kvm.Backing`."""

    id: int
    gfn: int
    npages: int
    backing: str = "4k"


class Registers(msgspec.Struct, frozen=True):
    """A vCPU's registers when it begins."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


class MachineSpec(msgspec.Struct, frozen=True):
    """The virtual machine of a scenario; fields as in RunConfig and KvmConfig."""

    slots: tuple[Slot, ...]
    registers: tuple[Registers, ...]
    mmu_pages: int = 1024
    vpid: bool = True
    tdp: m.Tdp | None = None
    tso: bool = False
    tlbs_dirty_bits: int = 32


class Expectation(enum.Enum):
    """What the executions of a scenario must show under a profile."""

    NEVER = "never"
    SOMETIMES = "sometimes"


class Scenario(msgspec.Struct, frozen=True):
    """A scenario.

    `frames` names guest frames, for people. `words`: (gpa, value) of each 8-byte word of memory that is not 0 at the
    start. `programs` has a program per vCPU, `hosts` one per host thread; `handlers`, if not empty, has per vCPU the
    steps that it takes when an interrupt arrives (see `SendIpi`). `forbidden` is a condition on the final
    state (see `outcome`), "" for none; a violation that the checker finds is forbidden always. `exists` is a condition
    that some execution must end with, "" for none: what is legal, and to be seen. `expect` says by profile what must
    come of it. `bug` is the slug of the fix whose absence it shows, "" for none. With a `workload` the programs are the
    random guest's that it configures, and `programs` are empty.
    """

    name: str
    machine: MachineSpec
    words: tuple[tuple[int, int], ...]
    setup: tuple[SetupStep, ...]
    programs: tuple[tuple[Step, ...], ...]
    hosts: tuple[tuple[HostStep, ...], ...]
    title: str = ""
    text: str = ""
    bug: str = ""
    profile: str = "linux-3.1"
    forbidden: str = ""
    exists: str = ""
    expect: tuple[tuple[str, Expectation], ...] = ()
    frames: tuple[tuple[str, int], ...] = ()
    workload: m.RunConfig | None = None
    handlers: tuple[tuple[Step, ...], ...] = ()

    @property
    def vcpus(self) -> int:
        """How many vCPUs there are."""
        return len(self.machine.registers)

    @property
    def size(self) -> int:
        """How many operations it has, with those of the set-up."""
        return len(self.setup) + sum(map(len, (*self.programs, *self.handlers, *self.hosts)))
