"""Memory slots that come, move and go."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.conform.hardware import Fault
from shadowmmu.kvm import (
    Backing,
    ConfigError,
    FaultOutcome,
    Instruction,
    MemorySlot,
    MmuLock,
    Operation,
    Outcome,
    Point,
    SlotsLock,
    Srcu,
    Vcpu,
    host,
    kvm_mmu_page_fault,
    kvm_set_memory_region,
    kvm_vm_ioctl_get_dirty_log,
    mmu_audit,
    set_dirty_logging,
    vcpu_enter_guest,
)
from shadowmmu.protocol.events import AuditFailed, FrameRevoked
from tests.kvm.kit import PAGE, READ, TABLE, World, drive, gva, points

RAM, BASE, OTHER, PAGES = 64, 64, 72, 16
SLOT = MemorySlot(1, BASE, PAGES)
GONE = MemorySlot(1, BASE, 0)
MOVED = MemorySlot(1, OTHER, PAGES)
L3, L2, T = 17, 18, 19


def address(gfn: int) -> int:
    """Where the guest maps a frame of RAM or beyond."""
    return gva(l1=gfn)


def world_of(profile: str = "fixed", vcpus: int = 2) -> World:
    """RAM of 64 frames; the guest maps 96 frames one to one."""
    world = World(vcpus, profile, npages=RAM)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    for gfn in range(96):
        world.set_gpte(T, gfn, gfn)
    world.boot()
    return world


def set_region(world: World, region: MemorySlot, log: bool | None = None) -> Any:
    return world.run(kvm_set_memory_region(world.kvm, region, log))


def is_mmio(result: FaultOutcome | int) -> bool:
    return isinstance(result, FaultOutcome) and result.outcome is Outcome.MMIO


# What the guest sees


def test_frames_are_memory_while_there_is_a_slot_and_mmio_before_and_after() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    assert is_mmio(world.access(vcpu, address(70), write=True, value=1))
    set_region(world, SLOT)
    assert world.access(vcpu, address(70)) == 0
    assert world.access(vcpu, address(70), write=True, value=2) == 2
    assert world.access(vcpu, address(70)) == 2
    set_region(world, GONE)
    assert is_mmio(world.access(vcpu, address(70)))
    assert mmu_audit(world.kvm) == []


def test_contents_and_host_frames_go_with_a_slot_that_moves() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    set_region(world, SLOT)
    world.access(vcpu, address(BASE + 10), write=True, value=5)
    pfn = world.kvm.host.pfn(BASE + 10)
    set_region(world, MOVED)
    assert is_mmio(world.access(vcpu, address(BASE)))
    assert world.access(vcpu, address(OTHER + 10)) == 5
    assert world.kvm.host.pfn(OTHER + 10) == pfn
    assert world.kvm.host.gfn_of(pfn) == OTHER + 10
    assert mmu_audit(world.kvm) == []


def test_the_host_knows_all_memory_that_was_ever_behind_a_slot() -> None:
    world = world_of()
    set_region(world, SLOT)
    gone = set_region(world, GONE)
    set_region(world, MOVED)
    world.run(host.munmap(world.kvm, gone))
    memories = world.kvm.host.memories
    assert [(memory.base_gfn, memory.mapped) for memory in memories] == [
        (0, True),
        (BASE, False),
        (OTHER, True),
    ]
    assert all(one.end <= next_one.base for one, next_one in pairwise(memories))


def test_a_new_slot_has_frames_that_nobody_had() -> None:
    world = world_of()
    used: set[int] = set()
    for _ in range(3):
        set_region(world, SLOT)
        frames = {world.kvm.host.pfn(gfn) for gfn in range(BASE, BASE + PAGES)}
        assert not frames & used
        assert not frames & {world.kvm.host.pfn(gfn) for gfn in range(RAM)}
        assert world.access(world.vcpus[0], address(BASE)) == 0
        world.access(world.vcpus[0], address(BASE), write=True, value=1)
        used |= frames
        world.run(host.reclaim(world.kvm, BASE))
        world.access(world.vcpus[0], address(BASE))
        used.add(world.kvm.host.pfn(BASE))
        world.run(host.munmap(world.kvm, set_region(world, GONE)))


def test_unmapping_the_memory_of_a_deleted_slot_revokes_its_frames() -> None:
    world = world_of()
    set_region(world, SLOT)
    pfns = [world.kvm.host.pfn(gfn) for gfn in range(BASE, BASE + PAGES)]
    slot = set_region(world, GONE)
    world.run(host.munmap(world.kvm, slot))
    assert [event.pfn for event in world.events if isinstance(event, FrameRevoked)] == pfns
    assert world.kvm.host.gfn_of(pfns[3]) == BASE + 3
    assert world.kvm.host.deviations() == []


def test_a_root_in_a_deleted_slot_is_a_triple_fault() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    world.enter(vcpu)
    set_region(world, MemorySlot(1, 128, PAGES))  # so that RAM is not the last slot
    set_region(world, MemorySlot(0, 0, 0))
    world.exit(vcpu)
    assert world.run(vcpu_enter_guest(vcpu)).status.value == "shutdown"
    assert mmu_audit(world.kvm) == []


# What is refused


@pytest.mark.parametrize(
    "region, text",
    [
        (MemorySlot(32, 512, 1), "no memory slot 32"),
        (MemorySlot(2, RAM - 1, 2), "overlap memory slot 0"),
        (MemorySlot(1, 60, PAGES), "overlap memory slot 0"),
        (MemorySlot(2, 512, 0), "no memory slot 2 to delete"),
        (MemorySlot(1, BASE, PAGES + 1), "cannot be resized"),
        (MemorySlot(1, BASE, PAGES, Backing.THP), "memory cannot be changed"),
        (MemorySlot(1, 512, PAGES), "large pages would lie otherwise"),
        (MemorySlot(2, 1 << 24, 1), "beyond 36 bits"),
        (MemorySlot(2, -1, 1), "negative"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(region: MemorySlot, text: str) -> None:
    world = world_of()
    set_region(world, SLOT)
    before = (world.kvm.memslots, world.kvm.memslots_generation)
    with pytest.raises(ConfigError, match=text):
        set_region(world, region)
    assert (world.kvm.memslots, world.kvm.memslots_generation) == before
    set_region(world, GONE)  # slots_lock is free


def test_the_last_slot_stays() -> None:
    with pytest.raises(ConfigError, match="last memory slot"):
        set_region(world_of(), MemorySlot(0, 0, 0))


# Dirty logging


def test_a_dirty_log_moves_with_its_slot_and_ends_with_it() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    set_region(world, SLOT, True)
    world.access(vcpu, address(BASE + 9), write=True, value=1)
    set_region(world, MOVED)
    assert world.run(kvm_vm_ioctl_get_dirty_log(world.kvm, 1)) == [OTHER + 9]
    world.access(vcpu, address(OTHER + 9), write=True, value=2)
    assert world.run(kvm_vm_ioctl_get_dirty_log(world.kvm, 1)) == [OTHER + 9]
    set_region(world, MOVED, False)
    assert world.run(kvm_vm_ioctl_get_dirty_log(world.kvm, 1)) is None


# Order


def test_deleting_waits_for_readers_twice_and_flushes_in_between() -> None:
    world = world_of()
    set_region(world, SLOT)
    world.access(world.vcpus[0], address(BASE))
    world.exit(world.vcpus[0])
    effects = [
        effect
        for effect in points(kvm_set_memory_region(world.kvm, GONE))
        if isinstance(effect, Srcu | MmuLock)
        or effect in (Point.MEMSLOT_INVALID, Point.FLUSH_SHADOW_ZAPPED, Point.MEMSLOT_PUBLISHED)
    ]
    lock = [MmuLock.ACQUIRE, MmuLock.RELEASE]
    assert effects == [
        Srcu.SYNCHRONIZE,
        Point.MEMSLOT_INVALID,
        *lock,
        Point.FLUSH_SHADOW_ZAPPED,
        Srcu.SYNCHRONIZE,
        Point.MEMSLOT_PUBLISHED,
        *lock,
    ]


def test_the_frames_of_an_invalid_slot_are_not_mapped() -> None:
    world = world_of()
    vcpu = world.vcpus[0]
    set_region(world, SLOT)
    deleting = world.start(kvm_set_memory_region(world.kvm, GONE)).until(Srcu.SYNCHRONIZE)
    assert is_mmio(world.access(vcpu, address(BASE)))
    deleting.finish()
    assert mmu_audit(world.kvm) == []


def test_a_fault_that_found_its_frame_before_is_why_deleting_waits() -> None:
    """With the wait cut short the frame is mapped after the flush."""
    world = world_of()
    zero = world.vcpus[0]
    set_region(world, SLOT)
    world.access(zero, address(1))
    world.exit(zero)
    fault = Instruction(READ, address(BASE), user=True)
    faulting = world.start(kvm_mmu_page_fault(zero, fault.gva, 4, fault)).until(Point.BEFORE_LOCK)
    deleting = world.start(kvm_set_memory_region(world.kvm, GONE)).until(Srcu.SYNCHRONIZE)
    while deleting.step() is not Point.FLUSH_SHADOW_ZAPPED:
        pass
    faulting.finish()
    assert any(sp.slot_bitmap & 1 << SLOT.id for sp in world.kvm.active_mmu_pages.values())


def test_one_operation_at_a_time_changes_slots() -> None:
    world = world_of()
    creating = world.start(kvm_set_memory_region(world.kvm, SLOT)).until(Srcu.SYNCHRONIZE)
    logging = world.start(set_dirty_logging(world.kvm, 1, True)).until(SlotsLock.BUSY)
    assert logging.step() is SlotsLock.BUSY
    creating.finish()
    logging.finish()
    assert world.run(kvm_vm_ioctl_get_dirty_log(world.kvm, 1)) == []


# Bugs


@pytest.mark.parametrize("profile, reached", [("linux-3.1", False), ("linux-3.1-memslot-delete-flush", True)])
def test_b25_the_shadow_is_flushed_when_a_slot_is_deleted(profile: str, reached: bool) -> None:
    world = world_of(profile)
    set_region(world, SLOT)
    one = world.vcpus[1]
    world.access(one, address(BASE + 2), write=True, value=1)
    slot = set_region(world, GONE)
    world.run(host.munmap(world.kvm, slot))
    assert any(isinstance(event, FrameRevoked) for event in world.events)
    world.enter(one)
    assert (not isinstance(world.translate(one, address(BASE + 2)), Fault)) is reached
    assert (mmu_audit(world.kvm) != []) is reached


@pytest.mark.parametrize("profile, reached", [("linux-3.1", True), ("linux-3.1+gpa-base-change", False)])
def test_a14_a_slot_that_moves_leaves_its_mappings_behind(profile: str, reached: bool) -> None:
    world = world_of(profile)
    set_region(world, SLOT)
    one = world.vcpus[1]
    world.access(one, address(BASE + 2), write=True, value=1)
    moving = world.start(kvm_set_memory_region(world.kvm, MOVED)).until(Point.MEMSLOT_PUBLISHED)
    assert world.kvm.gfn_to_memslot(BASE + 2) is None
    assert world.try_store(one, address(BASE + 2), 7) is reached
    assert (world.kvm.memory.read(OTHER + 2 << 12, 8) == 7) is reached  # nothing is mapped there for it
    moving.finish()
    # The kernel stops at the first of these; the model says so, and cleans up.
    assert any(isinstance(event, AuditFailed) for event in world.events) is reached
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile, lost", [("linux-3.1", True), ("linux-3.1+stale-mmio-cache", False)])
def test_a12_an_emulated_store_to_new_memory_is_taken_for_mmio(profile: str, lost: bool) -> None:
    world = world_of(profile)
    vcpu = world.vcpus[0]
    assert is_mmio(world.access(vcpu, address(BASE + 2), write=True, value=1))
    set_region(world, SLOT)
    world.set_gpte(L3, 1, BASE + 2, TABLE)  # the frame becomes a table of level 2: stores to it are emulated
    world.set_gpte(BASE + 2, 0, 5, TABLE)
    world.set_gpte(5, 0, 6)
    world.access(vcpu, gva(l3=1))
    result = world.access(vcpu, address(BASE + 2) + 8, write=True, value=6 << 12 | PAGE)
    assert isinstance(result, FaultOutcome)
    assert is_mmio(result) is lost
    assert (world.gpte(BASE + 2, 1) == 0) is lost


# Any order


CHANGE: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("access"), st.integers(0, 1), st.integers(RAM - 4, 95), st.booleans()),
    st.tuples(st.just("access"), st.integers(0, 1), st.integers(RAM - 4, 95), st.booleans()),
    st.tuples(st.just("place"), st.sampled_from((1, 2)), st.sampled_from((64, 72, 80)), st.booleans()),
    st.tuples(st.just("delete"), st.sampled_from((1, 2)), st.booleans()),
    st.tuples(st.just("log"), st.sampled_from((0, 1, 2)), st.booleans()),
    st.tuples(st.just("read_log"), st.sampled_from((0, 1, 2))),
    st.tuples(st.just("table"), st.integers(RAM - 4, 95)),
    st.tuples(st.just("host"), st.sampled_from(("unmap", "reclaim")), st.integers(RAM - 4, 95)),
)


class Sequence:
    """Changes of slots and accesses, one after another; a dictionary says what memory holds."""

    def __init__(self) -> None:
        self.world = world_of()
        self.stores = 0
        self.expected: dict[tuple[int, int], int] = {}  # by slot and page in it

    def _attempt(self, operation: Operation[Any]) -> Any:
        try:
            return drive(operation)
        except ConfigError:
            return None

    def access(self, number: int, gfn: int, write: bool) -> None:
        world = self.world
        vcpu: Vcpu = world.vcpus[number]
        slot = world.kvm.gfn_to_memslot(gfn)
        self.stores += 1
        result = world.access(vcpu, address(gfn) + 8, write, self.stores)
        assert is_mmio(result) is (slot is None)
        if slot is None:
            return
        place = (slot.id, gfn - slot.base_gfn)
        if write:
            self.expected[place] = self.stores
        elif not isinstance(result, FaultOutcome):
            assert result == self.expected.get(place, 0)

    def place(self, slot_id: int, base: int, log: bool) -> None:
        self._attempt(kvm_set_memory_region(self.world.kvm, MemorySlot(slot_id, base, 8), log))

    def delete(self, slot_id: int, unmap: bool) -> None:
        slot = self._attempt(kvm_set_memory_region(self.world.kvm, MemorySlot(slot_id, 0, 0)))
        if slot is None:
            return
        self.expected = {place: value for place, value in self.expected.items() if place[0] != slot_id}
        if unmap:
            drive(host.munmap(self.world.kvm, slot))

    def log(self, slot_id: int, enable: bool) -> None:
        self._attempt(set_dirty_logging(self.world.kvm, slot_id, enable))

    def read_log(self, slot_id: int) -> None:
        self._attempt(kvm_vm_ioctl_get_dirty_log(self.world.kvm, slot_id))

    def table(self, gfn: int) -> None:
        """The frame is shadowed as a page table, through vCPU 0."""
        self.world.set_gpte(L2, 1, gfn, TABLE)
        self.world.access(self.world.vcpus[0], gva(l2=1, l1=300))

    def host(self, what: str, gfn: int) -> None:
        operations: dict[str, Callable[..., Operation[None]]] = {"unmap": host.unmap, "reclaim": host.reclaim}
        if self.world.kvm.gfn_to_memslot(gfn) is not None:
            self.world.run(operations[what](self.world.kvm, gfn))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(CHANGE, min_size=20, max_size=80))
def test_any_sequence_of_changes_leaves_memory_and_structures_in_order(steps: list[tuple[Any, ...]]) -> None:
    sequence = Sequence()
    for name, *arguments in steps:
        getattr(sequence, name)(*arguments)
        assert mmu_audit(sequence.world.kvm) == []
