"""Random sequences of operations in every paging mode, each done alone, with checks after each.

After every step `mmu_audit` is clean. Of each access, and of everything that the shadow tables translate for a vCPU
that has just entered (all requests served), as the processor's walk of them shows:

- the frame is the one that the guest's own tables give, the access is one that they allow, and their A bits, and for a
  write the last entry's D bit, are set;
- under an *unsync* shadow page the last entry may be one that the guest's table held at some moment since that vCPU
  last invalidated the address (INVLPG of it, or any write of CR3 or of the mode); all other levels are as they are now;
- the host frame is the one that backs the guest frame now, present, for a write writable, no table in sync, and in the
  dirty log if there is one;
- a fault given to the guest, its error code and address, is what the guest's tables give at that moment; an emulated
  access goes where they say (MMIO: or where they said at some moment since the last invalidation);
- with bypass_guest_pf a fault without an exit is one for an entry that is not present in the guest's tables;
- every access ends after a few exits.

There is no TLB here and nothing runs at the same time. Of a profile without some fix less is claimed (BUGS.md):

- Rights lacking in entries above the last are compared only with the last entry's, in the machines that have such
  entries at all (A3, inherited-perms).
- With CR0.WP = 0, D is not asked of small pages that split a guest's large page (A15, wp0-dirty-missed).
- A fault given to the guest does not count as an invalidation of its address (A6, pf-injection-no-sync).

And of none:

- CR4.PSE does not change: it is in no shadow page's role, so pages made with and without it are shared.
- Devices store to no tables (A8, A9; and the guest's notrap entries would be wrong).

For a longer search: `run_state_machine_as_test(Long64, settings=settings(max_examples=1000, stateful_step_count=100))`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shadowmmu.cpu.x86 import EFER_NX, PT64_NX_MASK, PT_PAGE_SIZE_MASK, X86_CR0_PG, X86_CR0_WP
from shadowmmu.kvm import (
    Backing,
    KvmConfig,
    MemorySlot,
    Operation,
    Profile,
    Vcpu,
    emulator_write_phys,
    host,
    kvm_mmu_change_mmu_pages,
    kvm_mmu_invlpg,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_test_young,
    kvm_mmu_unprotect_page_virt,
    kvm_mmu_zap_all,
    kvm_pv_mmu_op_release_pt,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_vm_ioctl_get_dirty_log,
    mmu_audit,
    mmu_shrink,
    prefault,
    set_dirty_logging,
    set_efer,
)
from shadowmmu.protocol.messages import Tdp
from tests.kvm.guest_tables import PagingMode
from tests.kvm.kit import EXECUTE, PAGE, READ, TABLE, WRITE, A, D, P, U, W, drive
from tests.kvm.shadowed_guest import DATA, ENTRIES, HOLE, LEVELS, PDPT, TABLES, Place, ShadowedGuest

LONG, PAE, TWO_LEVEL, OFF = PagingMode.LONG, PagingMode.PAE, PagingMode.TWO_LEVEL, PagingMode.OFF

LEAF_BITS = (PAGE, PAGE, PAGE, TABLE, P | W | U, P | U | A, P | U | A | D, P | W | A | D, PAGE | PT64_NX_MASK)
RESERVED = 1 << 40
NOTHING = 0x3010_5070_1030_5070
"""Data that reads as entries that are not present, whatever part of it is looked at."""


class Entry(msgspec.Struct, frozen=True):
    """What a guest may put into a table; which frames suit depends on the table."""

    target: int
    bits: int
    special: str


PLACES = st.builds(
    Place,
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, ENTRIES - 1),
    st.integers(0, ENTRIES - 1),
    st.sampled_from((*TABLES, *DATA, HOLE, 1535, 2047)),
    st.sampled_from((0, 8, 16, 24, 6, 2048)),
)
SPECIALS = st.sampled_from(("", "", "", "", "", "absent", "absent", "large", "large", "reserved", "mmio"))
ENTRY = st.builds(Entry, st.integers(0, 15), st.sampled_from(LEAF_BITS), SPECIALS)
KIND = st.sampled_from((READ, WRITE, WRITE, EXECUTE))
SIZE = st.sampled_from((8, 8, 8, 4, 2, 1))
SIZES_OF_ENTRIES = st.sampled_from((8, 8, 4))
VCPU = st.integers(0, 1)
TABLE_FRAME = st.sampled_from(TABLES)
INDEX = st.integers(0, ENTRIES - 1)
FRAME = st.sampled_from((*TABLES, *DATA))
EVERYWHERE = [
    Place(i4, i3, i2, i1, frame, 0)
    for i4, i3, frame in ((0, 0, 16), (0, 1, 22), (1, 0, 28), (1, 1, 1024))
    for i2 in range(ENTRIES)
    for i1 in range(ENTRIES)
]


class ShadowPaging(RuleBasedStateMachine):
    """The rules. Subclasses say which guests there are."""

    modes: ClassVar[tuple[PagingMode, ...]] = (LONG,)
    profile = "fixed"
    vcpus = 2
    bypass_guest_pf = False
    inherits_rights = False  # upper entries may lack rights too (bug A3)
    tangled = False  # any table at any level, all with full rights
    tdp: Tdp | None = None

    # Setting up

    @initialize(
        backings=st.tuples(st.sampled_from(Backing), st.sampled_from(Backing)),
        limit=st.sampled_from((64, 1024)),
        pse=st.booleans(),
        modes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        write_protect=st.booleans(),
        no_execute=st.booleans(),
    )
    def boot(  # noqa: PLR0917 - the draws of one rule
        self,
        backings: tuple[Backing, Backing],
        limit: int,
        pse: bool,
        modes: tuple[int, int],
        write_protect: bool,
        no_execute: bool,
    ) -> None:
        backing = [Backing.HUGE_2M if b is Backing.HUGE_1G else b for b in backings]
        config = KvmConfig(
            memslots=(MemorySlot(0, 0, 512, backing[0]), MemorySlot(1, 1024, 1024, backing[1])),
            n_max_mmu_pages=limit,
            profile=Profile.parse(self.profile),
            bypass_guest_pf=self.bypass_guest_pf,
            tdp=self.tdp,
        )
        self.guest = ShadowedGuest(config, self.vcpus, pse, self.inherits_rights)
        self.guest.build_tables(TWO_LEVEL in self.modes)
        for vcpu, mode in zip(self.guest.vcpus, modes, strict=False):
            self.guest.set_mode(vcpu, self.modes[mode % len(self.modes)], write_protect, no_execute, 0)

    def vcpu(self, number: int) -> Vcpu:
        return self.guest.vcpus[number % self.vcpus]

    def value(self, table: int, entry: Entry) -> int:
        """The entry's value in that table."""
        level = LEVELS.get(table, 1)
        if entry.special == "absent":
            return NOTHING if entry.target & 1 else 0
        if self.tangled:
            targets = (*TABLES, *DATA)
            bits = (entry.bits | W | U) & ~PT64_NX_MASK
            return targets[entry.target % len(targets)] << 12 | bits
        if entry.special == "large" and level in (2, 3):
            first = 0 if level == 3 else (0, 1024, 1536)[entry.target % 3]
            return first << 12 | PT_PAGE_SIZE_MASK | entry.bits
        below = [t for t in TABLES if LEVELS[t] == level - 1]
        bits = entry.bits
        if below and not self.inherits_rights:
            bits = (bits | W | U) & ~PT64_NX_MASK
        if entry.special == "reserved":
            bits |= RESERVED
        if entry.special == "mmio" and level == 1:
            return HOLE << 12 | bits
        targets = tuple(below) or (*DATA, *DATA, *TABLES)
        return targets[entry.target % len(targets)] << 12 | bits

    # The guest

    @rule(number=VCPU, place=PLACES, kind=KIND, user=st.booleans(), size=SIZE)
    def access(self, number: int, place: Place, kind: Any, user: bool, size: int) -> None:
        vcpu = self.vcpu(number)
        self.guest.access(vcpu, self.guest.address(vcpu, place), kind, user, size, NOTHING)

    @rule(number=VCPU, kind=KIND, user=st.booleans(), roles=st.booleans())
    def sweep(self, number: int, kind: Any, user: bool, roles: bool) -> None:
        """Everything is accessed; with `roles` under each setting of WP and NX, which takes many shadow pages."""
        vcpu = self.vcpu(number)
        for bit in (X86_CR0_WP, EFER_NX, X86_CR0_WP, EFER_NX) if roles else (0,):
            if roles:
                drive(
                    kvm_set_cr0(vcpu, vcpu.cr0 ^ bit)
                    if bit == X86_CR0_WP
                    else set_efer(vcpu, vcpu.efer ^ bit)
                )
                self.guest.flushed(vcpu)
            for place in EVERYWHERE:
                self.guest.access(vcpu, self.guest.address(vcpu, place), kind, user, 8, NOTHING)

    @rule(
        number=VCPU,
        stores=st.lists(
            st.tuples(TABLE_FRAME, INDEX, st.booleans(), ENTRY, SIZES_OF_ENTRIES), min_size=1, max_size=8
        ),
        emulated=st.sampled_from((False, False, False, True)),
    )
    def store_entries(
        self, number: int, stores: list[tuple[int, int, bool, Entry, int]], emulated: bool
    ) -> None:
        """The guest changes its tables, here and there by instructions that KVM emulates for other reasons."""
        vcpu = self.vcpu(number)
        for table, index, half, entry, size in stores:
            gpa = self.guest.entry_gpa(vcpu, table, index, half)
            value = self.value(table, entry) & (1 << 8 * size) - 1
            if emulated:
                assert drive(emulator_write_phys(vcpu, gpa, size, value))
            else:
                self.guest.access(vcpu, self.guest.window(vcpu, gpa), WRITE, False, size, value)

    @rule(
        number=VCPU,
        table=TABLE_FRAME,
        index=INDEX,
        entry=ENTRY,
        size=st.sampled_from((8, 4, 2, 1)),
        offset=st.sampled_from((0, 0, 0, 4, 2, 6, 1)),
        emulated=st.booleans(),
    )
    def store_part(  # noqa: PLR0917 - the draws of one rule
        self, number: int, table: int, index: int, entry: Entry, size: int, offset: int, emulated: bool
    ) -> None:
        """Some bytes, aligned or not, of a table's memory become what they would be with that entry (twice)."""
        vcpu = self.vcpu(number)
        value = self.value(table, entry)
        value = (value << 64 | value) >> 8 * offset & (1 << 8 * size) - 1
        gpa = (table << 12) + 8 * index + offset
        if emulated:
            assert drive(emulator_write_phys(vcpu, gpa, size, value))
        else:
            self.guest.access(vcpu, self.guest.window(vcpu, gpa), WRITE, False, size, value)

    @rule(number=VCPU, place=PLACES)
    def invlpg(self, number: int, place: Place) -> None:
        vcpu = self.vcpu(number)
        address = self.guest.address(vcpu, place)
        self.guest.enter(vcpu)
        drive(kvm_mmu_invlpg(vcpu, address))
        self.guest.flushed_page(vcpu, address)

    @rule(
        number=VCPU,
        place=PLACES,
        entry=ENTRY,
        user=st.booleans(),
        flush=st.sampled_from(("", "invlpg", "cr3")),
        kinds=st.tuples(KIND, KIND),
    )
    def remap(  # noqa: PLR0917 - the draws of one rule
        self, number: int, place: Place, entry: Entry, user: bool, flush: str, kinds: tuple[Any, Any]
    ) -> None:
        """An address is used, its last entry changes, perhaps the guest invalidates it, and it is used again."""
        vcpu = self.vcpu(number)
        address = self.guest.address(vcpu, place)
        self.guest.access(vcpu, address, kinds[0], user, 8, NOTHING)
        last = self.guest.last_entry(vcpu, address)
        if last is None or last.gpa >> 12 not in TABLES:
            return
        size = 4 if self.guest.mode(vcpu) is TWO_LEVEL else 8
        value = self.value(last.gpa >> 12, entry)
        self.guest.access(vcpu, self.guest.window(vcpu, last.gpa), WRITE, False, size, value)
        if flush == "invlpg":
            self.invlpg(number, place)
        elif flush == "cr3":
            assert not drive(kvm_set_cr3(vcpu, vcpu.cr3))
            self.guest.flushed(vcpu)
        self.guest.access(vcpu, address, kinds[1], user, 8, NOTHING)

    @rule(number=VCPU, root=st.integers(0, 1))
    def mov_cr3(self, number: int, root: int) -> None:
        vcpu = self.vcpu(number)
        assert not drive(kvm_set_cr3(vcpu, self.guest.root(self.guest.mode(vcpu), root)))
        self.guest.flushed(vcpu)

    @rule(number=VCPU, bit=st.sampled_from((X86_CR0_WP, X86_CR0_WP, X86_CR0_PG)))
    def flip_cr0(self, number: int, bit: int) -> None:
        """Write protection; and paging off and on again, if such guests are in the run."""
        vcpu = self.vcpu(number)
        if bit == X86_CR0_WP or (OFF in self.modes and len(self.modes) > 1):
            assert not drive(kvm_set_cr0(vcpu, vcpu.cr0 ^ bit))
            self.guest.flushed(vcpu)

    @rule(number=VCPU)
    def flip_nx(self, number: int) -> None:
        vcpu = self.vcpu(number)
        assert not drive(set_efer(vcpu, vcpu.efer ^ EFER_NX))
        self.guest.flushed(vcpu)

    @precondition(lambda self: len(self.modes) > 1)
    @rule(number=VCPU, mode=st.integers(0, 3), write_protect=st.booleans(), no_execute=st.booleans())
    def set_mode(self, number: int, mode: int, write_protect: bool, no_execute: bool) -> None:
        self.guest.set_mode(
            self.vcpu(number), self.modes[mode % len(self.modes)], write_protect, no_execute, 0
        )

    @precondition(lambda self: PAE in self.modes)
    @rule(number=VCPU, index=st.integers(0, 1), table=st.sampled_from((0, 20, 21)))
    def set_pdpte(self, number: int, index: int, table: int) -> None:
        """A PDPTE changes, and every vCPU that has loaded it loads it again, as guests must see to."""
        value = table << 12 | P if table else 0
        assert drive(emulator_write_phys(self.vcpu(number), (PDPT << 12) + 8 * index, 8, value))
        for vcpu in self.guest.vcpus:
            if self.guest.mode(vcpu) is PAE:
                assert not drive(kvm_set_cr3(vcpu, vcpu.cr3))
                self.guest.flushed(vcpu)

    @rule(number=VCPU, place=PLACES)
    def prefault(self, number: int, place: Place) -> None:
        # Not with a reload pending: the kernel would follow the stale links of the root that was zapped in use.
        vcpu = self.vcpu(number)
        self.guest.enter(vcpu)
        drive(prefault(vcpu, self.guest.address(vcpu, place)))

    @rule(number=VCPU, place=PLACES)
    def unprotect(self, number: int, place: Place) -> None:
        vcpu = self.vcpu(number)
        drive(kvm_mmu_unprotect_page_virt(vcpu, self.guest.address(vcpu, place)))

    @rule(number=VCPU, table=TABLE_FRAME)
    def pv_release_pt(self, number: int, table: int) -> None:
        drive(kvm_pv_mmu_op_release_pt(self.vcpu(number), table << 12))

    # The host

    @rule(
        what=st.sampled_from(
            ("unmap", "unmap_range", "reclaim", "share", "move", "split", "age", "test_age")
        ),
        gfn=FRAME,
    )
    def host_page(self, what: str, gfn: int) -> None:
        kvm = self.guest.kvm
        slot = kvm.host.slot(gfn)
        if slot.backing is Backing.HUGE_2M and what not in {"age", "test_age"}:
            # The notifiers of single pages name one page of 4 KiB; hugetlbfs pages go by ranges.
            drive(host.unmap_range(kvm, gfn & slot.host_mask, 512))
            return
        pfn = kvm.host.take_pfn(slot)
        operations: dict[str, Callable[[], Operation[Any]]] = {
            "unmap": lambda: host.unmap(kvm, gfn),
            "unmap_range": lambda: host.unmap_range(kvm, gfn, 3),
            "reclaim": lambda: host.reclaim(kvm, gfn),
            "share": lambda: host.move(kvm, gfn, pfn, False),
            "move": lambda: host.move(kvm, gfn, pfn, True),
            "split": lambda: host.split(kvm, gfn),
            "age": lambda: kvm_mmu_notifier_clear_flush_young(kvm, gfn),
            "test_age": lambda: kvm_mmu_notifier_test_young(kvm, gfn),
        }
        drive(operations[what]())

    @rule(
        number=VCPU,
        place=PLACES,
        what=st.sampled_from(("unmap", "reclaim", "share", "share", "move", "split")),
        user=st.booleans(),
        kinds=st.tuples(KIND, KIND, KIND),
        zap=st.booleans(),
    )
    def host_page_in_use(  # noqa: PLR0917 - the draws of one rule
        self, number: int, place: Place, what: str, user: bool, kinds: tuple[Any, Any, Any], zap: bool
    ) -> None:
        """The host does something to the very frame that the guest uses; perhaps it must be mapped anew after it."""
        vcpu = self.vcpu(number)
        address = self.guest.address(vcpu, place)
        self.guest.access(vcpu, address, kinds[0], user, 8, NOTHING)
        gfn = self.guest.frame(vcpu, address)
        if gfn is not None:
            self.host_page(what, gfn)
        if zap:
            self.shadow_pages("zap_all")
        self.guest.access(vcpu, address, kinds[1], user, 8, NOTHING)
        self.guest.access(vcpu, address, kinds[2], user, 8, NOTHING)

    @rule(slot=st.integers(0, 1), what=st.sampled_from(("on", "off", "read")))
    def dirty_log(self, slot: int, what: str) -> None:
        kvm = self.guest.kvm
        drive(
            kvm_vm_ioctl_get_dirty_log(kvm, slot)
            if what == "read"
            else set_dirty_logging(kvm, slot, what == "on")
        )

    @rule(what=st.sampled_from(("zap_all", "shrink", "shrink", "fewer", "more")))
    def shadow_pages(self, what: str) -> None:
        kvm = self.guest.kvm
        operations: dict[str, Callable[[], Operation[Any]]] = {
            "zap_all": lambda: kvm_mmu_zap_all(kvm),
            "shrink": lambda: mmu_shrink(kvm, 1),
            "fewer": lambda: kvm_mmu_change_mmu_pages(kvm, 64),
            "more": lambda: kvm_mmu_change_mmu_pages(kvm, 1024),
        }
        drive(operations[what]())

    # What must hold

    @rule(number=VCPU)
    def look_everywhere(self, number: int) -> None:
        self.guest.check_all(self.vcpu(number), EVERYWHERE)

    @invariant()
    def audit_is_clean(self) -> None:
        assert mmu_audit(self.guest.kvm) == []


class Long64(ShadowPaging):
    """64-bit guests."""


class LongInheriting(ShadowPaging):
    """64-bit guests whose upper entries restrict rights."""

    inherits_rights = True


class LongTangled(ShadowPaging):
    """64-bit guests whose tables are used at several levels at once, also as data."""

    tangled = True


class PaeGuests(ShadowPaging):
    modes = (PAE,)


class TwoLevelGuests(ShadowPaging):
    modes = (TWO_LEVEL,)


class PagingOff(ShadowPaging):
    modes = (OFF,)


class MixedModes(ShadowPaging):
    """vCPUs in different modes on the same tables, changing them."""

    modes = (LONG, PAE, TWO_LEVEL, OFF)


class MixedTangled(MixedModes):
    tangled = True


class PrePatch(MixedModes):
    profile = "pre-patch+fixed"


class PrePatchBypass(PrePatch):
    bypass_guest_pf = True


class Linux31(ShadowPaging):
    """As released: the bugs that `fixed` mends take two vCPUs."""

    profile = "linux-3.1"
    vcpus = 1


class Ept(PagingOff):
    tdp = Tdp.EPT


class Npt(PagingOff):
    tdp = Tdp.NPT


def _test_case(machine: type[ShadowPaging], examples: int = 30) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return case


TestLong64 = _test_case(Long64)
TestLongInheriting = _test_case(LongInheriting)
TestLongTangled = _test_case(LongTangled)
TestPaeGuests = _test_case(PaeGuests)
TestTwoLevelGuests = _test_case(TwoLevelGuests)
TestPagingOff = _test_case(PagingOff)
TestMixedModes = _test_case(MixedModes)
TestMixedTangled = _test_case(MixedTangled)
TestPrePatch = _test_case(PrePatch)
TestPrePatchBypass = _test_case(PrePatchBypass)
TestLinux31 = _test_case(Linux31)
TestEpt = _test_case(Ept)
TestNpt = _test_case(Npt)
