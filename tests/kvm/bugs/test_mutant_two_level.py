"""Guests of 32-bit paging, whose tables take several shadow pages, as Linux 3.1 with one fix less: B14, B29."""

from shadowmmu.kvm import kvm_mmu_invlpg, kvm_set_cr3, mmu_audit
from shadowmmu.protocol.events import AuditFailed
from tests.kvm.bugs.kit_mutants import (
    LARGE,
    P1,
    P2,
    P3,
    TwoLevelWorld,
    address32,
    entry,
    with_and_without,
    world_of,
)
from tests.kvm.kit import PAGE, gva

T = 19
LOW, HIGH = 5, 512 + 5  # entries of T at the same place in its two shadow pages
ROOT_INDEX = 2
LARGE_PAGE = 1024  # the first frame of a page of 4 MiB


def two_level_world(profile: str, low: int, high: int) -> TwoLevelWorld:
    """One vCPU that has used both entries; T is unsync."""
    world = TwoLevelWorld(1, profile)
    world.set_gpte(world.root, ROOT_INDEX, T)
    world.set_gpte(T, LOW, low)
    world.set_gpte(T, HIGH, high)
    world.boot()
    (zero,) = world.vcpus
    for index in (LOW, HIGH):
        world.access(zero, address32(ROOT_INDEX, index))
    world.store_entry(zero, T, 100, 0)
    return world


@with_and_without("direct-gfn")
def test_b14_the_second_half_of_a_large_page_has_a_direct_page_of_its_own(profile: str, broken: bool) -> None:
    world = TwoLevelWorld(1, profile)
    world.set_gpte(world.root, ROOT_INDEX, LARGE_PAGE, PAGE | LARGE)
    world.boot()
    (zero,) = world.vcpus
    world.kvm.memory.write(LARGE_PAGE + 8 << 12, 8, 111)
    world.kvm.memory.write(LARGE_PAGE + 512 + 8 << 12, 8, 222)
    world.access(zero, address32(ROOT_INDEX, 512 + 9))  # prefetches its neighbour
    assert world.access(zero, address32(ROOT_INDEX, 512 + 8)) == (111 if broken else 222)
    assert any(isinstance(event, AuditFailed) for event in world.events) is broken
    assert (mmu_audit(world.kvm) != []) is broken


@with_and_without("direct-gfn")
def test_b14_each_2_mib_of_a_1_gib_page_has_a_direct_page_of_its_own(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(17, 1, 0, PAGE | LARGE)  # the first GiB
    world.kvm.memory.write(8 << 12, 8, 111)
    world.kvm.memory.write(512 + 8 << 12, 8, 222)
    world.access(zero, gva(l3=1, l2=1, l1=9))
    assert world.access(zero, gva(l3=1, l2=1, l1=8)) == (111 if broken else 222)
    assert (mmu_audit(world.kvm) != []) is broken


@with_and_without("quadrant")
def test_b29_a_table_write_changes_one_half_only(profile: str, broken: bool) -> None:
    world = two_level_world(profile, P1, P2)
    (zero,) = world.vcpus
    world.exit(zero)
    world.run(kvm_mmu_invlpg(zero, address32(ROOT_INDEX, LOW)))
    assert world.access(zero, address32(ROOT_INDEX, LOW)) == 111
    assert world.access(zero, address32(ROOT_INDEX, HIGH)) == (111 if broken else 222)


@with_and_without("quadrant-sync")
def test_b29_the_upper_half_is_synchronised_with_its_own_entries(profile: str, broken: bool) -> None:
    world = two_level_world(profile, P2, P2)
    (zero,) = world.vcpus
    world.store_entry(zero, T, HIGH, entry(P3))
    world.exit(zero)
    world.run(kvm_set_cr3(zero, zero.cr3))
    assert world.access(zero, address32(ROOT_INDEX, HIGH)) == (222 if broken else 333)


@with_and_without("quadrant-invlpg")
def test_b29_invlpg_without_the_quadrant_only_maps_later(profile: str, broken: bool) -> None:
    world = two_level_world(profile, P1, P2)
    (zero,) = world.vcpus
    world.store_entry(zero, T, HIGH, entry(P3))
    world.exit(zero)
    world.run(kvm_mmu_invlpg(zero, address32(ROOT_INDEX, HIGH)))
    upper = next(sp for sp in world.kvm.mmu_page_hash[T] if sp.quadrant)
    assert (LOW not in upper.spt) is broken
    assert world.access(zero, address32(ROOT_INDEX, LOW)) == 111
    assert world.access(zero, address32(ROOT_INDEX, HIGH)) == 333
    assert mmu_audit(world.kvm) == []
