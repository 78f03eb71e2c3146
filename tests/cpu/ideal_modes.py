"""The ideal machine for guests of every paging mode.

Guest tables are walked as the Intel manual says (vol. 3, chapter 4), in flat memory, whatever their format; PDPTEs are
loaded with CR3. Register writes are refused as it says, too. Written without a look at the guest program's own records
or at KVM's walker, so that both can be wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shadowmmu.cpu import Translation, WalkFault, boot_image
from shadowmmu.cpu.guest.modes import ModesProgram
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from tests.cpu.ideal import IdealMachine, Vcpu

PG, WP, PE, NW, CD = 1 << 31, 1 << 16, 1, 1 << 29, 1 << 30
PSE, PAE = 1 << 4, 1 << 5
LME, NX = 1 << 8, 1 << 11
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
XD = 1 << 63
PHYSICAL_BITS = 40
ABOVE = ((1 << 52) - 1) & ~((1 << PHYSICAL_BITS) - 1)
PDPTE_RESERVED = 0x1E6 | ABOVE | 0xFFF << 52
WRITE_FLAG = int(AccessFlag.WRITE)


class TripleFaultError(Exception):
    """The guest did what makes a virtual machine shut down."""


class Memory(msgspec.Struct):
    """How a processor reads and writes physical memory: `load(gpa, size)`, `store(gpa, size, value)`."""

    pages: int
    load: Callable[[int, int], int]
    store: Callable[[int, int, int], None]


class Processor:
    """The registers of a vCPU and its page walk."""

    def __init__(self, memory: Memory, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        self.memory = memory
        self.cr0, self.cr3, self.cr4, self.efer = cr0, cr3, cr4, efer
        self.pdptes = [0, 0, 0, 0]
        self.tables: set[tuple[int, m.GuestMode, int]] = set()
        """Which frames were read as tables, in which mode, and how far right the address was shifted for the index."""
        if self.mode is m.GuestMode.PAE and not self._load_pdptes(cr3):
            raise TripleFaultError("no PAE root to begin with")

    @property
    def mode(self) -> m.GuestMode:
        if not self.cr0 & PG:
            return m.GuestMode.NONPAGING
        if self.efer & LME:
            return m.GuestMode.PAGING64
        return m.GuestMode.PAE if self.cr4 & PAE else m.GuestMode.PAGING32

    # --- registers -----------------------------------------------------------------------------------------------

    def write(self, register: m.ControlRegister, value: int) -> bool:
        """Writes the register; False (and nothing changed) if that is refused with #GP."""
        old = self.mode
        paging = old is not m.GuestMode.NONPAGING
        legacy_pae = False
        match register:
            case m.ControlRegister.CR0:
                if (value & PG and not value & PE) or (value & NW and not value & CD):
                    return False
                if value & PG and not paging:
                    if self.efer & LME and not self.cr4 & PAE:
                        return False
                    legacy_pae = not self.efer & LME and bool(self.cr4 & PAE)
                if legacy_pae and not self._load_pdptes(self.cr3):
                    return False
                self.cr0 = value
            case m.ControlRegister.CR3:
                if value >> PHYSICAL_BITS or (old is m.GuestMode.PAE and not self._load_pdptes(value)):
                    return False
                self.cr3 = value
            case m.ControlRegister.CR4:
                if old is m.GuestMode.PAGING64 and not value & PAE:
                    return False
                legacy_pae = paging and old is not m.GuestMode.PAGING64 and bool(value & PAE)
                if legacy_pae and not self._load_pdptes(self.cr3):
                    return False
                self.cr4 = value
            case m.ControlRegister.EFER:
                if paging and (value ^ self.efer) & LME:
                    return False
                self.efer = value
        if self.cr0 & PG and self.cr3 >> 12 >= self.memory.pages:
            raise TripleFaultError(f"CR3 {self.cr3:#x}")
        return True

    def _load_pdptes(self, cr3: int) -> bool:
        base = cr3 & 0xFFFF_FFE0
        if base >> 12 >= self.memory.pages:
            raise TripleFaultError(f"PAE root {cr3:#x}")
        pdptes = [self.memory.load(base + 8 * n, 8) for n in range(4)]
        if any(pdpte & PRESENT and pdpte & PDPTE_RESERVED for pdpte in pdptes):
            return False
        if any(pdpte & PRESENT and pdpte >> 12 >= self.memory.pages for pdpte in pdptes):
            raise TripleFaultError(f"PDPTEs {pdptes}")
        self.pdptes = pdptes
        return True

    def _check_pdptes(self) -> None:
        """KVM reads PDPTEs from memory again: no present one may be there that the processor has not loaded."""
        base = self.cr3 & 0xFFFF_FFE0
        there = [self.memory.load(base + 8 * n, 8) for n in range(4)]
        for loaded, pdpte in zip(self.pdptes, there, strict=True):
            assert pdpte == loaded or not pdpte & PRESENT, f"PDPTE {pdpte:#x} appeared without a load of CR3"

    # --- the walk ------------------------------------------------------------------------------------------------

    def walk(self, gva: int, flags: int) -> Translation | WalkFault:
        """Translates `gva` for an access of type `flags`; sets A and D if it succeeds."""
        mode = self.mode
        if mode is m.GuestMode.PAE:
            self._check_pdptes()
        if mode is m.GuestMode.NONPAGING:
            rights = AccessFlag.MAY_WRITE | AccessFlag.MAY_USER | AccessFlag.MAY_FETCH | AccessFlag.DIRTY
            return Translation(gva >> 12, 1, int(rights))
        used, fault = self._descend(mode, gva)
        user, write = flags & AccessFlag.USER, flags & AccessFlag.WRITE
        nx_on = bool(self.efer & NX) and mode is not m.GuestMode.PAGING32
        fetch = flags & AccessFlag.FETCH and nx_on
        code = (2 if write else 0) | (4 if user else 0) | (16 if fetch else 0)
        if fault is not None:
            return WalkFault(code | fault)
        writable = all(value & WRITABLE for _, _, value, _ in used)
        for_user = all(value & USER for _, _, value, _ in used)
        executable = not (nx_on and any(value & XD for _, _, value, _ in used))
        may_write = writable or (not user and not self.cr0 & WP)
        if (write and not may_write) or (user and not for_user) or (fetch and not executable):
            return WalkFault(code | 1)
        for gpa, size, value, _ in used:
            leaf = gpa == used[-1][0]
            self.memory.store(gpa, size, value | ACCESSED | (DIRTY if write and leaf else 0))
        _, size, value, shift = used[-1]
        rights = AccessFlag(0)
        rights |= AccessFlag.MAY_WRITE if writable else 0
        rights |= AccessFlag.MAY_USER if for_user else 0
        rights |= AccessFlag.MAY_FETCH if executable else 0
        rights |= AccessFlag.DIRTY if write or value & DIRTY else 0
        if shift == 12:
            return Translation((value & ~ABOVE & ~XD & ((1 << 52) - 1)) >> 12, 1, int(rights))
        base = (value & ((1 << 52) - 1)) >> shift << shift
        if size == 4:
            base = (value & 0xFFC0_0000) | (value >> 13 & 0xF) << 32
        # As a 2 MiB piece, which is what the processor's TLB holds.
        piece = base + (gva & ((1 << shift) - 1) & ~0x1F_FFFF)
        return Translation(piece >> 12, 2, int(rights | AccessFlag.LARGE))

    def _descend(self, mode: m.GuestMode, gva: int) -> tuple[list[tuple[int, int, int, int]], int | None]:
        """(gpa, size, value, shift) of each entry down to the leaf; and an error code's P and RSVD bits if none."""
        size, mask = (4, 1023) if mode is m.GuestMode.PAGING32 else (8, 511)
        shifts: tuple[int, ...] = (22, 12) if mode is m.GuestMode.PAGING32 else (21, 12)
        table = self.cr3 & 0xFF_FFFF_F000
        if mode is m.GuestMode.PAGING64:
            shifts = (39, 30, 21, 12)
        elif mode is m.GuestMode.PAE:
            pdpte = self.pdptes[gva >> 30 & 3]
            if not pdpte & PRESENT:
                return [], 0
            table = pdpte & 0xFF_FFFF_F000
        used: list[tuple[int, int, int, int]] = []
        for shift in shifts:
            gpa = table + size * (gva >> shift & mask)
            self.tables.add((table >> 12, mode, shift))
            value = 0 if gpa >> 12 >= self.memory.pages else self.memory.load(gpa, size)
            if not value & PRESENT:
                return used, 0
            large = bool(value & LARGE) and (shift == 21 or (shift == 22 and bool(self.cr4 & PSE)))
            if self._reserved(mode, shift, value, large):
                return used, 1 | 8
            used.append((gpa, size, value, shift))
            if shift == 12 or large:
                return used, None
            table = value & (0xFFFF_F000 if size == 4 else (1 << 52) - (1 << 12))
        raise AssertionError("a walk ends with a leaf")

    def _reserved(self, mode: m.GuestMode, shift: int, value: int, large: bool) -> bool:
        if mode is m.GuestMode.PAGING32:
            return large and bool(value & 0x3E_0000)
        reserved = ABOVE | (0 if self.efer & NX else XD)
        if mode is m.GuestMode.PAE:
            reserved |= 0x7FF << 52
        if shift in (39, 30):
            reserved |= LARGE  # no pages of 1 GiB
        if large:
            reserved |= 0xFF << 13
        return bool(value & reserved)


class ModesMachine(IdealMachine):
    """The ideal machine with a `Processor` for each vCPU."""

    def __init__(
        self, config: m.RunConfig, vcpus: int, watch: Callable[[int, m.LoggedAccess], None] | None = None
    ) -> None:
        super().__init__(config, vcpus, watch=watch)
        memory = Memory(config.memory_pages, self.load, self.store)
        self.modes: set[m.GuestMode] = set()
        self.faults: set[tuple[m.GuestMode, int]] = set()
        """In which mode the guest got a page fault with which error code."""
        self.processors = [
            Processor(memory, r.cr0, r.cr3, r.cr4, r.efer) for r in boot_image(config, vcpus).registers
        ]

    def program(self, vcpu: int) -> ModesProgram:
        program = self.programs[vcpu]
        assert isinstance(program, ModesProgram)
        return program

    def counters(self) -> dict[str, int]:
        """The programs' counters, summed."""
        total: dict[str, int] = {}
        for program in self.programs:
            for name, count in program.counters().items():
                total[name] = total.get(name, 0) + count
        return total

    def describe(self) -> str:
        return "; ".join(
            f"{n}: {v.core.instructions} waiting={v.core.waiting} {self.processors[n].mode}"
            f" top={self.program(n).stack[-2:]}"
            for n, v in enumerate(self.vcpus)
        )

    def walk(self, vcpu: Vcpu, gva: int, flags: int) -> Translation | WalkFault:
        processor = self.processors[vcpu.core.vcpu]
        self.modes.add(processor.mode)
        return processor.walk(gva, flags)

    def serve_walk(self, vcpu: Vcpu, walk: m.Walk) -> None:
        result = self.walk(vcpu, walk.gva, walk.flags)
        if isinstance(result, WalkFault):
            self.reply(vcpu, m.WalkFault(vcpu.entry, walk.walk, result.error_code))
            return
        # Writes that CR0.WP permits against the entry are executed by the service: the TLB knows only entries' rights.
        writes_anyway = walk.flags & WRITE_FLAG and not result.flags & AccessFlag.MAY_WRITE
        if (
            result.pfn >= self.config.memory_pages
            or writes_anyway
            or self.random.random() < self.emulate_rate
        ):
            self.reply(vcpu, m.WalkFault(vcpu.entry, walk.walk, 1))
        else:
            self.reply(vcpu, m.Walked(vcpu.entry, walk.walk, result.pfn, result.level, result.flags))

    def page_fault(self, number: int, vcpu: Vcpu, reason: m.PageFaultExit) -> None:
        result = self.walk(vcpu, reason.gva, reason.instruction.flags)
        if isinstance(result, WalkFault):
            self.faults.add((self.processors[number].mode, result.error_code))
        super().page_fault(number, vcpu, reason)

    def exit(self, number: int, vcpu: Vcpu, reason: m.ExitReason) -> None:
        if isinstance(reason, m.RegisterWriteExit):
            refused = not self.processors[number].write(reason.register, reason.value)
            self.counts["refused"] += refused
            vcpu.cr0 = WP  # the walk knows about WP
            self.enter(vcpu, flush=True, general_protection=refused)
        else:
            super().exit(number, vcpu, reason)
