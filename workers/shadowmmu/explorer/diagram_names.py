"""Names for what a diagram shows: guest frames, addresses and paging entries, as the scenario writes them.

Frames have the scenario's names (`T`), or their numbers; a place in a frame is `T[9]`; an entry is `G wuad`. Addresses
have the names under which the scenario's own instructions use them, or that of their place in the linear map (`@T`).
"""

from __future__ import annotations

import re
from typing import Final

from shadowmmu.cpu import x86
from shadowmmu.explorer.litmus import LINEAR
from shadowmmu.explorer.litmus_names import LINEAR_FRAMES
from shadowmmu.explorer.scenario import Access, Await, HostStep, Invlpg, Locked, Scenario, Step
from shadowmmu.protocol.events import AccessFlag

__all__ = ["LINEAR_TABLES", "Names", "rights"]

LINEAR_TABLES: Final = "linear map"
"""What tables without a name are, where others have one: the linear map's."""

_FLAGS: Final = {
    "w": x86.PT_WRITABLE_MASK,
    "u": x86.PT_USER_MASK,
    "a": x86.PT_ACCESSED_MASK,
    "d": x86.PT_DIRTY_MASK,
    "l": x86.PT_PAGE_SIZE_MASK,
    "g": x86.PT_GLOBAL_MASK,
    "n": x86.PT64_NX_MASK,
}
_ADDRESS: Final = x86.PT64_BASE_ADDR_MASK
_LARGE: Final = 512
"""4 KiB frames in a large page of 2 MiB."""
_KNOWN: Final = x86.PT_PRESENT_MASK | _ADDRESS | sum(_FLAGS.values())
_OPERAND: Final = re.compile(r"(?:r\d+\s*=\s*)?[\w.]+\s+(@?\w+)", re.ASCII)
_RIGHTS: Final = {
    "w": AccessFlag.MAY_WRITE,
    "u": AccessFlag.MAY_USER,
    "x": AccessFlag.MAY_FETCH,
    "d": AccessFlag.DIRTY,
    "l": AccessFlag.LARGE,
}


def rights(flags: int) -> str:
    """What a cached translation allows: w write, u user, x fetch; d dirty, l large."""
    return "".join(letter for letter, flag in _RIGHTS.items() if flags & flag)


class Names:
    """The names of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        registers = scenario.machine.registers[0]
        self._frames = {gfn: name for name, gfn in scenario.frames}
        self._slot_end = max(slot.gfn + slot.npages for slot in scenario.machine.slots)
        self._linear = -1
        self.entry_size = 8
        if registers.cr0 & x86.X86_CR0_PG:
            if registers.efer & x86.EFER_LMA:
                self._linear = LINEAR["64"]
            elif registers.cr4 & x86.X86_CR4_PAE:
                self._linear = LINEAR["pae"]
            else:
                self._linear = LINEAR["32"]
                self.entry_size = 4
        self._pages: dict[int, str] = {}
        steps: list[Step | HostStep] = [setup.step for setup in scenario.setup]
        for program in (*scenario.programs, *scenario.handlers):
            steps += program
        for step in steps:
            self._learn(step)

    def _learn(self, step: Step | HostStep) -> None:
        if isinstance(step, HostStep) or not isinstance(step.instruction, Access | Locked | Await | Invlpg):
            return
        operand = _OPERAND.match(step.text)
        if operand is not None and not operand[1][0].isdigit():
            self._pages.setdefault(step.instruction.gva >> 12, operand[1])

    def frame(self, gfn: int) -> str:
        """A guest frame."""
        if gfn < 0:
            return "no guest frame"
        name = self._frames.get(gfn)
        if name is None and (block := self._frames.get(gfn & -_LARGE)) is not None:
            return f"{block}+{gfn % _LARGE}"
        return name or f"frame {gfn:#x}"

    def table(self, gfn: int) -> str:
        """A guest frame that is a page table."""
        name = self._frames.get(gfn)
        if name is None:
            return LINEAR_TABLES if self._frames else f"table {gfn:#x}"
        return name

    def is_named(self, gfn: int) -> bool:
        """Whether the scenario has a name for it."""
        return gfn in self._frames

    def place(self, gpa: int) -> str:
        """A place in guest memory: `T[9]`."""
        index, rest = divmod(gpa & 0xFFF, self.entry_size)
        return f"{self.frame(gpa >> 12)}[{index}]" + (f"+{rest}" if rest else "")

    def page(self, gva: int, size: int = 4096) -> str:
        """The page of `size` bytes that an address is in: `x`, `@T`."""
        name = self._pages.get(gva >> 12)
        if name is None and size > 1 << 12:  # a name of some address in the large page will do
            name = next((n for page, n in self._pages.items() if page << 12 & -size == gva & -size), None)
        if name is not None:
            return name
        gfn = (gva - self._linear) >> 12
        if self._linear >= 0 and 0 <= gfn < self._slot_end:
            return f"@{self._frames.get(gfn, hex(gfn))}"
        return hex(gva & ~0xFFF)

    def address(self, gva: int) -> str:
        """An address: `x[5]`, `@T[9]`."""
        page = self.page(gva)
        if page[0].isdigit():
            return hex(gva)
        size = self.entry_size if page.startswith("@") else 8
        index, rest = divmod(gva & 0xFFF, size)
        return page + (f"[{index}]" if index else "") + (f"+{rest}" if rest else "")

    def is_linear_table(self, value: int) -> bool:
        """Whether an entry leads to a table of the linear map, which stand before all frames with names."""
        gfn = (value & _ADDRESS) >> 12
        return gfn in LINEAR_FRAMES and gfn not in self._frames

    def value(self, value: int) -> str:
        """What is stored: an entry `G wuad` if it can be one of a named frame, otherwise a number."""
        gfn = (value & _ADDRESS) >> 12
        if value & x86.PT_PRESENT_MASK and gfn in self._frames and not value & ~_KNOWN:
            return self.entry(value)
        return str(value) if value < 4096 else hex(value)

    def entry(self, value: int) -> str:
        """A guest entry: frame and flags."""
        flags = "".join(letter for letter, mask in _FLAGS.items() if value & mask)
        return f"{self.frame((value & _ADDRESS) >> 12)} {flags}".rstrip()

    def explain(self, text: str) -> str:
        """A text of the checker, with the names of addresses and frames beside their numbers."""

        def gva(match: re.Match[str]) -> str:
            address = int(match[1], 16)
            name = self.address(address)
            return f"gva {name}" if not name.startswith("0x") else match[0]

        def gfn(match: re.Match[str]) -> str:
            number = int(match[1], 16)
            return f"guest frame {self._frames[number]}" if number in self._frames else match[0]

        text = re.sub(r"\bgva (0x[0-9a-f]+)", gva, text)
        return re.sub(r"\bguest frame (0x[0-9a-f]+)", gfn, text)
