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
has, of the named frames, at LINEAR. Raises LitmusError, which says what was wrong and where.

This module reads the file as a whole; its parts are read by `litmus_machine`, `litmus_names` and `litmus_program`.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

from shadowmmu.explorer.actors import KIND
from shadowmmu.explorer.litmus_machine import LINEAR, LitmusMachine
from shadowmmu.explorer.litmus_names import Names
from shadowmmu.explorer.litmus_program import ProgramReader
from shadowmmu.explorer.litmus_table import LitmusError, Table
from shadowmmu.explorer.outcome import ConditionError, memory_words, parse_condition, registers
from shadowmmu.explorer.scenario import Expectation, HostStep, Scenario, SetupStep, Step
from shadowmmu.explorer.world import kvm_config
from shadowmmu.kvm import FIXES, Kvm, KvmError, Profile
from shadowmmu.machine.refusals import host_operation_refusal
from shadowmmu.protocol import messages as m

__all__ = ["LINEAR", "LitmusError", "load_litmus", "parse_litmus"]

_KEYS: Final = frozenset(
    {
        "title", "text", "bug", "profile", "forbidden", "exists", "expect", "machine", "frames", "tables", "memory",
        "addresses", "setup", "vcpu", "host",
    }
)  # fmt: skip


def load_litmus(path: Path) -> Scenario:
    """The scenario of a file. Raises LitmusError, or OSError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LitmusError(path.stem, f"not UTF-8: {error}") from error
    return parse_litmus(text, path.stem)


def parse_litmus(text: str, name: str) -> Scenario:
    """The scenario of a file's text. Raises LitmusError."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise LitmusError(name, f"not TOML: {error}") from error
    return _Reader(Table(data, name), name).read()


class _Reader:
    def __init__(self, table: Table, name: str) -> None:
        self._table = table
        self._name = name
        table.check(_KEYS)
        self._machine = LitmusMachine(table.table("machine"))
        self._names = Names(self._machine)
        self._programs = ProgramReader(self._names, self._machine.vcpus)

    def read(self) -> Scenario:
        """The whole of it."""
        table, names = self._table, self._names
        names.read_frames(table.table("frames"))
        names.read_addresses(table.table("addresses"))
        names.read_tables(table.table("tables"))
        names.read_memory(table.table("memory"))
        root = 0
        if self._machine.mode is not None:
            names.map_linearly(table.place("tables.root"))
            root = names.frame("root", table.place("tables"))
        names.complete()
        programs, handlers = self._vcpus()
        scenario = Scenario(
            name=self._name,
            machine=self._machine.build(root),
            words=tuple(sorted(names.memory.items())),
            setup=tuple(self._setup(line) for line in table.lines("setup")),
            programs=programs,
            hosts=self._hosts(),
            title=table.text("title"),
            text=table.text("text"),
            bug=table.text("bug"),
            profile=self._profile(table.text("profile", "linux-3.1"), "profile"),
            forbidden=table.text("forbidden"),
            exists=table.text("exists"),
            expect=self._expect(table.table("expect")),
            frames=tuple(names.frames.items()),
            handlers=handlers if any(handlers) else (),
        )
        if scenario.bug and scenario.bug not in FIXES:
            raise LitmusError(table.place("bug"), f"no fix has the slug {scenario.bug!r}")
        self._check_condition(scenario, scenario.forbidden, "forbidden")
        self._check_condition(scenario, scenario.exists, "exists")
        self._check_host_operations(scenario)
        return scenario

    def _vcpus(self) -> tuple[tuple[tuple[Step, ...], ...], tuple[tuple[Step, ...], ...]]:
        """Per vCPU the program, and the interrupt handler."""
        tables = self._table.tables("vcpu")
        missing = self._machine.vcpus - len(tables)
        if missing < 0:
            raise LitmusError(
                self._table.place("vcpu"), f"{len(tables)} programs for {self._machine.vcpus} vCPUs"
            )
        for table in tables:
            table.check({"program", "on_interrupt"})
        programs = [self._steps(table, "program") for table in tables]
        handlers = [self._steps(table, "on_interrupt") for table in tables]
        nothing: list[tuple[Step, ...]] = [()] * missing
        return (*programs, *nothing), (*handlers, *nothing)

    def _steps(self, table: Table, key: str) -> tuple[Step, ...]:
        return tuple(self._programs.step(line, table.place(key)) for line in table.lines(key))

    def _hosts(self) -> tuple[tuple[HostStep, ...], ...]:
        tables = self._table.tables("host")
        if len(tables) > KIND:
            raise LitmusError(self._table.place("host"), f"there are at most {KIND} host threads")
        for table in tables:
            table.check({"program"})
        return tuple(
            tuple(self._programs.host_step(line, table.place("program")) for line in table.lines("program"))
            for table in tables
        )

    def _setup(self, line: str) -> SetupStep:
        where = self._table.place("setup")
        match = re.fullmatch(r"(host|v\d+)\s*:\s*(\S.*)", line, re.ASCII)
        if match is None:
            raise LitmusError(where, f"{line!r} does not begin with `v0:`, `v1:`, ... or `host:`")
        who, what = match[1], match[2]
        if who == "host":
            step = self._programs.host_step(what, where)
            if step.when is not None:
                raise LitmusError(
                    where, f"{line!r}: the lines of the set-up come one after another, without `when`"
                )
            return SetupStep(-1, step)
        if int(who[1:]) >= self._machine.vcpus:
            raise LitmusError(where, f"{line!r}: there are v0 to v{self._machine.vcpus - 1}")
        return SetupStep(int(who[1:]), self._programs.step(what, where))

    def _profile(self, text: str, key: str) -> str:
        try:
            Profile.parse(text)
        except KvmError as error:
            raise LitmusError(self._table.place(key), str(error)) from error
        return text

    def _expect(self, table: Table) -> tuple[tuple[str, Expectation], ...]:
        words = [expectation.value for expectation in Expectation]
        return tuple(
            (self._profile(profile, "expect"), Expectation(table.choice(profile, "", words)))
            for profile, _ in table.items()
        )

    def _check_condition(self, scenario: Scenario, text: str, key: str) -> None:
        """Every name in the condition is of something that there is."""
        if not text:
            return
        where = self._table.place(key)
        try:
            condition = parse_condition(text)
        except ConditionError as error:
            raise LitmusError(where, str(error)) from error
        handlers = scenario.handlers or ((),) * scenario.vcpus
        written = {
            f"v{number}:{step.into}"
            for number, programs in enumerate(zip(scenario.programs, handlers, strict=True))
            for step in (*programs[0], *programs[1])
            if step.into
        } | {
            f"v{setup.vcpu}:{setup.step.into}"
            for setup in scenario.setup
            if isinstance(setup.step, Step) and setup.step.into
        }
        for register in sorted(registers(condition) - written):
            raise LitmusError(where, f"no instruction of a program has its result in {register}")
        for name, index in sorted(memory_words(condition)):
            if not self._machine.has_memory(self._names.frame(name, where)):
                raise LitmusError(where, f"frame {name} is in no memory slot")
            if not 0 <= index < 512:
                raise LitmusError(where, f"{name}[{index}]: a frame has 512 words of 8 bytes")

    def _check_host_operations(self, scenario: Scenario) -> None:
        """The machine would take each of them; with slots that come and go, that depends on when."""
        try:
            kvm = Kvm(kvm_config(scenario, scenario.profile))
        except KvmError as error:
            raise LitmusError(self._table.place("machine"), str(error)) from error
        for _ in range(scenario.vcpus):
            kvm.create_vcpu()
        in_setup = [setup.step for setup in scenario.setup if isinstance(setup.step, HostStep)]
        steps = [*in_setup, *(step for program in scenario.hosts for step in program)]
        if any(isinstance(step.operation, m.SetMemoryRegion) for step in steps):
            return
        for step in steps:
            refusal = host_operation_refusal(kvm, step.operation)
            if refusal is not None:
                raise LitmusError(self._table.place("host"), f"{step.text!r}: {refusal}")
