"""A machine for the stateful tests: guests in any paging mode on one memory, and the checks of what they are given.

`ShadowedGuest` does one operation at a time, with nobody else about, and compares how each access ends with the guest's
own tables (`guest_tables`). The rules that call it, and what exactly is claimed, are in `test_stateful`.

Guest frames: 4 to 6 hold a window that maps frames 0 to 63 for the guest's own stores to its tables, 15 the PDPTEs, 16
to 25 and 32 to 35 the tables by level, 28 to 31 and 1024 to 1027 data; 512 to 1023 are a hole. The same tables make sense in every
mode: an 8-byte entry is a 4-byte one followed by one that is not present.
"""

from __future__ import annotations

import msgspec

from shadowmmu.conform.hardware import Fault, Misconfiguration, Translation, hardware_walk
from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PSE,
)
from shadowmmu.kvm import (
    EntryStatus,
    FaultOutcome,
    Instruction,
    InstructionKind,
    Kvm,
    KvmConfig,
    Outcome,
    ShadowPage,
    Vcpu,
    VcpuMode,
    handle_ept_misconfig,
    kvm_mmu_page_fault,
    set_regs,
    shadow_walk_init,
    vcpu_enter_guest,
)
from shadowmmu.protocol.events import EmulatedStore, Event, GpteUpdate
from tests.kvm.guest_tables import (
    FAULT_FETCH,
    FAULT_PRESENT,
    GuestEntry,
    GuestFault,
    GuestPath,
    PagingMode,
    Read,
    Registers,
    allows,
    find_path,
    walk,
)
from tests.kvm.kit import EXECUTE, PAGE, READ, TABLE, WRITE, A, D, drive

ROOTS = {PagingMode.LONG: (16, 17), PagingMode.TWO_LEVEL: (18, 19)}
PDPT = 15
WINDOW = (4, 5, 6)
WINDOW_ENTRY = {PagingMode.LONG: 2, PagingMode.PAE: 2, PagingMode.TWO_LEVEL: 128}  # index of an 8-byte entry
LEVELS = {16: 4, 17: 4, 18: 3, 19: 3, 20: 2, 21: 2} | dict.fromkeys((22, 23, 24, 25, 32, 33, 34, 35), 1)
TABLES = tuple(LEVELS)
DATA = (28, 29, 30, 31, 1024, 1025, 1026, 1027)
HOLE = 600
ENTRIES = 4
MAX_ATTEMPTS = 9


class Place(msgspec.Struct, frozen=True):
    """Where an access goes: indices into the tables, one per level, or with paging off a frame; and the offset."""

    i4: int
    i3: int
    i2: int
    i1: int
    frame: int
    offset: int


class Words:
    """Every value that each aligned 8-byte word of guest memory has had, with the time (a count of stores)."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._values: dict[int, list[tuple[int, int]]] = {}
        self.now = 0

    def on_event(self, event: Event) -> None:
        """The model has stored something."""
        if isinstance(event, GpteUpdate | EmulatedStore):
            self._note(event.gpa, event.size)

    def store(self, gpa: int, size: int, value: int) -> None:
        """A store that KVM does not see."""
        self._kvm.memory.write(gpa, size, value)
        self._note(gpa, size)

    def _note(self, gpa: int, size: int) -> None:
        self.now += 1
        for word in range(gpa & ~7, gpa + size, 8):
            self._values.setdefault(word, [(0, 0)]).append((self.now, self._kvm.memory.read(word, 8)))

    def read(self, gpa: int, size: int) -> int | None:
        """What is there now; None outside of memory."""
        return None if self._kvm.gfn_to_memslot(gpa >> 12) is None else self._kvm.memory.read(gpa, size)

    def since(self, time: int, gpa: int, size: int) -> set[int]:
        """The values of an aligned entry from `time` on."""
        values = set()
        last = 0
        for at, value in self._values.get(gpa & ~7, [(0, 0)]):
            part = value >> 8 * (gpa & 7) & (1 << 8 * size) - 1
            if at <= time:
                last = part
            else:
                values.add(part)
        return values | {last}


class ShadowedGuest:
    """A machine of some vCPUs. `inherits_rights`: entries above the last may lack rights, see `test_stateful`."""

    def __init__(self, config: KvmConfig, vcpus: int, pse: bool, inherits_rights: bool) -> None:
        self.kvm = kvm = Kvm(config)
        self.words = Words(kvm)
        kvm.trace = self.words.on_event
        self.pse = pse
        self.inherits_rights = inherits_rights
        self.vcpus = [kvm.create_vcpu() for _ in range(vcpus)]
        self._flushed = [0] * vcpus  # when it last invalidated everything
        self._flushed_page: dict[tuple[int, int], int] = {}
        self._mmio: list[tuple[int, int, int]] = [(0, 0, 0)] * vcpus  # its MMIO cache, and since when

    # Setting up

    def build_tables(self, two_level: bool) -> None:
        """The window, the PDPTEs, and tables that lead to all of the data frames. `two_level` guests have only 18 on."""
        self.words.store(PDPT << 12, 8, 20 << 12 | PT_PRESENT_MASK)
        self.words.store((PDPT << 12) + 8, 8, 21 << 12 | PT_PRESENT_MASK)
        self.words.store((PDPT << 12) + 16, 8, WINDOW[1] << 12 | PT_PRESENT_MASK)
        for root in (16, 17):
            self.words.store((root << 12) + 16, 8, WINDOW[0] << 12 | TABLE)
        for directory in (18, 19) if two_level else ():
            self.words.store((directory << 12) + 8 * 128, 8, WINDOW[2] << 12 | TABLE)
        self.words.store(WINDOW[0] << 12, 8, WINDOW[1] << 12 | TABLE)
        self.words.store(WINDOW[1] << 12, 8, WINDOW[2] << 12 | TABLE)
        for frame in range(64):
            self.words.store((WINDOW[2] << 12) + 8 * frame, 8, frame << 12 | PAGE)
        for table, level in LEVELS.items():
            below = [t for t in TABLES if LEVELS[t] == level - 1] or list(DATA)
            for index in range(ENTRIES):
                if level == 4 and index == WINDOW_ENTRY[PagingMode.LONG]:
                    continue
                entry = below[(ENTRIES * table + index) % len(below)] << 12 | PAGE
                for half in (0, 2048) if two_level else (0,):
                    self.words.store((table << 12) + half + 8 * index, 8, entry)

    def set_mode(
        self, vcpu: Vcpu, mode: PagingMode, write_protect: bool, no_execute: bool, root: int
    ) -> None:
        """All control registers at once."""
        cr0 = (
            X86_CR0_PE
            | (X86_CR0_WP if write_protect else 0)
            | (X86_CR0_PG if mode is not PagingMode.OFF else 0)
        )
        cr4 = X86_CR4_PAE if mode in (PagingMode.LONG, PagingMode.PAE) else 0
        cr4 |= X86_CR4_PSE if self.pse else 0
        efer = EFER_LME | EFER_LMA if mode is PagingMode.LONG else 0
        efer |= EFER_NX if no_execute else 0
        drive(set_regs(vcpu, cr0, self.root(mode, root), cr4, efer))
        self.flushed(vcpu)

    def root(self, mode: PagingMode, root: int) -> int:
        """A value for CR3."""
        return (ROOTS[mode][root] if mode in ROOTS else PDPT) << 12

    def registers(self, vcpu: Vcpu) -> Registers:
        """What the guest's paging depends on. With two-dimensional paging addresses are guest physical."""
        cr0 = vcpu.cr0 if self.kvm.config.tdp is None else 0
        return Registers(cr0, vcpu.cr3, vcpu.cr4, vcpu.efer, self.kvm.config.guest_maxphyaddr)

    def mode(self, vcpu: Vcpu) -> PagingMode:
        return self.registers(vcpu).mode

    # Addresses

    def address(self, vcpu: Vcpu, place: Place) -> int:
        """The place as an address in the vCPU's mode."""
        mode = self.mode(vcpu)
        if mode is PagingMode.OFF:
            return place.frame << 12 | place.offset
        if mode is PagingMode.LONG:
            return place.i4 << 39 | place.i3 << 30 | place.i2 << 21 | place.i1 << 12 | place.offset
        if mode is PagingMode.PAE:
            return (place.i3 | place.i4 << 1 & 2) << 30 | place.i2 << 21 | place.i1 << 12 | place.offset
        # i4 and i3 choose the half of the table, so that all quadrants are used
        return (place.i4 << 9 | place.i2 << 1) << 22 | (place.i3 << 9 | place.i1 << 1) << 12 | place.offset

    def entry_gpa(self, vcpu: Vcpu, table: int, index: int, half: int) -> int:
        """Where a table's entry is. `half` is the upper half of a two-level guest's table."""
        upper = 2048 if half and self.mode(vcpu) is PagingMode.TWO_LEVEL else 0
        return (table << 12) + upper + 8 * index

    def window(self, vcpu: Vcpu, gpa: int) -> int:
        """The address at which the guest has mapped its own frames 0 to 63."""
        mode = self.mode(vcpu)
        if mode is PagingMode.OFF:
            return gpa
        if mode is PagingMode.LONG:
            return WINDOW_ENTRY[mode] << 39 | gpa
        if mode is PagingMode.PAE:
            return WINDOW_ENTRY[mode] << 30 | gpa
        return 2 * WINDOW_ENTRY[mode] << 22 | gpa >> 12 << 13 | gpa & 0xFFF

    def last_entry(self, vcpu: Vcpu, address: int) -> GuestEntry | None:
        """The guest's entry that maps an address; None if none does."""
        path = find_path(self.words.read, self.registers(vcpu), address)
        return path.entries[-1] if isinstance(path, GuestPath) and path.entries else None

    def frame(self, vcpu: Vcpu, address: int) -> int | None:
        """The guest frame, of those with memory, that an address maps to; None if there is none."""
        path = find_path(self.words.read, self.registers(vcpu), address)
        if isinstance(path, GuestFault) or self.kvm.gfn_to_memslot(path.gfn) is None:
            return None
        return path.gfn

    # Time

    def flushed(self, vcpu: Vcpu) -> None:
        """The vCPU has invalidated all its translations."""
        self._flushed[vcpu.vcpu_id] = self.words.now

    def flushed_page(self, vcpu: Vcpu, address: int) -> None:
        """The vCPU has invalidated one page's."""
        self._flushed_page[vcpu.vcpu_id, address >> 12] = self.words.now

    def last_flush(self, vcpu: Vcpu, address: int) -> int:
        """When the vCPU last invalidated an address."""
        return max(self._flushed[vcpu.vcpu_id], self._flushed_page.get((vcpu.vcpu_id, address >> 12), 0))

    # Doing things

    def enter(self, vcpu: Vcpu) -> None:
        """One guest entry: all requests are served, a root is loaded."""
        assert drive(vcpu_enter_guest(vcpu)).status is EntryStatus.OK
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        assert not vcpu.requests

    def access(  # noqa: PLR0917 - what an access is
        self, vcpu: Vcpu, address: int, kind: InstructionKind, user: bool, size: int = 8, value: int = 0
    ) -> None:
        """An access of the guest, until it has happened or a fault is its own; checks how it ends."""
        instruction = Instruction(kind, address, size, value & (1 << 8 * size) - 1, user)
        for _ in range(MAX_ATTEMPTS):
            self.enter(vcpu)
            hit = hardware_walk(vcpu, address, kind, user)
            if isinstance(hit, Translation):
                self._check_translation(vcpu, address, kind, user, hit)
                if kind is WRITE:
                    self.words.store(hit.gfn << 12 | address & 0xFFF, size, instruction.value)
                return
            expected = walk(self.words.read, self.registers(vcpu), address, kind, user)
            if isinstance(hit, Misconfiguration):
                outcome = drive(handle_ept_misconfig(vcpu, address, instruction))
            elif self.kvm.bypass_guest_pf and not hit.error_code & FAULT_PRESENT:
                # The host's NX is on: it reports fetches, though the guest may have NX off.
                code = hit.error_code & ~FAULT_FETCH
                assert isinstance(expected, GuestFault), f"{address:#x} faults without an exit, but is mapped"
                assert code == expected.error_code & ~FAULT_FETCH
                return
            else:
                outcome = drive(kvm_mmu_page_fault(vcpu, address, hit.error_code, instruction))
            self._note_mmio_cache(vcpu)
            if outcome.outcome is not Outcome.RETRY:
                self._check_outcome(vcpu, instruction, expected, outcome)
                return
        raise AssertionError(f"the access to {address:#x} makes no progress")

    def _note_mmio_cache(self, vcpu: Vcpu) -> None:
        gva, gfn, _ = self._mmio[vcpu.vcpu_id]
        if (vcpu.mmio_gva, vcpu.mmio_gfn) != (gva, gfn):
            self._mmio[vcpu.vcpu_id] = (vcpu.mmio_gva, vcpu.mmio_gfn, self.words.now)

    # Checks

    def _check_outcome(
        self, vcpu: Vcpu, instruction: Instruction, expected: GuestPath | GuestFault, outcome: FaultOutcome
    ) -> None:
        """`expected` is what the guest's tables said when the access was tried."""
        what = outcome.outcome
        assert what in (Outcome.INJECT, Outcome.EMULATED, Outcome.MMIO), outcome
        if what is Outcome.INJECT:
            assert isinstance(expected, GuestFault), f"{outcome} is not the guest's fault"
            assert outcome.inject == (expected.error_code, instruction.gva)
            if self.kvm.profile.pf_injection_no_sync:  # bug A6 without it
                self.flushed_page(vcpu, instruction.gva)
            return
        has_memory = self.kvm.gfn_to_memslot(outcome.gpa >> 12) is not None
        assert has_memory is (what is Outcome.EMULATED)
        now = isinstance(expected, GuestPath) and outcome.gpa == (
            expected.gfn << 12 | instruction.gva & 0xFFF
        )
        gva, gfn, since = self._mmio[vcpu.vcpu_id]
        if not now and what is Outcome.MMIO and (gva, gfn) == (instruction.gva & ~0xFFF, outcome.gpa >> 12):
            # By the MMIO cache, which may be as old as a TLB entry.
            assert since >= self.last_flush(vcpu, instruction.gva), (
                "the MMIO cache has survived an invalidation"
            )
            return
        assert now, f"{outcome}, but the guest's tables give {expected}"
        if what is Outcome.EMULATED and instruction.kind is not EXECUTE:
            held = self.words.read(outcome.gpa, instruction.size)
            assert held == (instruction.value if instruction.kind is WRITE else outcome.value)

    def check_all(self, vcpu: Vcpu, places: list[Place]) -> None:
        """Everything that the shadow translates at these places, as it is."""
        self.enter(vcpu)
        for place in places:
            address = self.address(vcpu, place)
            for kind in (READ, WRITE, EXECUTE):
                for user in (False, True):
                    hit = hardware_walk(vcpu, address, kind, user)
                    if isinstance(hit, Translation):
                        self._check_translation(vcpu, address, kind, user, hit)
                    elif (
                        isinstance(hit, Fault)
                        and self.kvm.bypass_guest_pf
                        and not hit.error_code & FAULT_PRESENT
                    ):
                        fault = find_path(self.words.read, self.registers(vcpu), address)
                        assert fault == GuestFault(0), f"{address:#x} faults without an exit, but is {fault}"

    def _check_translation(
        self, vcpu: Vcpu, address: int, kind: InstructionKind, user: bool, hit: Translation
    ) -> None:
        """The processor has used a shadow entry: it must be what the guest's tables and the host's give."""
        where = f"vCPU {vcpu.vcpu_id}: {kind.name} of {address:#x}, user={user}: {hit}"
        self._check_host(hit, kind, where)
        sp, index = self._leaf(vcpu, address)
        problem = self._differs(vcpu, self.words.read, address, kind, user, hit, sp)
        if problem and sp.unsync:
            size = 4 if self.mode(vcpu) is PagingMode.TWO_LEVEL else 8
            gpa = (sp.gfn << 12) + 2048 * sp.quadrant * (size == 4) + size * index
            values = self.words.since(self.last_flush(vcpu, address), gpa, size)
            for value in values:

                def read(at: int, nbytes: int, value: int = value) -> int | None:
                    return value if at == gpa else self.words.read(at, nbytes)

                if not self._differs(vcpu, read, address, kind, user, hit, sp):
                    return
            raise AssertionError(f"{where}: nor did the entry at {gpa:#x} since the last flush: {problem}")
        assert not problem, f"{where}: {problem}"
        self._check_dirty_log(vcpu, address, kind, user, hit, where)

    def _differs(  # noqa: PLR0917 - what an access is
        self,
        vcpu: Vcpu,
        read: Read,
        address: int,
        kind: InstructionKind,
        user: bool,
        hit: Translation,
        sp: ShadowPage,
    ) -> str | None:
        """How what the shadow gives goes beyond what the guest's tables give; None if it does not."""
        registers = self.registers(vcpu)
        path = find_path(read, registers, address)
        if isinstance(path, GuestFault):
            return "the guest's tables do not map it"
        if path.gfn != hit.gfn:
            return f"the guest's tables map frame {path.gfn}"
        profile = self.kvm.profile
        entries = path.entries
        if self.inherits_rights and not profile.inherited_perms:  # bug A3
            entries = entries[-1:]
        if not allows(registers, entries, kind, user):
            return "the guest's tables do not allow it"
        if not all(entry.value & A for entry in path.entries):
            return "the guest does not see that it was accessed"
        wp0_direct = not profile.wp0_dirty_missed and sp.direct and not registers.cr0 >> 16 & 1  # bug A15
        if kind is WRITE and path.entries and not path.entries[-1].value & D and not wp0_direct:
            return "the guest does not see that it was written"
        return None

    def _check_host(self, hit: Translation, kind: InstructionKind, where: str) -> None:
        kvm = self.kvm
        assert kvm.gfn_to_memslot(hit.gfn) is not None, f"{where}: there is no memory"
        assert kvm.host.is_present(hit.gfn), f"{where}: the host has taken the frame away"
        assert hit.pfn == kvm.host.pfn(hit.gfn), (
            f"{where}: the frame is in host frame {kvm.host.pfn(hit.gfn)}"
        )
        if kind is WRITE:
            assert kvm.host.is_writable(hit.gfn), f"{where}: the host's frame is read-only"
            shadows = kvm.mmu_page_hash.get(hit.gfn, ())
            assert all(sp.direct or sp.invalid or sp.unsync for sp in shadows), (
                f"{where}: that table is protected"
            )

    def _check_dirty_log(  # noqa: PLR0917 - what an access is
        self, vcpu: Vcpu, address: int, kind: InstructionKind, user: bool, hit: Translation, where: str
    ) -> None:
        slot = self.kvm.gfn_to_memslot(hit.gfn)
        if kind is not WRITE or slot is None or slot.dirty_bitmap is None:
            return
        path = find_path(self.words.read, self.registers(vcpu), address)
        if isinstance(path, GuestPath) and allows(
            msgspec.structs.replace(self.registers(vcpu), cr0=X86_CR0_PG | X86_CR0_WP),
            path.entries,
            kind,
            user,
        ):
            assert hit.gfn in slot.dirty_bitmap, f"{where}: the dirty log has lost it"

    def _leaf(self, vcpu: Vcpu, address: int) -> tuple[ShadowPage, int]:
        """The shadow page and index of the entry that maps an address."""
        sp, level = shadow_walk_init(vcpu, address)
        while sp is not None:
            index = address >> (12 + 9 * (level - 1)) & 511
            spte = sp.spt[index]
            if level == 1 or spte & PT_PAGE_SIZE_MASK:
                return sp, index
            sp, level = self.kvm.child(spte), level - 1
        raise AssertionError("not mapped")
