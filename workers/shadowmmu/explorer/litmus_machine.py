"""The [machine] table of a litmus file: the virtual machine, the paging mode and the registers."""

from __future__ import annotations

from typing import Final, NamedTuple

from shadowmmu.cpu import x86
from shadowmmu.explorer.actors import KIND
from shadowmmu.explorer.litmus_table import LitmusError, Table
from shadowmmu.explorer.scenario import MachineSpec, Registers, Slot
from shadowmmu.kvm import Backing
from shadowmmu.protocol import messages as m

__all__ = ["CR_BITS", "LINEAR", "LitmusMachine", "Mode", "register_bits"]

LINEAR: Final = {"64": 0xFFFF_8800_0000_0000, "pae": 0xC000_0000, "32": 0xC000_0000}
"""Where the linear map of the named frames begins, by mode: frame n is at LINEAR + 4096 * n."""

FRAMES: Final = 1 << 24
"""Guest frames below the reserved address bits."""

CR_BITS: Final = {
    m.ControlRegister.CR0: {"wp": x86.X86_CR0_WP, "pg": x86.X86_CR0_PG},
    m.ControlRegister.CR4: {
        "pae": x86.X86_CR4_PAE,
        "pge": x86.X86_CR4_PGE,
        "pse": x86.X86_CR4_PSE,
        "smep": x86.X86_CR4_SMEP,
    },
    m.ControlRegister.EFER: {"nxe": x86.EFER_NX},
}
"""The bits of control registers that have names."""

_PAGING: Final = x86.X86_CR0_PG | x86.X86_CR0_PE | x86.X86_CR0_WP


class Mode(NamedTuple):
    """How a paging mode is laid out: levels with the table that CR3 names, index bits per level, bytes per entry.

    `address_bits`: of guest virtual addresses; `linear`: where the linear map begins.
    """

    levels: int
    bits: int
    entry: int
    address_bits: int
    cr4: int
    efer: int
    linear: int

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return 1 << self.bits

    def sign_extend(self, address: int) -> int:
        """The address that 48 bits stand for in 64-bit mode; as it is in the others."""
        return address | 0xFFFF << 48 if self.levels == 4 and address >> 47 else address


_MODES: Final = {
    "64": Mode(
        levels=4,
        bits=9,
        entry=8,
        address_bits=64,
        cr4=x86.X86_CR4_PAE | x86.X86_CR4_PGE,
        efer=x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX,
        linear=LINEAR["64"],
    ),
    "pae": Mode(
        levels=3,
        bits=9,
        entry=8,
        address_bits=32,
        cr4=x86.X86_CR4_PAE | x86.X86_CR4_PGE,
        efer=x86.EFER_NX,
        linear=LINEAR["pae"],
    ),
    "32": Mode(
        levels=2,
        bits=10,
        entry=4,
        address_bits=32,
        cr4=x86.X86_CR4_PSE | x86.X86_CR4_PGE,
        efer=0,
        linear=LINEAR["32"],
    ),
}


def register_bits(register: m.ControlRegister, words: list[str], where: str) -> tuple[int, int]:
    """The bits of `+wp -pg` to be set, and those to be cleared."""
    masks = {"+": 0, "-": 0}
    for word in words:
        bit = CR_BITS[register].get(word[1:])
        if word[0] not in masks or bit is None:
            raise LitmusError(where, f"{word!r} is not + or - and one of {', '.join(CR_BITS[register])}")
        masks[word[0]] |= bit
    return masks["+"], masks["-"]


class LitmusMachine:
    """What the [machine] table says. `mode` is None with paging off."""

    def __init__(self, table: Table) -> None:
        table.check(
            {
                "vcpus", "mode", "frames", "backing", "slots", "mmu_pages", "vpid", "tdp", "memory_model",
                "tlbs_dirty_bits", "cr0", "cr4", "efer",
            }
        )  # fmt: skip
        self._table = table
        self.mode = _MODES.get(table.choice("mode", "64", (*_MODES, "off")))
        self.vcpus = table.number("vcpus", 2, 1, KIND)
        self.slots = [Slot(0, 0, table.number("frames", 512, 1, FRAMES), _backing(table))]
        for number, slot in enumerate(table.tables("slots"), 1):
            slot.check({"gfn", "pages", "backing"})
            gfn = slot.number("gfn", None, 0, FRAMES - 1)
            self.slots.append(Slot(number, gfn, slot.number("pages", None, 1, FRAMES - gfn), _backing(slot)))

    @property
    def small_frames(self) -> int:
        """Frames of slot 0."""
        return self.slots[0].npages

    def has_memory(self, frame: int) -> bool:
        """Whether the frame is in a slot."""
        return any(slot.gfn <= frame < slot.gfn + slot.npages for slot in self.slots)

    def _register(self, register: m.ControlRegister, value: int) -> int:
        words = self._table.text(register.value).split()
        set_bits, clear_bits = register_bits(register, words, self._table.place(register.value))
        return value & ~clear_bits | set_bits

    def build(self, root: int) -> MachineSpec:
        """The machine, all of whose vCPUs begin with the table in frame `root`."""
        table, mode = self._table, self.mode
        registers = Registers(
            self._register(m.ControlRegister.CR0, x86.X86_CR0_PE if mode is None else _PAGING),
            root << 12,
            self._register(m.ControlRegister.CR4, 0 if mode is None else mode.cr4),
            self._register(m.ControlRegister.EFER, 0 if mode is None else mode.efer),
        )
        tdp = table.choice("tdp", "off", ("off", *(tdp.value for tdp in m.Tdp)))
        return MachineSpec(
            slots=tuple(self.slots),
            registers=(registers,) * self.vcpus,
            mmu_pages=table.number("mmu_pages", 1024, 1, 1 << 20),
            vpid=table.switch("vpid", True),
            tdp=None if tdp == "off" else m.Tdp(tdp),
            tso=table.choice("memory_model", "sc", ("sc", "tso")) == "tso",
            tlbs_dirty_bits=table.number("tlbs_dirty_bits", 32, 2, 32),
        )


def _backing(table: Table) -> str:
    return table.choice("backing", Backing.SMALL.value, [backing.value for backing in Backing])
