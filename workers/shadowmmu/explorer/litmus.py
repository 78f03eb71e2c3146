"""Litmus tests: scenarios as small TOML files. docs/LITMUS.md describes the format, for people who write them.

    title = "a large page is split while another vCPU has it in its TLB"
    bug = "large-to-normal"                # the fix that it is about (optional)
    [machine]
    vcpus = 2
    [tables.root]                          # tables by name; `root` is in CR3
    0 = "L3 wua"                           # entry 0: frame L3, present, with W, U and A
    [addresses]
    x = "0/0/0/9"                          # indices from the top table down
    [[vcpu]]
    program = \"\"\"
    r0 = load x
    store @T[9] = G wuad
    \"\"\"
    [[host]]
    program = "unmap G"
    [expect]
    "linux-3.1" = "sometimes"
    fixed = "never"

Names without a frame of their own get one; `@NAME[i]` is an address of the linear map, which every scenario with paging
has at LINEAR. Raises LitmusError, which says what was wrong and where.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from shadowmmu.cpu import x86
from shadowmmu.explorer.outcome import ConditionError, parse_condition
from shadowmmu.explorer.scenario import (
    Access,
    AccessKind,
    Await,
    ChangeRegister,
    Expectation,
    HostStep,
    Instruction,
    Invlpg,
    LoadCr3,
    Locked,
    MachineSpec,
    Registers,
    Scenario,
    SendIpi,
    SetupStep,
    Slot,
    Step,
)
from shadowmmu.kvm import FIXES, Backing, KvmError, Profile
from shadowmmu.protocol import messages as m

__all__ = ["LINEAR", "LitmusError", "load_litmus", "parse_litmus"]

LINEAR: Final = {"64": 0xFFFF_8800_0000_0000, "pae": 0xC000_0000, "32": 0xC000_0000}
"""Where the linear map of guest memory begins, by mode: frame n is at LINEAR + 4096 * n."""

FIRST_FRAME: Final = 16
"""The first frame that a name gets which asks for none."""
FRAME_STEP: Final = 8
"""Names are far enough apart that prefetching maps none of them in the linear map because of another."""
LINEAR_ROOM: Final = 8
"""Frames kept for the tables of the linear map, before FIRST_FRAME."""

_FLAGS: Final = {
    "w": x86.PT_WRITABLE_MASK,
    "u": x86.PT_USER_MASK,
    "a": x86.PT_ACCESSED_MASK,
    "d": x86.PT_DIRTY_MASK,
    "l": x86.PT_PAGE_SIZE_MASK,
    "g": x86.PT_GLOBAL_MASK,
    "n": x86.PT64_NX_MASK,
    "r": 1 << 51,  # reserved: above the guest's physical addresses
}
_CR_BITS: Final = {
    m.ControlRegister.CR0: {"wp": x86.X86_CR0_WP, "pg": x86.X86_CR0_PG},
    m.ControlRegister.CR4: {
        "pae": x86.X86_CR4_PAE,
        "pge": x86.X86_CR4_PGE,
        "pse": x86.X86_CR4_PSE,
        "smep": x86.X86_CR4_SMEP,
    },
    m.ControlRegister.EFER: {"nxe": x86.EFER_NX},
}
_REGISTERS: Final = {register.value: register for register in _CR_BITS}
_PAGING: Final = x86.X86_CR0_PG | x86.X86_CR0_PE | x86.X86_CR0_WP
_LOCKED: Final = {"cmpxchg": m.LockedOp.CMPXCHG, "xchg": m.LockedOp.XCHG, "xadd": m.LockedOp.XADD}


class LitmusError(ValueError):
    """A litmus test is wrong: `where` in it, and `what`."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


def load_litmus(path: Path) -> Scenario:
    """The scenario of a file. Raises LitmusError, or OSError if it cannot be read."""
    return parse_litmus(path.read_text(encoding="utf-8"), path.stem)


def parse_litmus(text: str, name: str) -> Scenario:
    """The scenario of a file's text."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LitmusError(name, f"not TOML: {error}") from error
    return _Reader(data, name).read()


class _Mode(NamedTuple):
    """How a paging mode is laid out: levels with the table that CR3 names, index bits per level, bytes per entry."""

    levels: int
    bits: int
    entry: int
    cr4: int
    efer: int
    linear: int


_MODES: Final = {
    "64": _Mode(
        4,
        9,
        8,
        x86.X86_CR4_PAE | x86.X86_CR4_PGE,
        x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX,
        LINEAR["64"],
    ),
    "pae": _Mode(3, 9, 8, x86.X86_CR4_PAE | x86.X86_CR4_PGE, x86.EFER_NX, LINEAR["pae"]),
    "32": _Mode(2, 10, 4, x86.X86_CR4_PSE | x86.X86_CR4_PGE, 0, LINEAR["32"]),
}


class _Reader:
    def __init__(self, data: dict[str, Any], name: str) -> None:
        self._data = data
        self._name = name
        self._frames: dict[str, int] = {}
        self._addresses: dict[str, int] = {}
        self._memory: dict[int, int] = {}  # by gpa, 8-byte words
        self._complete = False  # every frame has been named

    def _fail(self, where: str, what: str) -> LitmusError:
        return LitmusError(f"{self._name}: {where}", what)

    def read(self) -> Scenario:
        data = self._data
        known = {
            "title", "text", "bug", "profile", "forbidden", "expect", "machine", "frames", "tables", "memory",
            "addresses", "setup", "vcpu", "host",
        }  # fmt: skip
        if unknown := sorted(set(data) - known):
            raise self._fail(unknown[0], f"unknown key; known are {', '.join(sorted(known))}")
        machine: dict[str, Any] = data.get("machine", {})
        spec = self._machine(machine)
        self._complete = True
        for number in range(len(data.get("vcpu", [])), spec.vcpus):
            data.setdefault("vcpu", []).append({"program": "", "number": number})
        programs = tuple(
            self._program(vcpu.get("program", ""), f"vcpu {number}")
            for number, vcpu in enumerate(data.get("vcpu", []))
        )
        if len(programs) != spec.vcpus:
            raise self._fail("vcpu", f"{len(programs)} programs for {spec.vcpus} vCPUs")
        hosts = tuple(
            self._host_program(host.get("program", ""), f"host {number}")
            for number, host in enumerate(data.get("host", []))
        )
        setup = tuple(self._setup(line, spec.vcpus) for line in _lines(data.get("setup", "")))
        bug = data.get("bug", "")
        if bug and bug not in FIXES:
            raise self._fail("bug", f"no fix has the slug {bug!r}")
        forbidden = data.get("forbidden", "")
        if forbidden:
            try:
                parse_condition(forbidden)
            except ConditionError as error:
                raise self._fail("forbidden", str(error)) from error
        return Scenario(
            name=self._name,
            machine=spec.build(),
            words=tuple(sorted(self._memory.items())),
            setup=setup,
            programs=programs,
            hosts=hosts,
            title=data.get("title", ""),
            text=data.get("text", ""),
            bug=bug,
            profile=self._profile(data.get("profile", "linux-3.1")),
            forbidden=forbidden,
            expect=self._expect(data.get("expect", {})),
            frames=tuple(self._frames.items()),
        )

    def _profile(self, text: str) -> str:
        try:
            Profile.parse(text)
        except KvmError as error:
            raise self._fail("profile", str(error)) from error
        return text

    def _expect(self, table: dict[str, str]) -> tuple[tuple[str, Expectation], ...]:
        try:
            return tuple((self._profile(profile), Expectation(what)) for profile, what in table.items())
        except ValueError as error:
            raise self._fail("expect", str(error)) from error

    # --- memory --------------------------------------------------------------------------------------------------

    def _machine(self, table: dict[str, Any]) -> _Spec:
        spec = _Spec(table, self._fail)
        self._mode = spec.mode
        self._frames.update(self._data.get("frames", {}))
        for name in self._data.get("tables", {}):
            self._frame(name)
        self._slot_end = spec.small_frames
        self._spec = spec
        if self._mode is not None:
            self._addresses = {
                name: self._address_path(name, path) for name, path in self._data.get("addresses", {}).items()
            }
            for name, entries in self._data.get("tables", {}).items():
                for index, text in entries.items():
                    self._poke_entry(self._frame(name), int(index, 0), self._value(text, f"tables.{name}"))
            self._linear_map()
            spec.root = self._frame("root")
        else:
            self._addresses = {
                name: int(str(path), 0) for name, path in self._data.get("addresses", {}).items()
            }
        for place, value in self._data.get("memory", {}).items():
            match = _PLACE.fullmatch(place)
            if match is None:
                raise self._fail("memory", f"{place!r} is not NAME[index]")
            self._poke_entry(
                self._frame(match["name"]), int(match["index"], 0), self._value(value, f"memory.{place}")
            )
        return spec

    def _frame(self, name: str) -> int:
        if name not in self._frames:
            if self._complete:
                raise self._fail("programs", f"unknown frame {name!r}; known are {', '.join(self._frames)}")
            taken = set(self._frames.values())
            frame = FIRST_FRAME
            while frame in taken:
                frame += FRAME_STEP
            self._frames[name] = frame
        return self._frames[name]

    def _poke_entry(self, frame: int, index: int, value: int) -> None:
        size = 8 if self._mode is None else self._mode.entry
        gpa = (frame << 12) + index * size
        word = gpa & ~7
        if size == 8:
            self._memory[word] = value
        else:
            shift = (gpa & 4) * 8
            old = self._memory.get(word, 0) & ~(0xFFFF_FFFF << shift)
            self._memory[word] = old | (value & 0xFFFF_FFFF) << shift

    def _linear_map(self) -> None:
        """Every frame of slot 0 at LINEAR, writable for the supervisor, by tables in the frames before FIRST_FRAME."""
        mode = self._mode
        assert mode is not None
        free = iter(range(FIRST_FRAME - LINEAR_ROOM, FIRST_FRAME))
        flags = x86.PT_PRESENT_MASK | x86.PT_WRITABLE_MASK | x86.PT_ACCESSED_MASK
        table = self._frame("root")
        shift = 12 + mode.bits * (mode.levels - 1)
        for level in range(mode.levels, 1, -1):
            index = mode.linear >> shift & ((1 << mode.bits) - 1)
            if level == 3 and mode.levels == 3:
                index &= 3
            child = next(free)
            bits = x86.PT_PRESENT_MASK if level == 3 and mode.levels == 3 else flags
            self._poke_entry(table, index, child << 12 | bits)
            table = child
            shift -= mode.bits
        for frame in range(min(self._slot_end, 1 << mode.bits)):
            self._poke_entry(table, frame, frame << 12 | flags | x86.PT_DIRTY_MASK)

    def _address_path(self, name: str, path: object) -> int:
        text = str(path)
        mode = self._mode
        assert mode is not None
        if "/" not in text:
            return int(text, 0)
        indices = [int(part, 0) for part in text.split("/")]
        if len(indices) != mode.levels:
            raise self._fail(f"addresses.{name}", f"{len(indices)} indices for {mode.levels} levels")
        address = 0
        for index in indices:
            address = address << mode.bits | index
        address <<= 12
        return address | 0xFFFF_0000_0000_0000 if mode.levels == 4 and address >> 47 else address

    def _value(self, text: object, where: str) -> int:
        """A number, or an entry: a frame's name (perhaps +n frames) and its flags; P is understood."""
        if isinstance(text, int):
            return text
        words = str(text).split()
        if len(words) == 1:
            try:
                return int(words[0], 0)
            except ValueError:
                pass
        if not words or len(words) > 2:
            raise self._fail(where, f"{text!r} is neither a number nor an entry like 'T wua'")
        name, _, more = words[0].partition("+")
        frame = int(name, 0) if name[0].isdigit() else self._frame(name)
        value = (frame + int(more or "0", 0)) << 12 | x86.PT_PRESENT_MASK
        for flag in words[1] if len(words) == 2 else "":
            if flag not in _FLAGS:
                raise self._fail(where, f"unknown flag {flag!r} in {text!r}; known are {' '.join(_FLAGS)}")
            value |= _FLAGS[flag]
        return value

    # --- programs ------------------------------------------------------------------------------------------------

    def _gva(self, text: str, where: str) -> tuple[int, int]:
        """(guest virtual address, guest physical address, or -1 for one that is not of the linear map)."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise self._fail(where, f"{text!r} is no address")
        name = match["name"]
        linear = bool(match["at"])
        index = int(match["index"] or "0", 0)
        offset = int(match["offset"] or "0", 0)
        if linear or self._mode is None:
            if self._mode is None and name in self._addresses and not linear:
                return self._addresses[name] + 8 * index + offset, -1
            size = 8 if self._mode is None else self._mode.entry
            gpa = (self._frame(name) << 12) + index * size + offset
            return gpa + (0 if self._mode is None else self._mode.linear), gpa
        if name[0].isdigit():
            return int(name, 0) + 8 * index + offset, -1
        if name not in self._addresses:
            known = ", ".join(self._addresses) or "none"
            raise self._fail(where, f"unknown address {name!r}; known are {known}; frames are @NAME")
        return self._addresses[name] + 8 * index + offset, -1

    def _program(self, text: str, where: str) -> tuple[Step, ...]:
        return tuple(self._step(line, where) for line in _lines(text))

    def _step(self, line: str, where: str) -> Step:
        where = f"{where}: {line!r}"
        into, found, rest = line.partition("=")
        register = into.strip()
        if found and re.fullmatch(r"r\d+", register):
            return Step(line, self._instruction(rest.split(), where), register)
        return Step(line, self._instruction(line.split(), where))

    def _instruction(self, words: list[str], where: str) -> Instruction:
        if not words:
            raise self._fail(where, "no instruction")
        name, arguments = words[0], words[1:]
        user = name.startswith("u") and name[1:] in (*_LOCKED, "load", "store", "fetch")
        if user:
            name = name[1:]
        name, _, width = name.partition(".")
        size = int(width or (4 if self._mode is not None and self._mode.entry == 4 else 8))
        match name:
            case "load" | "fetch" if len(arguments) == 1:
                gva, _ = self._gva(arguments[0], where)
                return Access(AccessKind(name), gva, size, 0, user)
            case "store" if len(arguments) >= 3 and arguments[1] == "=":
                gva, _ = self._gva(arguments[0], where)
                value = self._value(" ".join(arguments[2:]), where)
                return Access(AccessKind.STORE, gva, size, value, user)
            case "cmpxchg" | "xchg" | "xadd" if len(arguments) >= 3 and arguments[1] == "=":
                gva, _ = self._gva(arguments[0], where)
                old, arrow, new = " ".join(arguments[2:]).rpartition("->")
                if bool(arrow) is not (name == "cmpxchg"):
                    raise self._fail(
                        where, "cmpxchg ADDRESS = OLD -> NEW, xchg ADDRESS = NEW, xadd ADDRESS = VALUE"
                    )
                expected = self._value(old.strip(), where) if arrow else 0
                return Locked(_LOCKED[name], gva, self._value(new.strip(), where), expected, size, user)
            case "await" if len(arguments) >= 3 and arguments[1] == "=":
                gva, gpa = self._gva(arguments[0], where)
                if gpa < 0:
                    raise self._fail(where, "await looks at the linear map only: await @NAME[i] = VALUE")
                return Await(gva, gpa, self._value(" ".join(arguments[2:]), where))
            case "invlpg" if len(arguments) == 1:
                return Invlpg(self._gva(arguments[0], where)[0])
            case "ipi" if arguments and all(re.fullmatch(r"v\d+", target) for target in arguments):
                return SendIpi(tuple(int(target[1:]) for target in arguments))
            case "cr3" if len(arguments) <= 1:
                return LoadCr3(self._frame(arguments[0]) << 12 if arguments else None)
            case "cr0" | "cr4" | "efer" if arguments:
                return self._change(_REGISTERS[name], arguments, where)
            case _:
                raise self._fail(
                    where,
                    "not an instruction; there are load A, store A = V, fetch A, cmpxchg A = V -> V, xchg A = V, "
                    "xadd A = V (each also with u in front: with user rights), await @F[i] = V, "
                    "invlpg A, ipi vN ..., cr3 [F], "
                    "cr0|cr4|efer +bit -bit",
                )

    def _change(self, register: m.ControlRegister, arguments: list[str], where: str) -> ChangeRegister:
        masks = {"+": 0, "-": 0}
        for argument in arguments:
            bit = _CR_BITS[register].get(argument[1:])
            if argument[0] not in masks or bit is None:
                raise self._fail(
                    where, f"{argument!r} is not + or - and one of {', '.join(_CR_BITS[register])}"
                )
            masks[argument[0]] |= bit
        return ChangeRegister(register, masks["+"], masks["-"])

    def _host_program(self, text: str, where: str) -> tuple[HostStep, ...]:
        return tuple(HostStep(line, self._operation(line, where)) for line in _lines(text))

    def _operation(self, line: str, where: str) -> m.HostOperation:
        where = f"{where}: {line!r}"
        name, *arguments = line.replace(",", " ").split()
        try:
            make = _OPERATIONS.get(name)
            if make is not None:
                return make(self._frame_argument, arguments)
            if name == "write":
                return self._write_phys(line, where)
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, LitmusError):
                raise
            raise self._fail(where, f"wrong arguments: {error}") from error
        raise self._fail(
            where, f"not a host operation; there are {', '.join(sorted((*_OPERATIONS, 'write')))}"
        )

    def _write_phys(self, line: str, where: str) -> m.HostOperation:
        place, _, value = line.removeprefix("write").partition("=")
        match = _PLACE.fullmatch(place.strip())
        if match is None:
            raise self._fail(where, "write NAME[index] = VALUE")
        gpa = (self._frame(match["name"]) << 12) + 8 * int(match["index"], 0)
        return m.WritePhys([(gpa, self._value(value.strip(), where))])

    def _frame_argument(self, text: str) -> int:
        """A frame by name (perhaps +n) or number."""
        name, _, more = text.partition("+")
        return (int(name, 0) if name[0].isdigit() else self._frame(name)) + int(more or "0", 0)

    def _setup(self, line: str, vcpus: int) -> SetupStep:
        who, _, what = line.partition(":")
        who, what = who.strip(), what.strip()
        if who == "host":
            return SetupStep(-1, HostStep(what, self._operation(what, "setup")))
        if not re.fullmatch(r"v\d+", who) or int(who[1:]) >= vcpus:
            raise self._fail(f"setup: {line!r}", "each line begins with `v0:`, `v1:`, ... or `host:`")
        return SetupStep(int(who[1:]), self._step(what, "setup"))


class _Spec:
    """The [machine] table."""

    def __init__(self, table: dict[str, Any], fail: Callable[[str, str], LitmusError]) -> None:
        known = {
            "vcpus", "mode", "frames", "backing", "slots", "mmu_pages", "vpid", "tdp", "memory_model",
            "tlbs_dirty_bits", "cr0", "cr4",
        }  # fmt: skip
        if unknown := sorted(set(table) - known):
            raise fail(f"machine.{unknown[0]}", f"unknown key; known are {', '.join(sorted(known))}")
        name = str(table.get("mode", "64"))
        if name not in (*_MODES, "off"):
            raise fail("machine.mode", f"{name!r} is not one of {', '.join(_MODES)}, off")
        self.mode = _MODES.get(name)
        self.vcpus = int(table.get("vcpus", 2))
        self.root = 0
        self._table = table
        self._fail = fail
        first = (0, int(table.get("frames", 512)), str(table.get("backing", "4k")))
        self._slots = [Slot(0, *first)]
        for number, slot in enumerate(table.get("slots", []), 1):
            self._slots.append(Slot(number, slot["gfn"], slot["pages"], slot.get("backing", "4k")))
        for slot in self._slots:
            if slot.backing not in {backing.value for backing in Backing}:
                raise fail("machine", f"unknown backing {slot.backing!r}")
        self.small_frames = self._slots[0].npages

    def _bits(self, register: m.ControlRegister, value: int) -> int:
        for word in str(self._table.get(register.value, "")).split():
            bit = _CR_BITS[register].get(word[1:])
            if bit is None or word[0] not in "+-":
                raise self._fail(f"machine.{register.value}", f"{word!r} is not + or - and a bit's name")
            value = value | bit if word[0] == "+" else value & ~bit
        return value

    def build(self) -> MachineSpec:
        mode = self.mode
        if mode is None:
            registers = Registers(x86.X86_CR0_PE, 0, 0, 0)
        else:
            registers = Registers(
                self._bits(m.ControlRegister.CR0, _PAGING),
                self.root << 12,
                self._bits(m.ControlRegister.CR4, mode.cr4),
                mode.efer,
            )
        tdp = self._table.get("tdp")
        return MachineSpec(
            slots=tuple(self._slots),
            registers=(registers,) * self.vcpus,
            mmu_pages=int(self._table.get("mmu_pages", 1024)),
            vpid=bool(self._table.get("vpid", True)),
            tdp=None if tdp is None else m.Tdp(tdp),
            tso=self._table.get("memory_model", "sc") == "tso",
            tlbs_dirty_bits=int(self._table.get("tlbs_dirty_bits", 32)),
        )


_PLACE: Final = re.compile(r"(?P<name>\w+)\[(?P<index>\w+)\]")
_ADDRESS: Final = re.compile(
    r"(?P<at>@?)(?P<name>\w+)(?:\[(?P<index>\w+)\])?(?:\+(?P<offset>\w+))?", re.ASCII
)


def _lines(text: str | list[str]) -> list[str]:
    lines = text.splitlines() if isinstance(text, str) else text
    stripped = (line.split("#")[0].strip() for line in lines)
    return [line for line in stripped if line]


_Frame = Callable[[str], int]


def _write_access(word: str) -> bool:
    return {"rw": True, "ro": False}[word]


def _switch(word: str) -> bool:
    return {"on": True, "off": False}[word]


_OPERATIONS: Final[dict[str, Callable[[_Frame, list[str]], m.HostOperation]]] = {
    "unmap": lambda frame, a: m.Unmap(frame(a[0])),
    "unmap_range": lambda frame, a: m.UnmapRange(frame(a[0]), int(a[1], 0)),
    "reclaim": lambda frame, a: m.Reclaim(frame(a[0])),
    "reclaim_idle": lambda frame, a: m.ReclaimIdle(list(map(frame, a))),
    "move": lambda frame, a: m.Move(frame(a[0]), _write_access(a[1])),
    "age": lambda frame, a: m.Age(frame(a[0])),
    "test_age": lambda frame, a: m.TestAge(frame(a[0])),
    "dirty_log": lambda _, a: m.SetDirtyLog(int(a[0], 0), _switch(a[1])),
    "get_dirty_log": lambda _, a: m.GetDirtyLog(int(a[0], 0)),
    "set_slot": lambda frame, a: m.SetMemoryRegion(
        int(a[0], 0), frame(a[1]), int(a[2], 0), a[3:] == ["huge"]
    ),
    "delete_slot": lambda _, a: m.SetMemoryRegion(int(a[0], 0), 0, 0),
    "shrink": lambda _, a: m.Shrink(int(a[0], 0)),
    "mmu_pages": lambda _, a: m.SetMmuPages(int(a[0], 0)),
    "migrate": lambda _, a: m.Migrate(int(a[0].removeprefix("v")), int(a[1], 0)),
    "zap_all": lambda _frame, _arguments: m.ZapAll(),
}
