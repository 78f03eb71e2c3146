"""A processor without a hypervisor for one guest program: guest tables are walked as they are, and translations kept.

Its TLB forgets nothing before it is told to. At every hit the tables are walked again: a translation that allows more
than they do, or another frame, means that the guest's kernel forgot to invalidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shadowmmu.cpu import Translation, WalkFault, hardware_walk, x86
from shadowmmu.cpu.guest.boot import BootImage
from shadowmmu.cpu.program import Halt, Invlpg, Program, Touches, WriteRegister
from shadowmmu.cpu.tlb import checked_rights, needed_rights
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.messages import ControlRegister

_RIGHTS = int(AccessFlag.MAY_WRITE | AccessFlag.MAY_USER | AccessFlag.MAY_FETCH)


class PlainMmu:
    """Memory, CR3, and a TLB. `counts`: instructions by kind, `fault` for page faults, `walk` for TLB misses."""

    def __init__(self, image: BootImage, vcpu: int = 0) -> None:
        self.words: dict[int, int] = {gpa >> 3: value for gpa, value in image.words if value}
        self.cr3 = image.registers[vcpu].cr3
        self.tlb: dict[int, Translation] = {}
        self.counts: Counter[str] = Counter()

    # --- what `hardware_walk` wants ------------------------------------------------------------------------------

    def read(self, table: int, index: int) -> int:
        return self.words.get(table << 9 | index, 0)

    def child(self, _table: int, _index: int, entry: int) -> int:
        return (entry & x86.PT64_BASE_ADDR_MASK) >> 12

    def set_bits(self, table: int, index: int, expected: int, bits: int) -> bool:
        self.words[table << 9 | index] = expected | bits
        return True

    def walk(self, gva: int, flags: int) -> Translation | WalkFault:
        walk: Iterator[None] = hardware_walk(self, self.cr3 >> 12, gva, flags)
        while True:
            try:
                next(walk)
            except StopIteration as stop:
                result: Translation | WalkFault = stop.value
                return result

    # --- execution -----------------------------------------------------------------------------------------------

    def run(self, program: Program, instructions: int) -> None:
        """Executes so many instructions."""
        for _ in range(instructions):
            self.step(program)

    def step(self, program: Program) -> None:
        """Executes one instruction, or raises its page fault."""
        op = program.fetch()
        match op:
            case Touches():
                self.touch(program, op)
                return
            case Invlpg():
                self.tlb.pop(op.gva >> 12, None)
            case WriteRegister():
                assert op.register is ControlRegister.CR3
                self.cr3 = op.value
                self.tlb = {
                    page: found for page, found in self.tlb.items() if page >> 51
                }  # global: the kernel half
            case Halt():
                pass
            case _:
                raise AssertionError(op)
        self.counts[type(op).__name__] += 1
        program.retire(0)

    def touch(self, program: Program, run: Touches) -> None:
        flags, gva, size, value = run.items[run.position]
        assert (gva & 0xFFF) + size <= 0x1000
        found = self.tlb.get(gva >> 12)
        if found is None or found.flags & checked_rights[flags] != needed_rights[flags]:
            self.counts["walk"] += 1
            result = self.walk(gva, flags)
            if not isinstance(result, Translation):
                self.tlb.pop(gva >> 12, None)
                self.counts["fault"] += 1
                program.page_fault(result.error_code, gva)
                return
            found = self.tlb[gva >> 12] = result
        else:
            now = self.walk(gva, flags)
            assert isinstance(now, Translation), f"{gva:#x} was not invalidated"
            assert (now.pfn, found.flags & ~now.flags & _RIGHTS) == (found.pfn, 0), (
                f"{gva:#x} was not invalidated"
            )
        self.counts["touch"] += 1
        if flags & AccessFlag.WRITE:
            assert not (flags & AccessFlag.USER and value & 1), "data cannot make a present paging entry"
            frame = found.pfn + ((gva >> 12) & 511 if found.level > 1 else 0)
            self.words[frame << 9 | (gva & 0xFFF) >> 3] = value
        run.position += 1
