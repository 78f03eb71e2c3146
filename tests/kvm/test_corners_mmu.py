"""Places in the MMU that recordings do not reach: races with the host, missing roots, and calls that are rarely made."""

import pytest

from shadowmmu.cpu.x86 import (
    EFER_NX,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_NX_MASK,
    PT_PAGE_SIZE_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_SMEP,
)
from shadowmmu.kvm import (
    MEMORY_POINTS,
    Backing,
    ConfigError,
    EntryStatus,
    Instruction,
    InstructionKind,
    Kick,
    MemorySlot,
    Outcome,
    Point,
    ShadowPage,
    emulator_write_phys,
    handle_ept_misconfig,
    host,
    kvm_flush_remote_tlbs,
    kvm_mmu_change_mmu_pages,
    kvm_mmu_invlpg,
    kvm_mmu_notifier_change_pte,
    kvm_mmu_page_fault,
    kvm_set_cr3,
    mmu_audit,
    page_fault,
    set_dirty_logging,
    set_regs,
    vcpu_enter_guest,
    x86_emulate_instruction,
)
from shadowmmu.kvm.contexts import build_context
from shadowmmu.kvm.direct import direct_map
from shadowmmu.kvm.notrap import paging_prefetch_page
from shadowmmu.kvm.pte_list import pte_list_add, pte_list_entries
from shadowmmu.kvm.pte_write import kvm_mmu_pte_write
from shadowmmu.kvm.rmap import drop_spte, rmap_write_protect
from shadowmmu.kvm.role import ROLE_SMEP_ANDNOT_WP
from shadowmmu.kvm.set_spte import set_spte
from shadowmmu.kvm.sync import kvm_sync_page
from shadowmmu.kvm.unsync import kvm_unsync_page
from shadowmmu.kvm.walker import walk_addr
from shadowmmu.protocol.events import AuditFailed
from shadowmmu.protocol.messages import Tdp
from tests.kvm.kit import (
    CR0,
    EFER_64,
    PAGE,
    READ,
    TABLE,
    A,
    P,
    U,
    W,
    World,
    drive,
    frame_address,
    gva,
    identity_map,
    points,
)

DATA = 256


@pytest.fixture
def world() -> World:
    """Two vCPUs in 64-bit mode; page 0 is frame DATA."""
    return booted(World(2, "fixed"))


def booted(world: World) -> World:
    for table in (16, 17, 18):
        world.set_gpte(table, 0, table + 1, TABLE)
    world.set_gpte(19, 0, DATA)
    world.boot()
    return world


def level(world: World, number: int) -> ShadowPage:
    return next(sp for sp in world.kvm.active_mmu_pages.values() if sp.level == number)


def pae_world(profile: str = "fixed") -> World:
    """PDPTEs in frame 20: entry 0 leads to page directory 18."""
    world = World(1, profile)
    world.set_gpte(20, 0, 18, P)
    world.set_gpte(18, 0, 19, TABLE)
    world.set_gpte(19, 0, DATA)
    drive(set_regs(world.vcpus[0], CR0, 20 << 12, X86_CR4_PAE, EFER_NX))
    return world


# Roles and contexts


def test_with_smep_a_kernel_write_to_a_user_page_maps_it_for_the_kernel_alone(world: World) -> None:
    vcpu = world.vcpus[0]
    drive(set_regs(vcpu, CR0 & ~X86_CR0_WP, world.root << 12, X86_CR4_PAE | X86_CR4_SMEP, EFER_64))
    world.set_gpte(19, 0, DATA, P | U | A)
    world.enter(vcpu)
    world.exit(vcpu)
    write = Instruction(InstructionKind.WRITE, 0, 8, 1)
    assert drive(kvm_mmu_page_fault(vcpu, 0, PFERR_WRITE_MASK, write)).outcome is Outcome.RETRY
    sp = level(world, 1)
    assert sp.role & ROLE_SMEP_ANDNOT_WP
    assert sp.spt[0] & (PT_WRITABLE_MASK | PT_USER_MASK | PT64_NX_MASK) == PT_WRITABLE_MASK | PT64_NX_MASK


@pytest.mark.parametrize("nxe", [0, EFER_NX])
def test_with_smep_the_kernel_may_not_fetch_what_every_level_opens_to_users(world: World, nxe: int) -> None:
    vcpu = world.vcpus[0]
    world.set_gpte(19, 0, DATA, P | U | A)
    fetches = [PFERR_FETCH_MASK, PFERR_FETCH_MASK | PFERR_USER_MASK]
    for smep, denied in ((0, None), (X86_CR4_SMEP, PFERR_PRESENT_MASK | PFERR_FETCH_MASK)):
        drive(set_regs(vcpu, CR0, world.root << 12, X86_CR4_PAE | smep, EFER_64 & ~EFER_NX | nxe))
        assert [drive(walk_addr(vcpu, 0, fetch)).fault for fetch in fetches] == [denied, None]
    world.set_gpte(18, 0, 19, P | W | A)
    assert drive(walk_addr(vcpu, 0, PFERR_FETCH_MASK)).fault is None


def test_a_context_is_not_changed_under_a_root(world: World) -> None:
    world.enter(world.vcpus[0])
    with pytest.raises(ConfigError, match="while a root is loaded"):
        build_context(world.vcpus[0])


def test_a_vcpu_without_paging_cannot_sync_a_table(world: World) -> None:
    world.access(world.vcpus[0], 0)
    drive(set_regs(world.vcpus[1], X86_CR0_PE, 0, 0, 0))
    assert drive(world.vcpus[1].mmu.context.sync_page(world.vcpus[1], level(world, 1)))


def test_a_vcpu_without_paging_leaves_the_entry_empty_whose_table_it_writes(world: World) -> None:
    world.access(world.vcpus[0], 0)
    vcpu = world.vcpus[1]
    drive(set_regs(vcpu, CR0 & ~X86_CR0_PG, 0, X86_CR4_PAE, EFER_64))
    updated = world.kvm.stat.mmu_pte_updated
    drive(emulator_write_phys(vcpu, 19 << 12, 8, (DATA + 1) << 12 | PAGE))
    assert world.kvm.stat.mmu_pte_updated == updated + 1
    assert 0 not in level(world, 1).spt


def test_a_page_of_another_entry_size_is_zapped_instead_of_synchronised(world: World) -> None:
    world.access(world.vcpus[0], 0)
    sp = level(world, 1)
    kvm_unsync_page(world.kvm, sp)
    drive(set_regs(world.vcpus[1], CR0, world.root << 12, 0, 0))
    zapped: list[ShadowPage] = []
    assert drive(kvm_sync_page(world.vcpus[1], sp, zapped, clear_unsync=True))
    assert zapped == [sp]


# Direct maps


def test_a_large_entry_in_the_way_ends_a_direct_map() -> None:
    world = World(1, memslots=(MemorySlot(0, 0, 2048, Backing.HUGE_2M),))
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    assert drive(page_fault(vcpu, 512 << 12, 0)) == 0
    fixed = world.kvm.stat.pf_fixed
    assert not drive(direct_map(vcpu, False, True, 1, 513, world.kvm.host.pfn(513), False))
    assert world.kvm.stat.pf_fixed == fixed


def test_a_direct_fault_without_a_root_does_nothing() -> None:
    world = World(1)
    assert drive(page_fault(world.vcpus[0], DATA << 12, 0)) == 0
    assert world.kvm.stat.pf_fixed == 0


def test_direct_prefetch_stops_where_the_slot_ends() -> None:
    world = World(1, memslots=(MemorySlot(0, 0, 1002), MemorySlot(1, 1004, 100)))
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    drive(page_fault(vcpu, 1004 << 12, 0))
    assert sorted(level(world, 1).spt) == [1004 % 512]


def test_a_misconfiguration_that_is_gone_is_tried_again() -> None:
    world = World(1, tdp=Tdp.EPT)
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    read = Instruction(READ, 5000 << 12)
    assert drive(handle_ept_misconfig(vcpu, 5000 << 12, read)).outcome is Outcome.RETRY


# Faults that meet the host, or tables that have changed


def test_a_fault_gives_up_where_its_table_has_just_gone(world: World) -> None:
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    fault = world.start(kvm_mmu_page_fault(vcpu, 0, 4, Instruction(READ, 0, user=True))).until(
        Point.BEFORE_LOCK
    )
    unmapping = world.start(host.unmap(world.kvm, 19)).until(Point.HOST_UNMAPPED)
    assert fault.finish().outcome is Outcome.RETRY
    assert not any(sp.level == 1 and sp.spt for sp in world.kvm.active_mmu_pages.values())
    unmapping.finish()
    world.access(vcpu, 0)


def test_a_large_mapping_gives_way_to_a_table_that_a_device_wrote() -> None:
    slots = (MemorySlot(0, 0, 512), MemorySlot(1, 512, 1024, Backing.HUGE_2M))
    world = booted(World(1, "fixed", memslots=slots))
    vcpu = world.vcpus[0]
    world.set_gpte(18, 0, 512, P | U | A | PT_PAGE_SIZE_MASK)
    world.access(vcpu, 0)
    assert level(world, 2).spt[0] & PT_PAGE_SIZE_MASK
    world.set_gpte(18, 0, 19, TABLE)  # the MMU is not told
    world.set_gpte(19, 0, 513, PAGE)
    world.access(vcpu, 0, write=True, value=7)
    assert world.kvm.memory.read(513 << 12, 8) == 7
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize(
    "profile, outcome", [("linux-3.1", Outcome.RETRY), ("fixed", Outcome.INJECT)], ids=["linux-3.1", "fixed"]
)
def test_a_pdpte_that_appears_without_a_load_of_cr3_maps_nothing(profile: str, outcome: Outcome) -> None:
    world = pae_world(profile)
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    world.set_gpte(20, 1, 18, P)
    read = Instruction(READ, 1 << 30, user=True)
    assert drive(kvm_mmu_page_fault(vcpu, 1 << 30, 4, read)).outcome is outcome
    assert vcpu.mmu.pae_root[1] == 0


def test_pae_roots_taken_before_one_that_fails_stay_counted() -> None:
    world = pae_world("linux-3.1")
    vcpu = world.vcpus[0]
    world.set_gpte(20, 2, 1 << 20, P)
    entry = drive(vcpu_enter_guest(vcpu))
    assert (entry.status, entry.root) == (EntryStatus.SHUTDOWN, -1)
    assert level(world, 2).root_count == 1
    assert [error.check for error in mmu_audit(world.kvm)] == ["roots"]


def test_frames_outside_of_memory_have_no_mappings_to_protect(world: World) -> None:
    assert not drive(rmap_write_protect(world.kvm, 1 << 30))


def test_an_emulated_load_brings_the_page_back(world: World) -> None:
    vcpu = world.vcpus[0]
    world.kvm.memory.write(DATA << 12, 8, 77)
    drive(host.unmap(world.kvm, DATA))
    loaded = drive(x86_emulate_instruction(vcpu, Instruction(READ, 0, user=True)))
    assert loaded.value == 77
    assert world.kvm.host.is_present(DATA)


# Slots that are going


def test_a_table_in_a_slot_that_is_going_cannot_be_read(world: World) -> None:
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.access(vcpu, 0)
    sp = level(world, 1)
    kvm.memslots[0].invalid = True
    kvm.publish_memslots(kvm.memslots)
    assert drive(vcpu.mmu.context.sync_page(vcpu, sp))
    sp.spt.clear()
    drive(paging_prefetch_page(vcpu, sp))
    assert not sp.spt


# bypass_guest_pf with memory points, and out-of-sync pages


def test_memory_points_stand_where_new_pages_are_filled() -> None:
    world = booted(World(1, "pre-patch", bypass_guest_pf=True))
    world.kvm.memory_points = MEMORY_POINTS
    world.access(world.vcpus[0], 0)
    assert level(world, 1).spt[100] == 0
    assert mmu_audit(world.kvm) == []


def test_more_unsync_pages_than_one_walk_holds_are_all_synchronised(world: World) -> None:
    """The walk's array is full at a page above level 1.

    It holds the root, two pages below it, 12 unsync ones, and then another directory.
    """
    vcpu = world.vcpus[0]
    world.set_gpte(17, 1, 80, TABLE)
    world.set_gpte(80, 0, 81, TABLE)
    world.set_gpte(81, 0, DATA)
    for index in range(12):
        world.set_gpte(18, index, 100 + index, TABLE)
        world.set_gpte(100 + index, 0, DATA)
        world.access(vcpu, gva(l2=index))
    world.access(vcpu, gva(l3=1))
    pages = [sp for sp in world.kvm.active_mmu_pages.values() if sp.level == 1]
    assert len(pages) == 13
    for sp in pages:
        kvm_unsync_page(world.kvm, sp)
    world.exit(vcpu)
    world.run(kvm_set_cr3(vcpu, vcpu.cr3))
    assert not any(sp.unsync for sp in pages)
    assert mmu_audit(world.kvm) == []


def test_a_large_page_that_may_not_be_any_more_is_dropped() -> None:
    slots = (MemorySlot(0, 0, 512), MemorySlot(1, 512, 1024, Backing.HUGE_2M))
    world = booted(World(1, "fixed", memslots=slots))
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.set_gpte(18, 0, 512, PAGE | PT_PAGE_SIZE_MASK)
    world.access(vcpu, 0, write=True, value=1)
    sp = level(world, 2)
    slot = kvm.memslots[1]
    slot.write_count[2][1] = 1
    pfn = kvm.host.pfn(512)
    assert drive(set_spte(vcpu, sp, 0, slot, 7, False, False, 2, 512, pfn, False, True, True))
    assert 0 not in sp.spt


def test_an_entry_for_a_frame_without_memory_replaces_any_other(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, 0, write=True, value=1)
    sp = level(world, 1)
    flushes = world.kvm.stat.remote_tlb_flush
    assert not drive(set_spte(vcpu, sp, 0, None, 7, False, False, 1, 1 << 20, -2, False, True, True))
    assert world.kvm.spte_format.is_mmio(sp.spt[0])
    assert world.kvm.stat.remote_tlb_flush == flushes


def test_dirty_logging_is_told_of_pages_that_are_written_again(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, 0, write=True, value=1)
    world.exit(vcpu)
    world.run(set_dirty_logging(world.kvm, 0, True))
    world.access(vcpu, 0, write=True, value=2)
    assert world.kvm.memslots[0].dirty_bitmap is not None
    assert DATA in world.kvm.memslots[0].dirty_bitmap


# Found by mutants of the model


def test_write_protection_drops_pages_of_1_gib() -> None:
    """A table that lies in memory which a page of 1 GiB maps writable."""
    gib = 1 << 18
    world = World(1, "fixed", memslots=(MemorySlot(0, 0, 512), MemorySlot(1, gib, gib, Backing.HUGE_1G)))
    world.set_gpte(16, 0, 17, TABLE)
    world.set_gpte(17, 0, gib, PAGE | PT_PAGE_SIZE_MASK)
    world.set_gpte(17, 1, gib + 5, TABLE)
    world.set_gpte(gib + 5, 0, 19, TABLE)
    world.set_gpte(19, 0, DATA)
    world.boot()
    vcpu = world.vcpus[0]
    world.access(vcpu, 8, write=True, value=1)
    assert level(world, 3).spt[0] & PT_PAGE_SIZE_MASK
    world.access(vcpu, gva(l3=1))
    assert 0 not in level(world, 3).spt
    assert not world.try_store(vcpu, 5 << 12, 0)
    assert mmu_audit(world.kvm) == []


def test_entries_dropped_during_a_flush_stay_owed(world: World) -> None:
    kvm = world.kvm
    world.access(world.vcpus[0], 0)
    kvm.tlbs_dirty = 1
    flushing = kvm_flush_remote_tlbs(kvm)
    assert isinstance(next(flushing), Kick)
    kvm.tlbs_dirty += 1
    for vcpu in world.vcpus:
        world.exit(vcpu)
    drive(flushing)
    assert kvm.tlbs_dirty == 2


def test_the_limit_on_shadow_pages_falls_to_what_zapping_leaves(world: World) -> None:
    """The oldest page is the root, and with it go all unsync pages below it: more than were asked for."""
    kvm, vcpu = world.kvm, world.vcpus[0]
    for index in range(70):
        world.set_gpte(18, index, 100 + index, TABLE)
        world.set_gpte(100 + index, 0, DATA)
        world.access(vcpu, gva(l2=index))
    for sp in [sp for sp in kvm.active_mmu_pages.values() if sp.level == 1][:20]:
        kvm_unsync_page(kvm, sp)
    world.exit(vcpu)
    used = kvm.n_used_mmu_pages
    world.run(kvm_mmu_change_mmu_pages(kvm, used - 2))
    assert kvm.n_used_mmu_pages == used - 20
    assert kvm.n_max_mmu_pages == used - 20


def test_direct_prefetch_stops_at_a_frame_that_is_not_at_hand() -> None:
    world = World(1)
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    drive(host.unmap(kvm, 256))
    drive(page_fault(vcpu, 258 << 12, 0))
    assert sorted(level(world, 1).spt) == [258 % 512]
    drive(page_fault(vcpu, 261 << 12, 0))
    assert sorted(level(world, 1).spt) == [258, 261]


def test_a_table_write_that_an_invlpg_overtook_only_drops_the_entry() -> None:
    world = booted(World(2, "fixed-emulated-store-window"))  # with that fix INVLPG waits for the store
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.access(vcpu, 0)
    world.exit(vcpu)
    store = emulator_write_phys(vcpu, 19 << 12, 8, (DATA + 1) << 12 | PAGE)
    writing = world.start(store).until(Point.PTE_WRITE_LOCK)
    world.run(kvm_mmu_invlpg(world.vcpus[1], 0x5000))
    updated = kvm.stat.mmu_pte_updated
    writing.finish()
    assert kvm.stat.mmu_pte_updated == updated
    assert 0 not in level(world, 1).spt


def test_direct_prefetch_fills_every_gap_before_the_fault() -> None:
    world = World(1)
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    drive(page_fault(vcpu, 263 << 12, 0))
    sp = level(world, 1)
    assert sorted(sp.spt) == list(range(256, 264))
    for frame in (257, 260, 263):
        drive(host.unmap(kvm, frame))
        kvm.host.fault_in(kvm.memslots[0], frame)
    assert sorted(sp.spt) == [256, 258, 259, 261, 262]
    drive(page_fault(vcpu, 263 << 12, 0))
    assert sorted(sp.spt) == list(range(256, 264))


def test_reverse_maps_follow_a_slot_that_moves() -> None:
    slot = World(1, memslots=(MemorySlot(0, 512, 1024, Backing.HUGE_2M),)).kvm.memslots[0]
    assert 512 in slot
    assert 511 not in slot
    slot.rmap[1][512], slot.rmap[2][1], slot.rmap[3][0] = 8, 16, 24
    moved = slot.moved(512 + (1 << 18))
    assert moved.rmap[1:] == ({512 + (1 << 18): 8}, {1 + 512: 16}, {1: 24})


def test_an_entry_in_the_wrong_reverse_map_is_found_and_told(world: World) -> None:
    kvm = world.kvm
    world.access(world.vcpus[0], 0)
    sp = level(world, 1)
    rmap = kvm.memslots[0].rmap[1]
    rmap[300], _ = pte_list_add(rmap.pop(DATA), sp.hpa + 8 * 5)
    drop_spte(kvm, sp, 0)
    assert list(pte_list_entries(rmap[300])) == [sp.hpa + 8 * 5]
    assert any(isinstance(event, AuditFailed) and event.check == "rmap_remove" for event in world.events)


@pytest.mark.parametrize("enabled", [frozenset(), MEMORY_POINTS], ids=["disabled", "enabled"])
def test_memory_points_of_notifiers_and_table_writes(world: World, enabled: frozenset[Point]) -> None:
    kvm, vcpu = world.kvm, world.vcpus[0]
    world.access(vcpu, 0, write=True, value=1)
    for each in world.vcpus:
        world.exit(each)
    kvm.memory_points = enabled
    effects = list(points(kvm_mmu_notifier_change_pte(kvm, DATA, 0x500000, False)))
    assert (Point.SPTE_UPDATE in effects) is bool(enabled)
    effects = list(points(kvm_mmu_pte_write(vcpu, 19 << 12, None, 8, False)))
    assert (Point.READ_GUEST_MEMORY in effects) is bool(enabled)


@pytest.mark.parametrize("oos_shadow, unsync", [(True, 1), (False, 0)])
def test_tables_stay_write_protected_if_they_may_not_go_out_of_sync(oos_shadow: bool, unsync: int) -> None:
    world = World(vcpus=1, oos_shadow=oos_shadow)
    world.boot()
    identity_map(world)
    vcpu = world.vcpus[0]
    world.access(vcpu, frame_address(20))
    leaf_table = 6
    world.access(vcpu, frame_address(leaf_table, offset=8 * 40), write=True, value=world.gpte(leaf_table, 41))
    assert world.kvm.stat.mmu_unsync == unsync
    assert world.is_write_protected(leaf_table) is not oos_shadow
    assert world.gpte(leaf_table, 40) == world.gpte(leaf_table, 41)
