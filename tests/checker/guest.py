"""A small 64-bit guest as an event stream: tables in memory, vCPUs that run on them, accesses by guest frame."""

from __future__ import annotations

from shadowmmu.protocol.events import (
    Accesses,
    DeviceStored,
    Entered,
    Event,
    Exited,
    Injected,
    PagingRegisters,
    SlotsPublished,
)

P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63
PAGE = P | W | U | A | D
TABLE = P | W | U | A
READ, WRITE, FETCH, USER = 0, 1, 2, 4

ROOT, L3, L2, L1 = 0x10, 0x11, 0x12, 0x13
OTHER_ROOT, OTHER_L1 = 0x20, 0x21
FRAMES = 1 << 12

CR0, CR4, EFER = 0x8001_0001, 0xA0, 0xD00  # PG WP PE; PAE PGE; LMA LME NXE


def entry(gfn: int, flags: int = PAGE) -> int:
    return gfn << 12 | flags


def word(table: int, index: int) -> int:
    """The address of an entry."""
    return table << 12 | index << 3


def gva(index: int, offset: int = 0, directory: int = 0) -> int:
    """The address of page `index` of the first table of a directory entry."""
    return directory << 21 | index << 12 | offset


class Guest:
    """Collects events. vCPUs run on ROOT -> L3 -> L2 -> L1; pages of L1 are mapped by `map`."""

    def __init__(self, vcpus: int = 1) -> None:
        self.events: list[Event] = [SlotsPublished([(0, 0, FRAMES, False)])]
        self.device(
            (word(ROOT, 0), entry(L3, TABLE)),
            (word(L3, 0), entry(L2, TABLE)),
            (word(L2, 0), entry(L1, TABLE)),
        )
        self.entries = [0] * vcpus
        for vcpu in range(vcpus):
            self.registers(vcpu, "")
            self.enter(vcpu)

    def add(self, *events: Event) -> Guest:
        self.events += events
        return self

    def device(self, *words: tuple[int, int]) -> Guest:
        return self.add(DeviceStored(list(words)))

    def registers(  # noqa: PLR0917 - the registers
        self,
        vcpu: int = 0,
        register: str = "cr3",
        cr0: int = CR0,
        cr3: int = ROOT << 12,
        cr4: int = CR4,
        efer: int = EFER,
        pdptes: tuple[int, int, int, int] = (0, 0, 0, 0),
        tdp: bool = False,
    ) -> Guest:
        return self.add(PagingRegisters(vcpu, register, cr0, cr3, cr4, efer, list(pdptes), 36, tdp))

    def enter(self, vcpu: int = 0) -> Guest:
        self.entries[vcpu] += 1
        return self.add(Entered(vcpu, self.entries[vcpu], False, 1))

    def exit(
        self, vcpu: int = 0, reason: str = "page_fault", address: int = -1, error_code: int = 0
    ) -> Guest:
        return self.add(Exited(vcpu, self.entries[vcpu], reason, address, error_code))

    def write_cr3(self, vcpu: int = 0, cr3: int = ROOT << 12, cr4: int = CR4) -> Guest:
        return self.exit(vcpu, "register_write").registers(vcpu, "cr3", cr3=cr3, cr4=cr4).enter(vcpu)

    def toggle_pge(self, vcpu: int = 0) -> Guest:
        self.exit(vcpu, "register_write").registers(vcpu, "cr4", cr4=CR4 & ~0x80).enter(vcpu)
        return self.exit(vcpu, "register_write").registers(vcpu, "cr4").enter(vcpu)

    def invlpg(self, address: int, vcpu: int = 0) -> Guest:
        return self.exit(vcpu, "invlpg", address).enter(vcpu)

    def fault(self, address: int, error_code: int, vcpu: int = 0) -> Guest:
        """A page fault that the guest takes by way of KVM."""
        self.exit(vcpu, "page_fault", address, error_code)
        return self.add(Injected(vcpu, error_code, address)).enter(vcpu)

    def access(
        self, address: int, gfn: int, kind: int = USER, value: int = 0, *, vcpu: int = 0, size: int = 8
    ) -> Guest:
        item = (kind, address, gfn, gfn + 0x100000, size, value)
        return self.add(Accesses(vcpu, self.entries[vcpu], [item]))

    def store(self, gpa: int, value: int, vcpu: int = 0, size: int = 8) -> Guest:
        """A store of which only the place matters, through a mapping of all memory (see `direct`)."""
        item = (WRITE, DIRECT | gpa, gpa >> 12, (gpa >> 12) + 0x100000, size, value)
        return self.add(Accesses(vcpu, self.entries[vcpu], [item]))


DIRECT = 1 << 39
"""Where the guest's kernel has all of memory mapped, by large pages, once `direct` was called."""


def direct(guest: Guest) -> Guest:
    """Map all of memory at DIRECT: root entry 1, one level-3 table, one level-2 table of large pages."""
    upper, lower = 0x30, 0x31
    words = [(word(ROOT, 1), entry(upper, TABLE)), (word(OTHER_ROOT, 1), entry(upper, TABLE))]
    words.append((word(upper, 0), entry(lower, TABLE)))
    words += [(word(lower, n), entry(n * 512, P | W | A | D | PS | G)) for n in range(FRAMES // 512)]
    return guest.device(*words)
