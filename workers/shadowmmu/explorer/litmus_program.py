"""The lines of a litmus file's programs: instructions of a vCPU, and operations of the host.

docs/LITMUS.md lists them. Relies on `litmus_names` for what the names in them stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from shadowmmu.explorer.litmus_machine import CR_BITS, register_bits
from shadowmmu.explorer.litmus_names import Names
from shadowmmu.explorer.litmus_table import LitmusError, parse_number
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    Await,
    ChangeRegister,
    HostStep,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    SendIpi,
    Step,
    Word,
)
from shadowmmu.protocol import messages as m

__all__ = ["ProgramReader"]

_REGISTERS: Final = {register.value: register for register in CR_BITS}
_LOCKED: Final = {"cmpxchg": m.LockedOp.CMPXCHG, "xchg": m.LockedOp.XCHG, "xadd": m.LockedOp.XADD}
_ACCESSES: Final = (*_LOCKED, "load", "store", "fetch")
_SIZES: Final = (1, 2, 4, 8)
_WITH_RESULT: Final = Access | Locked | Await

_INSTRUCTIONS: Final = (
    "not an instruction; there are load A, store A = V, fetch A, cmpxchg A = OLD -> NEW, xchg A = V, xadd A = V (each "
    "also with u in front: with user rights; and with .1, .2, .4 or .8: bytes), await @F[i] = V, invlpg A, cr3 [F], "
    "cr0|cr4|efer +bit -bit, ipi vN"
)


class ProgramReader:
    """Reads lines for a machine of `vcpus` vCPUs. Everything raises LitmusError, which quotes the line."""

    def __init__(self, names: Names, vcpus: int) -> None:
        self._names = names
        self._vcpus = vcpus

    # --- instructions --------------------------------------------------------------------------------------------

    def step(self, line: str, where: str) -> Step:
        """An instruction, perhaps with `rN =` in front."""
        where = f"{where}: {line!r}"
        into, found, rest = line.partition("=")
        register = into.strip()
        if not found or not re.fullmatch(r"r\d+", register, re.ASCII):
            return Step(line, self._instruction(line.split(), where))
        instruction = self._instruction(rest.split(), where)
        if not isinstance(instruction, _WITH_RESULT):
            raise LitmusError(where, f"only accesses have a result for {register}")
        return Step(line, instruction, register)

    def _instruction(self, words: list[str], where: str) -> Instruction:
        if not words:
            raise LitmusError(where, "no instruction")
        spelled, arguments = words[0], words[1:]
        name, dot, width = spelled.partition(".")
        user = name.startswith("u") and name[1:] in _ACCESSES
        name = name[1:] if user else name
        if name in _ACCESSES:
            size = parse_number(width, where) if dot else self._names.entry_size
            if size not in _SIZES:
                raise LitmusError(where, f"an access has 1, 2, 4 or 8 bytes, not {size}")
            return self._access(name, arguments, size, user, where)
        match spelled:
            case "await" if len(arguments) >= 3 and arguments[1] == "=":
                gva, gpa = self._names.address(arguments[0], 8, where)
                if gpa < 0 or gpa & 7:
                    raise LitmusError(
                        where, "await looks at an aligned word of 8 bytes: await @NAME[i] = VALUE"
                    )
                return Await(gva, gpa, self._value(arguments[2:], 8, where))
            case "invlpg" if len(arguments) == 1:
                return Invlpg(self._names.address(arguments[0], 1, where)[0])
            case "cr3" if len(arguments) <= 1:
                return LoadCr3(self._names.frame_argument(arguments[0], where) << 12 if arguments else None)
            case "cr0" | "cr4" | "efer" if arguments:
                register = _REGISTERS[spelled]
                return ChangeRegister(register, *register_bits(register, arguments, where))
            case "ipi" if arguments:
                return SendIpi(tuple(self._vcpu(argument, where) for argument in arguments))
            case _:
                raise LitmusError(where, _INSTRUCTIONS)

    def _access(self, name: str, arguments: list[str], size: int, user: bool, where: str) -> Instruction:
        if not arguments:
            raise LitmusError(where, f"{name} needs an address")
        gva, _ = self._names.address(arguments[0], size, where)
        if name in ("load", "fetch"):
            if len(arguments) > 1:
                raise LitmusError(where, f"{name} takes an address and nothing else")
            return Access(AccessKind(name), gva, size, 0, user)
        if len(arguments) < 3 or arguments[1] != "=":
            raise LitmusError(where, f"{name} needs a value: {name} ADDRESS = VALUE")
        values = arguments[2:]
        if name == "store":
            return Access(AccessKind.STORE, gva, size, self._value(values, size, where), user)
        expected = 0
        if name == "cmpxchg":
            if "->" not in values:
                raise LitmusError(where, "cmpxchg needs two values: cmpxchg ADDRESS = OLD -> NEW")
            arrow = values.index("->")
            expected = self._value(values[:arrow], size, where)
            values = values[arrow + 1 :]
        return Locked(_LOCKED[name], gva, self._value(values, size, where), expected, size, user)

    def _value(self, words: list[str], size: int, where: str) -> int:
        value = self._names.value(" ".join(words), where)
        if value >> 8 * size:
            raise LitmusError(where, f"{value:#x} does not fit into {size} bytes")
        return value

    def _vcpu(self, text: str, where: str) -> int:
        if not re.fullmatch(r"v\d+", text, re.ASCII) or int(text[1:]) >= self._vcpus:
            raise LitmusError(where, f"{text!r} is no vCPU; there are v0 to v{self._vcpus - 1}")
        return int(text[1:])

    # --- host operations -----------------------------------------------------------------------------------------

    def host_step(self, line: str, where: str) -> HostStep:
        """An operation of the host, perhaps with `when NAME[index] = VALUE` behind."""
        where = f"{where}: {line!r}"
        text, found, word = line.partition(" when ")
        when = Word(*self._word(word, "OPERATION when NAME[index] = VALUE", where)) if found else None
        return HostStep(line, self._operation(text, where), when)

    def _operation(self, line: str, where: str) -> m.HostOperation:
        name, *arguments = line.replace(",", " ").split()
        if name == "write":
            return m.WritePhys([self._word(line.removeprefix("write"), "write NAME[index] = VALUE", where)])
        if name not in _OPERATIONS:
            known = ", ".join(sorted((*_OPERATIONS, "write")))
            raise LitmusError(where, f"not a host operation; there are {known}")
        usage, make = _OPERATIONS[name]
        kinds = usage.split()
        if kinds == ["FRAME..."]:
            kinds = ["FRAME"] * max(len(arguments), 1)
        wanted = [kind for kind in kinds if not kind.startswith("[")]
        if not len(wanted) <= len(arguments) <= len(kinds):
            raise LitmusError(where, f"wrong number of arguments: {name} {usage}".rstrip())
        values = [self._argument(kind, text, where) for kind, text in zip(kinds, arguments, strict=False)]
        return make(*values)

    def _argument(self, kind: str, text: str, where: str) -> Any:
        """An argument of a host operation, of the kind that its usage says."""
        match kind:
            case "FRAME":
                return self._names.frame_argument(text, where)
            case "VCPU":
                return self._vcpu(text, where)
            case "COUNT" | "SLOT" | "PROCESSOR":
                number = parse_number(text, where)
                if number > _LIMITS[kind]:
                    raise LitmusError(where, f"{number} is too much: at most {_LIMITS[kind]}")
                return number
            case _:
                words = kind.strip("[]").split("|")
                if text not in words:
                    raise LitmusError(where, f"{text!r} is not {' or '.join(words)}")
                return text == words[0]

    def _word(self, line: str, usage: str, where: str) -> tuple[int, int]:
        text, equals, value = line.partition("=")
        if not equals:
            raise LitmusError(where, usage)
        frame, index = self._names.place(text.strip(), where)
        if index >= 512:
            raise LitmusError(where, f"index {index} is beyond the frame's 512 words of 8 bytes")
        return (frame << 12) + 8 * index, self._names.value(value.strip(), where)


_LIMITS: Final = {"COUNT": 1 << 24, "SLOT": 31, "PROCESSOR": 63}


def _set_slot(slot: int, gfn: int, npages: int, huge: bool = False) -> m.HostOperation:
    return m.SetMemoryRegion(slot, gfn, npages, huge)


_OPERATIONS: Final[dict[str, tuple[str, Callable[..., m.HostOperation]]]] = {
    "unmap": ("FRAME", m.Unmap),
    "unmap_range": ("FRAME COUNT", m.UnmapRange),
    "reclaim": ("FRAME", m.Reclaim),
    "reclaim_idle": ("FRAME...", lambda *frames: m.ReclaimIdle(list(frames))),
    "move": ("FRAME rw|ro", m.Move),
    "age": ("FRAME", m.Age),
    "test_age": ("FRAME", m.TestAge),
    "dirty_log": ("SLOT on|off", m.SetDirtyLog),
    "get_dirty_log": ("SLOT", m.GetDirtyLog),
    "set_slot": ("SLOT FRAME COUNT [huge]", _set_slot),
    "delete_slot": ("SLOT", lambda slot: m.SetMemoryRegion(slot, 0, 0)),
    "shrink": ("COUNT", m.Shrink),
    "mmu_pages": ("COUNT", m.SetMmuPages),
    "migrate": ("VCPU PROCESSOR", m.Migrate),
    "zap_all": ("", m.ZapAll),
}
"""By name: what it takes, and what it makes."""
