"""Writing control registers: other address spaces, other paging modes, and what the processor must refuse.

Each function returns instructions for the registers as they are now. The order of a switch is the architecture's:
paging off, then CR4 and EFER, then CR3, then paging on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.modes.compute import compute, large_page, touch
from shadowmmu.cpu.guest.modes.edits import reload_cr3
from shadowmmu.cpu.guest.modes.formats import MODES, registers_for
from shadowmmu.cpu.guest.modes.layout import MALFORMED_PDPT, PDPT_OFFSET
from shadowmmu.cpu.guest.steps import USER_READ, USER_WRITE
from shadowmmu.cpu.program import Invlpg, Op, WriteRegister
from shadowmmu.protocol.messages import ControlRegister, GuestMode

if TYPE_CHECKING:
    from shadowmmu.cpu.guest.modes.program import ModesProgram

__all__ = ["be_refused", "change_space", "invalidate_anything", "switch_mode", "toggle"]

CR0, CR3, CR4, EFER = ControlRegister.CR0, ControlRegister.CR3, ControlRegister.CR4, ControlRegister.EFER


def _root(program: ModesProgram, mode: GuestMode) -> int:
    """CR3 for `mode`: of an own address space mostly, sometimes of any vCPU's first one."""
    prng = program.prng
    if prng.chance(4):
        return program.layout.cr3(prng.below(program.vcpus), mode, 0)
    return program.layout.cr3(program.vcpu, mode, prng.below(2))


def change_space(program: ModesProgram) -> list[Op]:
    """MOV CR3 of the same or another value."""
    if program.prng.chance(4):
        return [reload_cr3(program)]
    return [WriteRegister(CR3, _root(program, program.mode))]


def switch_mode(program: ModesProgram) -> list[Op]:
    """Into another mode, if the run is mixed; else paging off and on, where there is any, with some work in between."""
    prng, old = program.prng, program.registers
    if program.mixed:
        if program.mode in (GuestMode.PAE, GuestMode.PAGING32) and prng.chance(3):
            return _exchange_pae(program)
        mode = prng.choice([mode for mode in MODES if mode is not program.mode])
    elif program.first_mode is GuestMode.NONPAGING or not prng.chance(3):
        return []
    else:
        mode = program.first_mode
    new = registers_for(mode, _root(program, mode), old)
    ops: list[Op] = []
    if program.mode is not GuestMode.NONPAGING:
        ops.append(WriteRegister(CR0, old.cr0 & ~x86.X86_CR0_PG))
    if mode is program.mode:
        frames = prng.sample(program.tables.data, 6)
        ops.append(touch(program, [(frame << x86.PAGE_SHIFT, USER_READ, USER_WRITE) for frame in frames], 32))
    ops.append(WriteRegister(CR4, new.cr4))
    ops.append(WriteRegister(EFER, new.efer))
    ops.append(WriteRegister(CR3, new.cr3))
    if mode is not GuestMode.NONPAGING:
        ops.append(WriteRegister(CR0, new.cr0))
    return ops


def _exchange_pae(program: ModesProgram) -> list[Op]:
    """From 32-bit paging to PAE or back with paging on: the page in CR3 begins a directory and holds a PAE root."""
    cr3, cr4 = program.registers.cr3, program.registers.cr4
    ops: list[Op] = []
    if cr3 & x86.PAGE_OFFSET_MASK != PDPT_OFFSET:
        ops.append(WriteRegister(CR3, program.layout.cr3(program.vcpu, program.mode, 0)))
    return [*ops, WriteRegister(CR4, (cr4 ^ x86.X86_CR4_PAE) | x86.X86_CR4_PSE)]


def toggle(program: ModesProgram) -> list[Op]:
    """A bit that changes what entries mean, for the time of a computation or for good."""
    prng, old = program.prng, program.registers
    paging = program.mode is not GuestMode.NONPAGING
    match prng.below(4):
        case 0:
            ops: list[Op] = [WriteRegister(CR0, old.cr0 ^ x86.X86_CR0_WP), *compute(program)]
            return ops if prng.chance(3) else [*ops, WriteRegister(CR0, old.cr0)]
        case 1:
            return [WriteRegister(CR4, old.cr4 ^ x86.X86_CR4_PGE)]
        case 2:
            ops = [WriteRegister(EFER, old.efer ^ x86.EFER_NX), *compute(program)]
            return ops if prng.chance(4) else [*ops, WriteRegister(EFER, old.efer)]
        case _ if program.mode is GuestMode.PAGING32:
            return [
                WriteRegister(CR4, old.cr4 ^ x86.X86_CR4_PSE),
                touch(program, [(large_page(program), USER_READ, USER_WRITE)], 12),
                WriteRegister(CR4, old.cr4),
            ]
        case _:
            return [WriteRegister(CR4, old.cr4 ^ x86.X86_CR4_PSE)] if paging else []


def invalidate_anything(program: ModesProgram) -> list[Op]:
    """INVLPG of addresses that mean nothing in particular."""
    prng = program.prng
    return [Invlpg(prng.bits()) for _ in range(1 + prng.below(3))]


def be_refused(program: ModesProgram) -> list[Op]:
    """A register write that the architecture refuses in this mode."""
    old = program.registers
    values = [
        (CR0, old.cr0 & ~x86.X86_CR0_PE | x86.X86_CR0_PG),
        (CR0, old.cr0 & ~x86.X86_CR0_CD | x86.X86_CR0_NW),
    ]
    if program.mode is GuestMode.PAGING64:
        values += [(CR3, old.cr3 | 1 << 50), (CR4, old.cr4 & ~x86.X86_CR4_PAE)]
    if program.mode is GuestMode.PAE:
        values.append((CR3, program.layout.cr3(program.vcpu, GuestMode.PAE, 1) + MALFORMED_PDPT))
    if program.mode is not GuestMode.NONPAGING:
        values.append((EFER, old.efer ^ x86.EFER_LME))
    register, value = program.prng.choice(values)
    program.daring = True
    return [WriteRegister(register, value)]
