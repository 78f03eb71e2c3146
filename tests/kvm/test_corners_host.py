"""What happens seldom: a slot that goes while somebody is at work on it, two who want the same, requests that are refused.

First the host's side (pages, slots, notifiers), then the vCPU's (registers, emulation), then what a machine says of itself.
"""

from collections.abc import Callable
from typing import Any

import pytest

from shadowmmu.cpu.x86 import (
    PFERR_FETCH_MASK,
    PFERR_USER_MASK,
    PT_PAGE_SIZE_MASK,
    X86_CR0_PE,
    X86_CR4_PAE,
    X86_CR4_PGE,
)
from shadowmmu.kvm import (
    MEMORY_POINTS,
    Backing,
    ConfigError,
    Instruction,
    InstructionKind,
    Kvm,
    KvmConfig,
    MemorySlot,
    NestedGuest,
    NoSuchFrameError,
    Operation,
    Outcome,
    Point,
    Profile,
    Srcu,
    emulator_write_phys,
    host,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_test_young,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all,
    kvm_reload_remote_mmus,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    kvm_set_memory_region,
    mmu_audit,
    set_regs,
    x86_emulate_instruction,
)
from shadowmmu.protocol.events import FrameBacked, FrameRevoked
from shadowmmu.protocol.messages import Tdp
from tests.kvm.kit import (
    CR0,
    EXECUTE,
    PAGE,
    READ,
    TABLE,
    WRITE,
    P,
    World,
    drive,
    frame_address,
    gva,
    identity_map,
)

RAM, BASE, PAGES = 64, 64, 16
SLOT = MemorySlot(1, BASE, PAGES)
MOVED = MemorySlot(1, BASE + 8, PAGES)
GONE = MemorySlot(1, BASE, 0)
L3, L2, T = 17, 18, 19
TABLE_IN_SLOT = BASE + 2
NO_MEMORY = 5000
PDPT = 15


def address(gfn: int) -> int:
    """Where the guest maps a frame of RAM or beyond."""
    return gva(l1=gfn)


def world_of(profile: str = "fixed") -> World:
    """RAM of 64 frames; the guest maps 96 frames one to one."""
    world = World(2, profile, npages=RAM)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    for gfn in range(96):
        world.set_gpte(T, gfn, gfn)
    world.boot()
    return world


def set_region(world: World, region: MemorySlot) -> Any:
    return world.run(kvm_set_memory_region(world.kvm, region))


def shadow_a_table_in_the_slot(world: World) -> None:
    """A frame of the slot becomes a table of level 1, whose entry 3 maps frame 5, and vCPU 0 uses it."""
    world.set_gpte(L2, 1, TABLE_IN_SLOT, TABLE)
    world.set_gpte(TABLE_IN_SLOT, 3, 5)
    world.access(world.vcpus[0], gva(l2=1, l1=3))
    world.exit(world.vcpus[0])
    assert world.is_write_protected(TABLE_IN_SLOT)


# The host


@pytest.mark.parametrize(
    "change",
    [
        lambda kvm: host.unmap(kvm, BASE + 1),
        lambda kvm: host.reclaim(kvm, BASE + 1),
        lambda kvm: host.unmap_range(kvm, BASE + 1, 3),
        lambda kvm: host.move(kvm, BASE + 1, 0x500000, False),
    ],
    ids=["unmap", "reclaim", "unmap_range", "move"],
)
def test_memory_that_is_unmapped_first_is_not_changed_any_more(
    change: Callable[[Kvm], Operation[None]],
) -> None:
    world = world_of()
    kvm = world.kvm
    set_region(world, SLOT)
    changing = world.start(change(kvm)).until(Point.HOST_PAGE_LOCK)
    world.run(host.munmap(kvm, set_region(world, GONE)))
    before = (len(world.events), kvm.mmu_notifier_seq)
    changing.finish()
    assert (len(world.events), kvm.mmu_notifier_seq) == before
    assert kvm.host.deviations() == []
    assert not kvm.host.in_change


def test_a_page_of_a_deleted_slot_is_taken_away_though_nobody_in_kvm_has_it() -> None:
    world = world_of()
    set_region(world, SLOT)
    pfn = world.kvm.host.pfn(BASE)
    unmapping = world.start(host.unmap(world.kvm, BASE)).until(Point.HOST_PAGE_LOCK)
    set_region(world, GONE)
    world.access(world.vcpus[0], address(5))
    flushes = world.kvm.stat.remote_tlb_flush
    unmapping.finish()
    assert world.events[-1] == FrameRevoked(BASE, pfn)
    assert world.kvm.stat.remote_tlb_flush == flushes
    assert mmu_audit(world.kvm) == []


def test_a_range_to_unmap_ends_with_its_slot() -> None:
    world = world_of()
    set_region(world, SLOT)
    with pytest.raises(NoSuchFrameError, match=str(BASE + PAGES)):
        drive(host.unmap_range(world.kvm, BASE + 1, PAGES))
    assert world.kvm.host.deviations() == []


def test_of_two_who_break_copy_on_write_one_is_quicker() -> None:
    world = world_of()
    zero, one = world.vcpus
    kvm = world.kvm
    world.access(one, address(5))
    world.exit(one)
    world.run(host.move(kvm, 5, 0x500000, False))
    fault = Instruction(WRITE, address(5), 8, 1, user=True)
    breaking = world.start(kvm_mmu_page_fault(one, fault.gva, 7, fault)).until(Point.HOST_PAGE_LOCK)
    world.access(zero, address(5), write=True, value=2)
    assert breaking.finish().outcome is Outcome.RETRY
    assert world.access(one, address(5)) == 2
    frames = [event.pfn for event in world.events if isinstance(event, FrameBacked)]
    assert frames == [0x500000, kvm.host.pfn(5)]
    assert not kvm.host.in_change


def test_the_notifiers_find_a_frame_by_its_host_page() -> None:
    world = world_of()
    kvm = world.kvm
    set_region(world, SLOT)
    page = kvm.host.page(BASE + 3)
    assert page not in (BASE + 3, kvm.host.page(BASE + 2))
    world.access(world.vcpus[0], address(BASE + 3))
    world.exit(world.vcpus[0])
    assert world.run(kvm_mmu_notifier_test_young(kvm, page)) is True
    assert world.run(kvm_mmu_notifier_clear_flush_young(kvm, page)) is True
    assert world.run(kvm_mmu_notifier_test_young(kvm, page)) is False
    with pytest.raises(NoSuchFrameError):
        kvm.host.page(NO_MEMORY)


# Slots that go or move without their mappings


def test_a_store_by_a_stale_entry_to_unmapped_memory_goes_nowhere() -> None:
    """Bug B25 where a new slot flushes nothing: an entry for the old memory is writable again after a sync."""
    world = world_of("pre-patch-memslot-delete-flush")
    one = world.vcpus[1]
    set_region(world, SLOT)
    world.access(one, address(BASE), write=True, value=1)
    stale = world.kvm.host.pfn(BASE)
    world.access(one, address(T) + 8 * 95, write=True, value=5 << 12 | PAGE)  # T is unsync from now on
    world.run(host.munmap(world.kvm, set_region(world, GONE)))
    set_region(world, SLOT)
    world.exit(one)
    world.run(kvm_set_cr3(one, one.cr3))  # synchronises T
    assert world.access(one, address(BASE), write=True, value=7) == 7
    assert world.tlbs[1][BASE] == (stale, True)
    assert world.access(one, address(BASE)) == 0
    assert world.kvm.memory.read(BASE << 12, 8) == 0


def test_a_table_whose_slot_has_gone_can_be_zapped() -> None:
    world = world_of("fixed-memslot-delete-flush")
    set_region(world, SLOT)
    shadow_a_table_in_the_slot(world)
    set_region(world, GONE)
    assert world.is_write_protected(TABLE_IN_SLOT)
    world.run(kvm_mmu_zap_all(world.kvm))
    assert not world.is_write_protected(TABLE_IN_SLOT)
    assert world.kvm.indirect_shadow_pages == 0
    assert mmu_audit(world.kvm) == []


def test_a_new_slot_counts_the_tables_that_are_shadowed_in_it_already() -> None:
    world = world_of("fixed-memslot-delete-flush")
    set_region(world, SLOT)
    shadow_a_table_in_the_slot(world)
    set_region(world, GONE)
    creating = world.start(kvm_set_memory_region(world.kvm, SLOT)).until(Point.MEMSLOT_PUBLISHED)
    assert world.is_write_protected(TABLE_IN_SLOT)
    assert [error for error in mmu_audit(world.kvm) if error.check == "write_count"] == []
    creating.finish()
    assert mmu_audit(world.kvm) == []


def test_a_new_slot_does_not_count_direct_pages() -> None:
    world = world_of("fixed-memslot-delete-flush")
    aligned = MemorySlot(1, 512, PAGES)
    set_region(world, aligned)
    world.set_gpte(L2, 1, 512, PAGE | PT_PAGE_SIZE_MASK)
    world.access(world.vcpus[0], gva(l2=1, l1=3))
    set_region(world, MemorySlot(1, 512, 0))
    creating = world.start(kvm_set_memory_region(world.kvm, aligned)).until(Point.MEMSLOT_PUBLISHED)
    assert any(sp.direct for sp in world.kvm.mmu_page_hash[512])
    assert [error for error in mmu_audit(world.kvm) if error.check == "write_count"] == []
    creating.finish()
    assert mmu_audit(world.kvm) == []


def test_a_new_slot_does_not_count_roots_that_are_invalid() -> None:
    world = world_of("fixed-memslot-delete-flush")
    vcpu = world.vcpus[0]
    set_region(world, SLOT)
    world.run(kvm_set_cr3(vcpu, TABLE_IN_SLOT << 12))
    world.enter(vcpu)
    world.run(kvm_mmu_zap_all(world.kvm))
    set_region(world, GONE)
    creating = world.start(kvm_set_memory_region(world.kvm, SLOT)).until(Point.MEMSLOT_PUBLISHED)
    assert [sp.invalid for sp in world.kvm.mmu_page_hash[TABLE_IN_SLOT]] == [True]
    assert [error for error in mmu_audit(world.kvm) if error.check == "write_count"] == []
    creating.finish()


def test_mappings_left_behind_are_cleaned_up_if_nobody_listens() -> None:
    world = world_of("linux-3.1")
    set_region(world, SLOT)
    world.access(world.vcpus[1], address(BASE + 2), write=True, value=1)
    world.kvm.trace = None
    set_region(world, MOVED)
    assert mmu_audit(world.kvm) == []
    assert world.access(world.vcpus[1], address(BASE + 10)) == 1


def test_a_slot_of_huge_host_pages_moves_by_whole_ones() -> None:
    world = world_of()
    region = MemorySlot(1, 520, PAGES, Backing.HUGE_2M)
    set_region(world, region)
    with pytest.raises(ConfigError, match="it moves by multiples of that"):
        set_region(world, MemorySlot(1, 530, PAGES, Backing.HUGE_2M))
    assert world.kvm.gfn_to_memslot(520) is not None
    set_region(world, MemorySlot(1, 520 + 512, PAGES, Backing.HUGE_2M))
    assert world.kvm.gfn_to_memslot(520) is None


# Registers


def test_paging_is_not_switched_on_without_page_directory_pointers() -> None:
    world = World(1)
    (vcpu,) = world.vcpus
    world.kvm.memory.write(PDPT << 12, 8, 20 << 12 | P)
    drive(set_regs(vcpu, X86_CR0_PE, NO_MEMORY << 12, X86_CR4_PAE, 0))
    assert drive(kvm_set_cr0(vcpu, CR0)) is True
    assert not vcpu.is_paging
    assert drive(kvm_set_cr3(vcpu, PDPT << 12)) is False
    assert drive(kvm_set_cr0(vcpu, CR0)) is False
    assert (vcpu.is_paging, vcpu.pdptrs) == (True, [20 << 12 | P, 0, 0, 0])


def test_pae_is_not_switched_on_without_page_directory_pointers() -> None:
    world = World(1)
    (vcpu,) = world.vcpus
    world.kvm.memory.write(PDPT << 12, 8, 20 << 12 | P)
    drive(set_regs(vcpu, CR0, NO_MEMORY << 12, 0, 0))
    assert drive(kvm_set_cr4(vcpu, X86_CR4_PAE)) is True
    assert not vcpu.is_pae
    assert drive(kvm_set_cr3(vcpu, PDPT << 12)) is False
    assert drive(kvm_set_cr4(vcpu, X86_CR4_PAE)) is False
    assert (vcpu.is_pae, vcpu.pdptrs) == (True, [20 << 12 | P, 0, 0, 0])
    world.kvm.memory.write(PDPT << 12, 8, 21 << 12 | P)
    assert drive(kvm_set_cr4(vcpu, X86_CR4_PAE | X86_CR4_PGE)) is False
    assert vcpu.pdptrs[0] == 21 << 12 | P


def test_page_directory_pointers_are_as_memory_is_when_they_are_read() -> None:
    world = World(1)
    (vcpu,) = world.vcpus
    drive(set_regs(vcpu, CR0, PDPT << 12, X86_CR4_PAE, 0))
    world.kvm.memory_points = MEMORY_POINTS
    loading = world.start(kvm_set_cr3(vcpu, 14 << 12)).until(Point.READ_GUEST_MEMORY)
    world.kvm.memory.write(14 << 12, 8, 22 << 12 | P)
    assert loading.finish() is False
    assert vcpu.pdptrs == [22 << 12 | P, 0, 0, 0]


def test_an_inner_guest_is_not_entered_if_the_outer_one_does_not_map_its_page_directory_pointers() -> None:
    world = World(1)
    identity_map(world)
    world.boot()
    mapped = NestedGuest(world.vcpus[0], CR0, frame_address(PDPT), X86_CR4_PAE, 0)
    assert drive(mapped.load()) is True
    world.kvm.memory.write(PDPT << 12, 8, 20 << 12 | P)
    unmapped = NestedGuest(world.vcpus[0], CR0, frame_address(100), X86_CR4_PAE, 0)
    assert drive(unmapped.load()) is False
    assert unmapped.pdptrs == [0, 0, 0, 0]


# Emulation


@pytest.mark.parametrize("kind, value", [(READ, 42), (EXECUTE, 0)])
def test_an_access_that_met_no_memory_is_emulated_on_memory_that_comes_meanwhile(
    kind: InstructionKind, value: int
) -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    access = Instruction(kind, address(BASE + 1), user=True)
    error_code = PFERR_USER_MASK | (PFERR_FETCH_MASK if kind is EXECUTE else 0)
    faulting = world.start(kvm_mmu_page_fault(vcpu, access.gva, error_code, access)).until(
        Point.EMULATE_FAULT
    )
    creating = world.start(kvm_set_memory_region(world.kvm, SLOT)).until(Srcu.SYNCHRONIZE)
    world.kvm.memory.write(BASE + 1 << 12, 8, 42)
    outcome = faulting.finish()
    assert (outcome.outcome, outcome.gpa, outcome.value) == (Outcome.EMULATED, BASE + 1 << 12, value)
    creating.finish()


def test_an_access_whose_memory_goes_between_translation_and_access_is_mmio() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    set_region(world, SLOT)
    store = Instruction(WRITE, address(BASE + 1) + 8, 8, 7, user=True)
    storing = world.start(x86_emulate_instruction(vcpu, store)).until(Point.EMULATE_TRANSLATED)
    deleting = world.start(kvm_set_memory_region(world.kvm, GONE)).until(Srcu.SYNCHRONIZE)
    outcome = storing.finish()
    assert (outcome.outcome, outcome.gpa) == (Outcome.MMIO, (BASE + 1 << 12) + 8)
    assert world.kvm.memory.read((BASE + 1 << 12) + 8, 8) == 0
    deleting.finish()


def test_a_locked_operation_reads_what_was_stored_just_before() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    world.kvm.memory_points = MEMORY_POINTS
    add = Instruction(InstructionKind.XADD, address(5), 8, 2, user=True)
    adding = world.start(x86_emulate_instruction(vcpu, add)).until(Point.EMULATE_TRANSLATED)
    adding.until(Point.READ_GUEST_MEMORY)
    world.kvm.memory.write(5 << 12, 8, 40)
    assert adding.finish().value == 40
    assert world.kvm.memory.read(5 << 12, 8) == 42


@pytest.mark.parametrize("goes, mapped", [(False, 6), (True, None)])
def test_half_an_entry_is_not_mapped_if_the_rest_cannot_be_read(goes: bool, mapped: int | None) -> None:
    """A store of 4 bytes to a table of 8-byte entries: the whole entry is read again, unless the slot has gone."""
    world = world_of()
    kvm = world.kvm
    set_region(world, SLOT)
    shadow_a_table_in_the_slot(world)
    (shadow,) = kvm.mmu_page_hash[TABLE_IN_SLOT]
    gpa = (TABLE_IN_SLOT << 12) + 8 * 3
    storing = world.start(emulator_write_phys(world.vcpus[0], gpa, 4, 6 << 12 | PAGE)).until(
        Point.PTE_WRITE_READ
    )
    if goes:
        world.start(kvm_set_memory_region(kvm, GONE)).until(Srcu.SYNCHRONIZE)
    assert storing.finish() is True
    assert (shadow.gfns[3] if 3 in shadow.spt else None) == mapped
    assert kvm.stat.mmu_pte_updated == (mapped is not None)


# What a machine is made of


@pytest.mark.parametrize(
    "config, text",
    [
        (KvmConfig((MemorySlot(32, 0, 5),)), "memory slot 32: there are 32 slots"),
        (KvmConfig((MemorySlot(0, 0, 5),), bypass_guest_pf=True), r"linux-3\.1 has no bypass_guest_pf"),
        (
            KvmConfig(
                (MemorySlot(0, 0, 5),),
                profile=Profile.parse("pre-patch"),
                tdp=Tdp.NPT,
                bypass_guest_pf=True,
            ),
            "no bypass_guest_pf with two-dimensional paging",
        ),
    ],
)
def test_an_impossible_machine_is_refused_with_the_reason(config: KvmConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Kvm(config)


def test_the_memory_points_are_those_last_chosen() -> None:
    kvm = World(1).kvm
    assert kvm.memory_points == frozenset()
    kvm.memory_points = frozenset({Point.GPTE_READ})
    with pytest.raises(ConfigError, match="not memory points: \\['BEFORE_LOCK', 'WALK_DONE'\\]"):
        kvm.memory_points = frozenset({Point.WALK_DONE, Point.SPTE_UPDATE, Point.BEFORE_LOCK})
    assert kvm.memory_points == {Point.GPTE_READ}


def test_only_the_kernel_that_has_bypass_guest_pf_counts_notrap_entries() -> None:
    assert world_of("linux-3.1").kvm.bypass_counters() == {}
    world = World(1, "pre-patch", npages=RAM, bypass_guest_pf=True)
    identity_map(world)
    world.boot()
    world.access(world.vcpus[0], frame_address(40))
    assert world.kvm.bypass_counters() == {
        "notrap.prefetched": 3 * 511 + 512 - 64,  # each table has one entry, the last 64
        "notrap.on_sync": 0,
        "notrap.on_prefetch": 0,
        "notrap.on_pte_write": 0,
        "notrap.converted": 0,
    }


def test_the_addresses_of_shadow_pages_end_below_the_mmio_bits() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    world.kvm._next_serial = (1 << 27) - 4  # four tables lead to a page
    world.access(vcpu, address(5))
    assert max(world.kvm.page_header) == (1 << 40) - 4096
    world.run(kvm_reload_remote_mmus(world.kvm))
    world.run(kvm_mmu_zap_all(world.kvm))
    world.exit(vcpu)
    with pytest.raises(OverflowError, match="used up"):
        world.access(vcpu, address(5))
    assert max(world.kvm.page_header, default=0) < 1 << 40


# Names


def test_profiles_are_told_apart_by_tree_and_fixes_not_by_name() -> None:
    names = ("fixed", "fixed-link-before-sync+link-before-sync", "linux-3.1", "pre-patch")
    assert len({Profile.parse(name) for name in names}) == 3


def test_things_are_printed_by_what_tells_them_apart() -> None:
    world = World(2)
    drive(kvm_reload_remote_mmus(world.kvm))
    assert repr(world.vcpus[1]) == "<Vcpu 1 OUTSIDE_GUEST_MODE requests=['mmu_reload']>"
    assert repr(world.kvm.memslots[0]) == "<KvmMemorySlot 0 frames 0..4095 4k>"
    assert repr(world.kvm.profile) == "Profile('linux-3.1')"
