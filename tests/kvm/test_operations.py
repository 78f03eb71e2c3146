"""Single operations of the model, and what each promises."""

import pytest

from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    X86_CR0_CD,
    X86_CR0_NW,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_PGE,
    X86_CR4_PSE,
)
from shadowmmu.kvm import (
    COUNTERS,
    MEMORY_POINTS,
    Backing,
    ConfigError,
    EntryStatus,
    FaultOutcome,
    HostPageLock,
    Instruction,
    InstructionKind,
    Kick,
    Kvm,
    KvmConfig,
    MemorySlot,
    MmuLock,
    NoSuchFrameError,
    Outcome,
    Point,
    PointKind,
    VcpuMode,
    emulator_write_phys,
    host,
    kvm_flush_remote_tlbs,
    kvm_mmu_change_mmu_pages,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all,
    kvm_reload_remote_mmus,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    kvm_vm_ioctl_get_dirty_log,
    page_fault,
    prefault,
    set_dirty_logging,
    set_efer,
    set_regs,
    vcpu_enter_guest,
)
from shadowmmu.kvm.errors import VcpuModeError
from shadowmmu.protocol.events import (
    DirtyLogRead,
    EmulatedStore,
    FrameBacked,
    FrameRevoked,
    GpteUpdate,
    Injected,
    ShadowPageCreated,
    ShadowPageUnsynced,
    ShadowPageZapped,
)
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


@pytest.fixture
def world() -> World:
    world = World(2)
    identity_map(world)
    world.set_gpte(world.root, 0, 17, TABLE)
    world.set_gpte(17, 0, 18, TABLE)
    world.set_gpte(18, 0, 19, TABLE)
    for index in range(16):
        world.set_gpte(19, index, 256 + index)
    world.boot()
    return world


# Entering the guest


def test_a_vcpu_starts_outside_without_paging() -> None:
    kvm = Kvm(KvmConfig((MemorySlot(0, 0, 16),)))
    vcpu = kvm.create_vcpu()
    assert (vcpu.vcpu_id, vcpu.mode, vcpu.requests) == (0, VcpuMode.OUTSIDE_GUEST_MODE, 0)
    assert kvm.create_vcpu().vcpu_id == 1
    assert not vcpu.is_paging
    assert vcpu.mmu.direct_map


def test_an_entry_loads_a_root_once_and_serves_requests(world: World) -> None:
    vcpu = world.vcpus[0]
    first = drive(vcpu_enter_guest(vcpu))
    assert (first.status, first.passes, first.root_loaded) == (EntryStatus.OK, 1, True)
    assert vcpu.mode is VcpuMode.IN_GUEST_MODE
    world.exit(vcpu)
    world.run(kvm_flush_remote_tlbs(world.kvm))
    second = drive(vcpu_enter_guest(vcpu))
    assert (second.hw_flushes, second.root_loaded, second.root) == (1, False, first.root)
    world.exit(vcpu)
    world.run(kvm_reload_remote_mmus(world.kvm))
    assert drive(vcpu_enter_guest(vcpu)).root_loaded


def test_a_vcpu_in_guest_mode_cannot_enter(world: World) -> None:
    world.enter(world.vcpus[0])
    with pytest.raises(VcpuModeError, match="vCPU 0 is IN_GUEST_MODE"):
        drive(vcpu_enter_guest(world.vcpus[0]))


def test_a_request_just_before_guest_mode_is_served_first(world: World) -> None:
    vcpu = world.vcpus[0]
    entering = world.start(vcpu_enter_guest(vcpu)).until(Point.ENTER_GUEST_REQUESTS)
    (kick,) = list(points(kvm_flush_remote_tlbs(world.kvm)))
    assert kick == Kick(())  # it is outside: nobody to wait for
    assert entering.finish().hw_flushes == 1


def test_a_flush_kicks_those_in_guest_mode_and_waits_for_exiting_ones(world: World) -> None:
    zero, one = world.vcpus
    world.enter(zero)
    world.enter(one)
    one.mode = VcpuMode.EXITING_GUEST_MODE
    assert list(points(kvm_flush_remote_tlbs(world.kvm))) == [Kick((0, 1))]
    assert zero.mode is VcpuMode.EXITING_GUEST_MODE
    assert world.kvm.stat.remote_tlb_flush == 0  # nobody said that somebody was kicked


def test_a_root_outside_of_memory_is_a_shutdown(world: World) -> None:
    vcpu = world.vcpus[0]
    drive(set_regs(vcpu, CR0, 5000 << 12, X86_CR4_PAE, EFER_64))
    assert drive(vcpu_enter_guest(vcpu)).status is EntryStatus.SHUTDOWN
    assert vcpu.mode is VcpuMode.OUTSIDE_GUEST_MODE
    assert drive(prefault(vcpu, 0)) is None


# Page faults


def test_a_fault_maps_the_page_and_its_neighbours(world: World) -> None:
    vcpu = world.vcpus[0]
    assert world.access(vcpu, gva(l1=3), write=True, value=5) == 5
    (leaf,) = world.kvm.mmu_page_hash[19]
    assert sorted(leaf.spt) == list(range(8))
    created = [event.gfn for event in world.events if isinstance(event, ShadowPageCreated)]
    assert created == [16, 17, 18, 19]


def test_the_guests_own_fault_is_injected(world: World) -> None:
    vcpu = world.vcpus[0]
    outcome = world.access(vcpu, gva(l1=100), write=True)
    assert outcome == FaultOutcome(Outcome.INJECT, inject=(PFERR_WRITE_MASK | PFERR_USER_MASK, gva(l1=100)))
    assert vcpu.cr2 == gva(l1=100)
    assert Injected(0, 6, gva(l1=100)) in world.events
    vcpu.exception = None
    world.exit(vcpu)
    assert drive(page_fault(vcpu, gva(l1=100), 0, prefault=True)) == 0
    assert vcpu.exception is None


def test_the_walk_sets_accessed_and_dirty(world: World) -> None:
    world.set_gpte(19, 0, 256, P | W | U)
    world.access(world.vcpus[0], 0, write=True)
    assert world.gpte(19, 0) == 256 << 12 | PAGE
    updates = [event for event in world.events if isinstance(event, GpteUpdate)]
    assert [(event.gpa, event.value & 0x60) for event in updates] == [(19 << 12, 0x20), (19 << 12, 0x60)]


def test_a_walk_starts_again_if_the_entry_changes_under_it(world: World) -> None:
    vcpu = world.vcpus[0]
    world.set_gpte(19, 0, 256, P | W | U)
    world.enter(vcpu)
    world.exit(vcpu)
    walking = world.start(kvm_mmu_page_fault(vcpu, 0, 4, Instruction(READ, 0, user=True))).until(
        Point.WALK_CMPXCHG
    )
    world.set_gpte(19, 0, 300, P | W | U)
    walking.finish()
    assert world.gpte(19, 0) == 300 << 12 | P | W | U | A
    assert world.access(vcpu, 0) == 0
    assert world.tlbs[0][0][0] == world.kvm.host.pfn(300)


def test_a_frame_looked_up_before_a_notifier_is_not_mapped(world: World) -> None:
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    faulting = world.start(kvm_mmu_page_fault(vcpu, 0, 4, Instruction(READ, 0, user=True))).until(
        Point.BEFORE_LOCK
    )
    old = world.kvm.host.pfn(256)
    world.run(host.reclaim(world.kvm, 256))
    assert faulting.finish().outcome is Outcome.RETRY
    assert 19 not in world.kvm.mmu_page_hash
    world.access(vcpu, 0)
    assert world.tlbs[0][0][0] not in (old, -1)


def test_a_frame_without_memory_is_mmio(world: World) -> None:
    vcpu = world.vcpus[0]
    world.set_gpte(19, 0, 1 << 20)
    for count in (1, 2):
        outcome = world.access(vcpu, 8, write=True)
        assert isinstance(outcome, FaultOutcome)
        assert (outcome.outcome, outcome.gpa) == (Outcome.MMIO, (1 << 32) + 8)
        assert world.kvm.stat.mmio_exits == count


@pytest.mark.parametrize(
    "kind, value, expected, after",
    [
        (InstructionKind.XADD, 2, 0, 0x1003),
        (InstructionKind.XCHG, 7, 0, 7),
        (InstructionKind.CMPXCHG, 7, 0x1001, 7),
        (InstructionKind.CMPXCHG, 7, 9, 0x1001),
    ],
)
def test_locked_operations(
    world: World, kind: InstructionKind, value: int, expected: int, after: int
) -> None:
    vcpu = world.vcpus[0]
    address = frame_address(17, 64)  # an upper table: stores to it are emulated
    world.kvm.memory.write((17 << 12) + 64, 8, 0x1001)
    world.access(vcpu, gva(l1=1))
    world.access(vcpu, address)
    world.exit(vcpu)
    instruction = Instruction(kind, address, 8, value, True, expected)
    outcome = world.run(kvm_mmu_page_fault(vcpu, address, 7, instruction))
    assert (outcome.outcome, outcome.value, outcome.gpa) == (Outcome.EMULATED, 0x1001, (17 << 12) + 64)
    assert world.kvm.memory.read((17 << 12) + 64, 8) == after
    assert EmulatedStore(0, (17 << 12) + 64, 8, after) in world.events
    assert world.kvm.stat.mmu_pte_write == 1


def test_a_level_one_table_that_is_written_goes_out_of_sync(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, gva(l1=1))
    world.access(vcpu, frame_address(19, 4000), write=True)
    assert [event.gfn for event in world.events if isinstance(event, ShadowPageUnsynced)] == [19]
    assert (world.kvm.stat.mmu_unsync, world.kvm.stat.mmu_unsync_highest) == (1, 1)
    assert world.run(emulator_write_phys(vcpu, 5000 << 12, 8, 1)) is False


# Registers


def test_cr3_is_refused_or_frees_the_root(world: World) -> None:
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    assert drive(kvm_set_cr3(vcpu, 5000 << 12)) is True
    assert drive(kvm_set_cr3(vcpu, 16 << 12 | 1)) is True
    assert drive(kvm_set_cr3(vcpu, 16 << 12)) is False
    assert vcpu.mmu.root_hpa != -1
    assert drive(kvm_set_cr3(vcpu, 17 << 12)) is False
    assert (vcpu.cr3, vcpu.mmu.root_hpa) == (17 << 12, -1)


def test_registers_that_select_the_mode_rebuild_the_context(world: World) -> None:
    vcpu = world.vcpus[0]
    for operation, rebuilt in (
        (kvm_set_cr0(vcpu, vcpu.cr0 | 1 << 4), False),
        (kvm_set_cr0(vcpu, vcpu.cr0 & ~X86_CR0_WP), True),
        (kvm_set_cr4(vcpu, vcpu.cr4 | X86_CR4_PGE), True),
        (kvm_set_cr4(vcpu, X86_CR4_PAE | 1 << 9), True),
        (kvm_set_cr4(vcpu, X86_CR4_PAE), False),
        (set_efer(vcpu, EFER_LME), True),
        (set_efer(vcpu, EFER_LME | 1), False),
    ):
        world.enter(vcpu)
        world.exit(vcpu)
        assert drive(operation) is False
        assert (vcpu.mmu.root_hpa == -1) is rebuilt
    assert vcpu.efer == EFER_LME | EFER_LMA | 1
    assert not vcpu.mmu.nx


def test_bad_registers_are_refused(world: World) -> None:
    vcpu = world.vcpus[0]
    assert drive(kvm_set_cr0(vcpu, X86_CR0_PG)) is True
    assert drive(kvm_set_cr0(vcpu, 1 << 32)) is True
    assert drive(kvm_set_cr0(vcpu, X86_CR0_NW | X86_CR0_PE)) is True
    assert drive(kvm_set_cr4(vcpu, X86_CR4_PSE)) is True  # long mode without PAE
    assert drive(set_efer(vcpu, EFER_NX)) is True  # LME cannot change with paging on
    assert vcpu.cr0 == CR0


def test_setting_pg_enters_long_mode_and_clearing_it_leaves() -> None:
    world = World(1)
    (vcpu,) = world.vcpus
    cr0 = X86_CR0_PG | X86_CR0_PE | X86_CR0_CD
    drive(set_efer(vcpu, EFER_LME))
    assert drive(kvm_set_cr0(vcpu, cr0)) is True  # without PAE
    drive(kvm_set_cr4(vcpu, X86_CR4_PAE))
    assert drive(kvm_set_cr0(vcpu, cr0)) is False
    assert (vcpu.efer & EFER_LMA, vcpu.mmu.context.name) == (EFER_LMA, "paging64")
    drive(kvm_set_cr0(vcpu, X86_CR0_PE))
    assert (vcpu.efer & EFER_LMA, vcpu.mmu.context.name) == (0, "nonpaging")


# The host


def test_reclaimed_pages_come_back_elsewhere_with_their_contents(world: World) -> None:
    vcpu = world.vcpus[0]
    kvm = world.kvm
    world.access(vcpu, 0, write=True, value=77)
    old = kvm.host.pfn(256)
    world.run(host.reclaim(kvm, 256))
    assert world.events[-1] == FrameRevoked(256, old)
    assert world.access(vcpu, 0) == 77
    new = kvm.host.pfn(256)
    assert new == 0x400000
    assert FrameBacked(256, new) in world.events
    assert (kvm.host.gfn_of(old), kvm.host.gfn_of(new), kvm.host.gfn_of(1)) == (256, 256, None)


def test_an_unmapped_page_comes_back_in_place(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, 0)
    pfn = world.kvm.host.pfn(256)
    unmapping = world.start(host.unmap(world.kvm, 256)).until(Point.NOTIFIER_UNLOCKED)
    world.access(world.vcpus[1], 0)  # brings it back before the notifier has returned
    unmapping.finish()
    assert FrameRevoked(256, pfn) not in world.events
    assert FrameBacked(256, pfn) in world.events


def test_a_page_is_not_changed_again_before_kvm_knows(world: World) -> None:
    kvm = world.kvm
    world.access(world.vcpus[0], 0)
    moving = world.start(host.move(kvm, 256, 0x500000, False)).until(Point.HOST_COW)
    second = world.start(host.reclaim(kvm, 256)).until(HostPageLock.BUSY)
    assert second.step() is HostPageLock.BUSY
    moving.finish()
    assert second.step() is Point.HOST_UNMAPPED
    second.finish()


def test_copy_on_write_is_broken_by_a_write_fault(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, 0)
    world.run(host.move(world.kvm, 256, 0x500000, False))
    assert world.access(vcpu, 0) == 0
    assert world.tlbs[0][0] == (0x500000, False)
    world.access(vcpu, 0, write=True, value=3)
    assert world.tlbs[0][0] == (0x400000, True)
    assert FrameRevoked(256, 0x500000) in world.events


def test_faults_wait_for_the_end_of_a_range(world: World) -> None:
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    world.exit(vcpu)
    unmapping = world.start(host.unmap_range(world.kvm, 256, 4)).until(Point.NOTIFIER_RANGE_STARTED)
    assert world.run(kvm_mmu_page_fault(vcpu, 0, 4, Instruction(READ, 0, user=True))).outcome is Outcome.RETRY
    assert 19 not in world.kvm.mmu_page_hash
    unmapping.finish()
    assert world.access(vcpu, 0) == 0


def test_frames_outside_of_memory_are_refused(world: World) -> None:
    with pytest.raises(NoSuchFrameError, match="5000"):
        drive(host.unmap(world.kvm, 5000))
    with pytest.raises(NoSuchFrameError):
        world.kvm.memory.read(5000 << 12, 8)
    with pytest.raises(ConfigError):
        drive(host.unmap_range(world.kvm, 5, 0))
    with pytest.raises(ConfigError):
        drive(kvm_mmu_change_mmu_pages(world.kvm, 63))


def test_the_dirty_log_has_what_was_written(world: World) -> None:
    vcpu, kvm = world.vcpus[0], world.kvm
    assert drive(kvm_vm_ioctl_get_dirty_log(kvm, 0)) is None
    drive(set_dirty_logging(kvm, 0, True))
    world.access(vcpu, 0, write=True)
    assert drive(kvm_vm_ioctl_get_dirty_log(kvm, 0)) == [256]
    assert DirtyLogRead(0, [256]) in world.events
    assert drive(kvm_vm_ioctl_get_dirty_log(kvm, 0)) == []
    world.exit(vcpu)
    world.access(vcpu, 0, write=True)
    assert drive(kvm_vm_ioctl_get_dirty_log(kvm, 0)) == [256]
    with pytest.raises(ConfigError):
        drive(set_dirty_logging(kvm, 3, True))


def test_a_root_in_use_is_emptied_and_given_up_at_the_next_entry(world: World) -> None:
    vcpu = world.vcpus[0]
    world.access(vcpu, 0)
    world.exit(vcpu)
    world.run(kvm_mmu_change_mmu_pages(world.kvm, 64))
    for sp in list(world.kvm.active_mmu_pages.values()):
        assert sp.root_count == (sp.level == 4)
    world.run(kvm_mmu_zap_all(world.kvm))
    (root,) = world.kvm.active_mmu_pages.values()
    assert root.invalid
    assert ShadowPageZapped(root.serial, 16, True) in world.events
    assert world.access(vcpu, 0) == 0
    assert root.hpa not in world.kvm.page_header


# Points and effects


def test_memory_points_are_yielded_only_when_enabled(world: World) -> None:
    vcpu = world.vcpus[0]
    drive(vcpu_enter_guest(vcpu))
    fault = Instruction(READ, 0, user=True)
    effects = list(points(kvm_mmu_page_fault(vcpu, 0, 4, fault)))
    assert not any(isinstance(e, Point) and e.kind is PointKind.MEMORY for e in effects)
    assert effects[-1] is MmuLock.RELEASE
    world.kvm.memory_points = MEMORY_POINTS
    effects = list(points(kvm_mmu_page_fault(vcpu, gva(l1=9), 4, Instruction(READ, gva(l1=9), user=True))))
    assert effects.count(Point.READ_GUEST_MEMORY) >= 8  # four levels walked, four read again
    assert Point.GPTE_READ in effects
    with pytest.raises(ConfigError, match="BEFORE_LOCK"):
        world.kvm.memory_points = frozenset({Point.BEFORE_LOCK})


def test_the_steps_of_a_page_fault(world: World) -> None:
    vcpu = world.vcpus[0]
    drive(vcpu_enter_guest(vcpu))
    effects = list(points(kvm_mmu_page_fault(vcpu, 0, 4, Instruction(READ, 0, user=True))))
    assert effects == [
        Point.WALK_LEVEL,
        Point.WALK_LEVEL,
        Point.WALK_LEVEL,
        Point.WALK_DONE,
        Point.GFN_TO_PFN,
        Point.BEFORE_LOCK,
        MmuLock.ACQUIRE,
        MmuLock.RELEASE,
    ]


# Configuration and memory


@pytest.mark.parametrize(
    "config",
    [
        KvmConfig(()),
        KvmConfig((MemorySlot(0, 0, 0),)),
        KvmConfig((MemorySlot(0, 0, 5), MemorySlot(0, 8, 5))),
        KvmConfig((MemorySlot(0, 0, 5), MemorySlot(1, 4, 5))),
        KvmConfig((MemorySlot(0, 0, 5),), n_max_mmu_pages=5),
        KvmConfig((MemorySlot(0, 0, 5),), host_phys_bits=36),
        KvmConfig((MemorySlot(0, 0, 5),), guest_maxphyaddr=60),
    ],
)
def test_impossible_machines_are_refused(config: KvmConfig) -> None:
    with pytest.raises(ConfigError):
        Kvm(config)


def test_guest_memory_records_changed_words() -> None:
    memory = Kvm(KvmConfig((MemorySlot(0, 2, 2, Backing.THP), MemorySlot(4, 8, 1)))).memory
    memory.write(2 << 12, 8, 1)
    assert memory.take_changes() == []
    memory.start_recording()
    memory.write((2 << 12) + 6, 4, 0xAABBCCDD)
    memory.write(8 << 12, 1, 0)
    assert memory.take_changes() == [(2 << 12, 0xCCDD << 48 | 1), ((2 << 12) + 8, 0xAABB)]
    assert memory.read((2 << 12) + 6, 4) == 0xAABBCCDD
    assert memory.take_changes() == []


def test_the_counters_are_those_of_the_recordings(world: World) -> None:
    assert set(world.kvm.stat.counters()) == set(COUNTERS)
    assert len(COUNTERS) == 16
