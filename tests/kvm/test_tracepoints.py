"""The kernel's tracepoints: hit where the kernel has them, with what the kernel shows."""

from __future__ import annotations

import pytest

from shadowmmu.cpu.x86 import EFER_NX, PFERR_PRESENT_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK, X86_CR4_PAE
from shadowmmu.kvm import (
    AuditPoint,
    FaultOutcome,
    Outcome,
    Point,
    ShadowPage,
    emulator_write_phys,
    kvm_mmu_notifier_change_pte,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_notifier_invalidate_page,
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_mmu_notifier_test_young,
    kvm_set_cr3,
    set_regs,
)
from shadowmmu.kvm.constants import ACC_USER_MASK, ACC_WRITE_MASK
from shadowmmu.kvm.walker import walk_addr
from shadowmmu.protocol.events import GpteUpdate, ShadowPageCreated
from tests.kvm.kit import (
    CR0,
    EFER_64,
    PAGE,
    TABLE,
    A,
    D,
    P,
    U,
    W,
    World,
    drive,
    frame_address,
    gva,
    identity_map,
)

Hit = tuple[str | int | bool, ...]

DEVICE = 5000
"""A guest frame that no slot holds."""


class Hits:
    """Notes every tracepoint: its name and its arguments."""

    def __init__(self, world: World) -> None:
        self.seen: list[Hit] = []
        world.kvm.tracepoints = self

    def named(self, *names: str) -> list[Hit]:
        return [hit for hit in self.seen if hit[0] in names]

    def kvm_mmu_pagetable_walk(self, vcpu_id: int, addr: int, pferr: int) -> None:
        self.seen.append(("walk", vcpu_id, addr, pferr))

    def kvm_mmu_paging_element(self, vcpu_id: int, pte: int, level: int) -> None:
        self.seen.append(("element", vcpu_id, pte, level))

    def kvm_mmu_set_accessed_bit(self, vcpu_id: int, gpa: int) -> None:
        self.seen.append(("accessed", vcpu_id, gpa))

    def kvm_mmu_set_dirty_bit(self, vcpu_id: int, gpa: int) -> None:
        self.seen.append(("dirty", vcpu_id, gpa))

    def kvm_mmu_walker_error(self, vcpu_id: int, pferr: int) -> None:
        self.seen.append(("error", vcpu_id, pferr))

    def handle_mmio_page_fault(self, vcpu_id: int, addr: int, gfn: int, access: int) -> None:
        self.seen.append(("mmio fault", vcpu_id, addr, gfn, access))

    def kvm_mmu_get_page(self, sp: ShadowPage, *, created: bool) -> None:
        self.seen.append(("page", sp.serial, created))

    def mark_mmio_spte(self, sptep: int, gfn: int, access: int) -> None:
        self.seen.append(("mmio entry", sptep, gfn, access))

    def kvm_mmu_audit(self, cpu: int, point: AuditPoint) -> None:
        self.seen.append(("audit", cpu, point.value))

    def kvm_age_page(self, hva: int, gfn: int, *, referenced: bool) -> None:
        self.seen.append(("age", hva, gfn, referenced))


@pytest.fixture
def world() -> World:
    world = World()
    identity_map(world)
    world.boot()
    return world


def elements(world: World, vcpu: int, entries: list[tuple[int, int]]) -> list[Hit]:
    """Of a walk that reads these (table, index), top down."""
    return [("element", vcpu, world.gpte(*entry), 4 - depth) for depth, entry in enumerate(entries)]


def test_a_walk_shows_every_entry_that_it_reads(world: World) -> None:
    hits = Hits(world)
    world.access(world.vcpus[1], frame_address(9))
    assert hits.named("walk", "element") == [
        ("walk", 1, frame_address(9), PFERR_USER_MASK),
        *elements(world, 1, [(world.root, 1), (4, 0), (5, 0), (6, 9)]),
    ]


def test_it_shows_the_address_of_each_bit_that_it_sets(world: World) -> None:
    world.set_gpte(5, 0, 6, P | W | U)
    world.set_gpte(6, 9, 9, P | W | U)
    hits = Hits(world)
    world.events.clear()
    world.access(world.vcpus[0], frame_address(9), write=True)
    assert hits.named("accessed", "dirty") == [
        ("accessed", 0, 5 << 12),
        ("accessed", 0, (6 << 12) + 72),
        ("dirty", 0, (6 << 12) + 72),
    ]
    updates = [(event.vcpu, event.gpa) for event in world.events if isinstance(event, GpteUpdate)]
    assert updates == [hit[1:] for hit in hits.named("accessed", "dirty")]
    assert world.gpte(6, 9) == 9 << 12 | PAGE


def test_a_walk_that_starts_again_shows_its_entries_again(world: World) -> None:
    world.set_gpte(6, 9, 9, P | U | D)
    hits = Hits(world)
    walk = world.start(walk_addr(world.vcpus[0], frame_address(9), PFERR_USER_MASK)).until(Point.WALK_CMPXCHG)
    world.set_gpte(6, 9, 10, P | U | A | D)
    walk.finish()
    assert len(hits.named("walk")) == 1
    assert [hit[3] for hit in hits.named("element")] == [4, 3, 2, 1, 4, 3, 2, 1]
    assert hits.named("accessed") == [("accessed", 0, (6 << 12) + 72)]


def test_pdptes_are_entries_of_level_three() -> None:
    world = World(1)
    for index in range(4):
        world.set_gpte(world.root, index, 20 + index, P)
    world.set_gpte(21, 0, 30, TABLE)
    world.set_gpte(30, 1, 40)
    drive(set_regs(world.vcpus[0], CR0, world.root << 12, X86_CR4_PAE, EFER_NX))
    hits = Hits(world)
    drive(walk_addr(world.vcpus[0], 1 << 30 | 1 << 12, 0))
    assert hits.named("element") == [
        ("element", 0, 21 << 12 | P, 3),
        ("element", 0, 30 << 12 | TABLE, 2),
        ("element", 0, 40 << 12 | PAGE, 1),
    ]


def test_a_walk_that_the_tables_do_not_allow_ends_with_the_error_code(world: World) -> None:
    world.set_gpte(6, 9, 9, P | U | A)
    hits = Hits(world)
    world.access(world.vcpus[0], frame_address(9), write=True)
    world.access(world.vcpus[0], gva(l4=2))
    assert hits.named("error") == [
        ("error", 0, PFERR_PRESENT_MASK | PFERR_WRITE_MASK | PFERR_USER_MASK),
        ("error", 0, PFERR_USER_MASK),
    ]


def test_a_page_is_made_once_and_found_by_the_next(world: World) -> None:
    hits = Hits(world)
    world.access(world.vcpus[0], frame_address(9))
    made = [event.sp for event in world.events if isinstance(event, ShadowPageCreated)]
    assert hits.named("page") == [("page", serial, True) for serial in made]
    hits.seen.clear()
    world.enter(world.vcpus[1])
    assert hits.named("page") == [("page", made[0], False)]


def test_a_page_fault_may_be_audited_before_and_after(world: World) -> None:
    world.enter(world.vcpus[1])
    hits = Hits(world)
    world.access(world.vcpus[1], frame_address(9))
    assert hits.named("audit") == [
        ("audit", 1, "pre page fault"),
        ("audit", 1, "post page fault"),
    ]


def test_a_table_write_may_be_audited_before_and_after(world: World) -> None:
    world.access(world.vcpus[0], frame_address(9))
    hits = Hits(world)
    world.run(emulator_write_phys(world.vcpus[0], 6 << 12, 8, 7 << 12 | PAGE))
    assert hits.named("audit") == [("audit", 0, "pre pte write"), ("audit", 0, "post pte write")]


@pytest.mark.parametrize("pae", [False, True])
def test_synchronising_the_roots_may_be_audited_before_and_after(pae: bool) -> None:
    world = World(1)
    identity_map(world)
    world.set_gpte(world.root, 0, 20, P)
    efer = EFER_NX if pae else EFER_64
    drive(set_regs(world.vcpus[0], CR0, world.root << 12, X86_CR4_PAE, efer))
    world.enter(world.vcpus[0])
    world.exit(world.vcpus[0])
    hits = Hits(world)
    world.run(kvm_set_cr3(world.vcpus[0], world.root << 12))
    world.enter(world.vcpus[0])
    assert hits.named("audit") == [("audit", 0, "pre sync"), ("audit", 0, "post sync")]


def is_mmio(outcome: FaultOutcome | int) -> bool:
    return isinstance(outcome, FaultOutcome) and outcome.outcome is Outcome.MMIO


def test_a_frame_without_memory_gets_an_entry_and_its_faults_are_known_by_it(world: World) -> None:
    world.set_gpte(6, 9, DEVICE, P | U | A | D)
    hits = Hits(world)
    assert is_mmio(world.access(world.vcpus[0], frame_address(9)))
    leaf = next(sp for sp in world.kvm.page_header.values() if sp.gfn == 6)
    assert hits.named("mmio entry") == [("mmio entry", leaf.hpa + 72, DEVICE, ACC_USER_MASK)]
    assert not hits.named("mmio fault")
    assert is_mmio(world.access(world.vcpus[1], frame_address(9)))
    assert hits.named("mmio fault") == [("mmio fault", 1, frame_address(9), DEVICE, ACC_USER_MASK)]


def test_synchronising_its_table_sets_the_entry_again(world: World) -> None:
    vcpu = world.vcpus[0]
    world.set_gpte(6, 9, DEVICE, P | U | A | D)
    world.access(vcpu, frame_address(9))
    world.access(
        vcpu, frame_address(6, 72), write=True, value=DEVICE << 12 | PAGE
    )  # the table goes out of sync
    world.exit(vcpu)
    hits = Hits(world)
    world.run(kvm_set_cr3(vcpu, world.root << 12))
    world.enter(vcpu)
    (leaf,) = world.kvm.mmu_page_hash[6]
    assert hits.named("mmio entry") == [("mmio entry", leaf.hpa + 72, DEVICE, ACC_USER_MASK | ACC_WRITE_MASK)]


def test_notifiers_show_whether_the_page_was_used(world: World) -> None:
    world.access(world.vcpus[0], frame_address(9))
    world.exit(world.vcpus[0])
    hits = Hits(world)
    kvm = world.kvm
    for operation in (
        kvm_mmu_notifier_test_young(kvm, 9),
        kvm_mmu_notifier_clear_flush_young(kvm, 9),
        kvm_mmu_notifier_test_young(kvm, 9),
        kvm_mmu_notifier_invalidate_page(kvm, 9),
        kvm_mmu_notifier_invalidate_page(kvm, 9),
        kvm_mmu_notifier_invalidate_page(kvm, DEVICE),
    ):
        world.run(operation)
    assert [hit[3] for hit in hits.named("age")] == [True, True, False, True, False]
    assert {hit[:3] for hit in hits.named("age")} == {("age", 9 << 12, 9)}


def test_a_change_of_the_frame_counts_as_no_use(world: World) -> None:
    world.access(world.vcpus[0], frame_address(9))
    world.exit(world.vcpus[0])
    hits = Hits(world)
    world.run(kvm_mmu_notifier_change_pte(world.kvm, 9, 9, writable=False))
    assert hits.named("age") == [("age", 9 << 12, 9, False)]


def test_a_range_shows_each_of_its_pages(world: World) -> None:
    for frame in (9, 11):
        world.access(world.vcpus[0], frame_address(frame))
    world.exit(world.vcpus[0])
    world.run(kvm_mmu_notifier_invalidate_page(world.kvm, 10))  # was prefetched
    hits = Hits(world)
    world.run(kvm_mmu_notifier_invalidate_range_start(world.kvm, range(9, 12)))
    world.run(kvm_mmu_notifier_invalidate_range_end(world.kvm))
    assert hits.named("age") == [
        ("age", 9 << 12, 9, True),
        ("age", 10 << 12, 10, False),
        ("age", 11 << 12, 11, True),
    ]


def test_nothing_is_told_without_somebody_to_tell(world: World) -> None:
    hits = Hits(world)
    world.access(world.vcpus[0], frame_address(9))
    told = len(hits.seen)
    world.kvm.tracepoints = None
    world.access(world.vcpus[0], frame_address(30), write=True)
    assert len(hits.seen) == told
