"""Interleavings of real bugs, driven step by step: a violation in linux-3.1, none with the fix (BUGS.md)."""

import pytest

from shadowmmu.kvm import (
    FaultOutcome,
    Instruction,
    MmuLock,
    Outcome,
    Point,
    host,
    kvm_mmu_page_fault,
    kvm_set_cr3,
    mmu_audit,
)
from shadowmmu.protocol.events import TlbsDirtyCleared, TlbsDirtyRaised
from tests.kvm.kit import PAGE, READ, TABLE, WRITE, World, frame_address, gva, identity_map

L3, L2, T = 17, 18, 19  # the tables of the addresses below 512 GiB
G = 40  # the frame that x maps, and that becomes a page table
X = gva(l1=9)  # T[9] maps G
Z = gva(l2=2, l1=5)  # mapped by table G, once there is an entry for it
P1, P2 = 50, 51


def world_of(profile: str) -> World:
    """Two vCPUs on the same tables; T is reached from two entries of L2."""
    world = World(2, profile)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(L2, 1, T, TABLE)
    world.set_gpte(T, 9, G)
    world.set_gpte(T, 10, 52)  # so that something is left when x's entry is gone
    world.boot()
    return world


def entry(gfn: int, bits: int = PAGE) -> int:
    return gfn << 12 | bits


def a1(profile: str) -> World:
    """A1 up to the store of vCPU 1 that must not go by."""
    world = world_of(profile)
    zero, one = world.vcpus
    world.access(one, X, write=True, value=1)  # TLB 1: x -> G, writable
    world.access(one, X + 5 * 8, write=True, value=entry(P1))  # G[5] = P1, through it
    world.access(zero, X)
    world.access(zero, frame_address(T, 9 * 8), write=True, value=entry(G))  # T is unsync from now on
    assert not world.is_write_protected(T)
    assert world.try_store(zero, frame_address(T, 9 * 8), 0)  # T[x] = 0, no exit
    world.access(zero, gva(l2=1, l1=10))  # by the other entry for T: it is synchronised, x's entry dropped
    assert any(isinstance(event, TlbsDirtyRaised) for event in world.events)
    result = world.access(zero, frame_address(L2, 2 * 8), write=True, value=entry(G, TABLE))  # L2[2] = G
    assert isinstance(result, FaultOutcome) and result.outcome is Outcome.EMULATED
    world.access(zero, Z)
    assert world.is_write_protected(G)
    return world


def test_a1_a_dropped_entry_is_not_flushed_when_its_frame_becomes_a_table() -> None:
    world = a1("linux-3.1")
    assert world.breaches() == [(1, G)]
    assert world.try_store(world.vcpus[1], X + 5 * 8, entry(P2))
    # The shadow of G is in sync, so nothing ever repairs it.
    zero = world.vcpus[0]
    world.exit(zero)
    world.run(kvm_set_cr3(zero, zero.cr3))
    assert world.kvm.memory.read((G << 12) + 5 * 8, 8) == entry(P2)
    walk = world.access(zero, Z)
    assert walk == world.kvm.memory.read(P1 << 12, 8)
    assert world.tlbs[0][Z >> 12][0] == world.kvm.host.pfn(P1)


def test_a1_fixed() -> None:
    world = a1("linux-3.1+tlbs-dirty-missed-wp")
    assert world.breaches() == []
    assert not world.try_store(world.vcpus[1], X + 5 * 8, entry(P2))
    assert any(isinstance(event, TlbsDirtyCleared) for event in world.events)
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile", ["linux-3.1", "linux-3.1+tlbs-dirty-missed-wp"])
def test_a10_a_table_is_protected_between_unlock_and_flush(profile: str) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(G, 5, P1)
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    notifier = world.start(host.unmap(world.kvm, G)).until(Point.NOTIFIER_UNLOCKED)
    world.set_gpte(L2, 2, G, TABLE)
    world.access(zero, Z)  # G, back in its frame, becomes a table
    assert world.is_write_protected(G)
    assert world.breaches() == [(1, G)]
    assert world.try_store(one, X + 5 * 8, entry(P2))
    notifier.finish()
    assert world.breaches() == []


def test_a10_fixed() -> None:
    world = world_of("linux-3.1+notifier-flush-outside-lock")
    zero, one = world.vcpus
    world.set_gpte(G, 5, P1)
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    notifier = world.start(host.unmap(world.kvm, G)).until(MmuLock.RELEASE)
    assert not world.try_store(one, X, 2)  # kicked, and its TLB is flushed when it enters again
    world.set_gpte(L2, 2, G, TABLE)
    world.access(zero, Z)
    assert world.breaches() == []
    notifier.finish()
    assert not world.try_store(one, X + 5 * 8, entry(P2))


@pytest.mark.parametrize("profile, stale", [("linux-3.1", True), ("linux-3.1+link-before-sync", False)])
def test_a2_a_page_is_linked_before_what_is_below_it_is_in_sync(profile: str, stale: bool) -> None:
    world = World(2, profile)
    identity_map(world)
    l3, table_d, t1, t2 = 17, 18, 19, 20
    world.set_gpte(world.root, 0, l3, TABLE)
    world.set_gpte(l3, 0, table_d, TABLE)
    world.set_gpte(table_d, 0, t1, TABLE)
    world.set_gpte(table_d, 1, t2, TABLE)
    world.set_gpte(t1, 0, 60)
    world.set_gpte(t2, 3, P1)
    world.kvm.memory.write(P1 << 12, 8, 111)
    world.kvm.memory.write(P2 << 12, 8, 222)
    world.boot()
    zero, one = world.vcpus
    assert world.access(zero, gva(l2=1, l1=3)) == 111
    world.enter(one)
    world.access(zero, frame_address(t2, 3 * 8), write=True, value=entry(P1))
    assert world.try_store(zero, frame_address(t2, 3 * 8), entry(P2))  # T2 is unsync: no exit
    world.access(zero, frame_address(l3, 8), write=True, value=entry(table_d, TABLE))  # a new entry of L3
    world.exit(zero)
    fault = world.run(kvm_mmu_page_fault(zero, gva(l3=1), 4, Instruction(READ, gva(l3=1), user=True)))
    assert fault.outcome is Outcome.RETRY
    # vCPU 0 has not entered the guest again; vCPU 1 uses the new link. Only P2 was ever mapped there.
    value = world.access(one, gva(l3=1, l2=1, l1=3))
    assert value == (111 if stale else 222)
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile, reached", [("linux-3.1", False), ("linux-3.1-sync-drop-noflush", True)])
def test_b2_notifiers_flush_what_a_sync_dropped(profile: str, reached: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    world.access(zero, frame_address(T, 9 * 8), write=True, value=entry(G))
    assert world.try_store(zero, frame_address(T, 9 * 8), 0)
    world.access(zero, gva(l2=1, l1=10))  # synchronises T
    assert world.kvm.tlbs_dirty == 1
    world.run(host.reclaim(world.kvm, G))
    assert world.try_store(one, X, 2) is reached


def test_a8_an_emulated_store_lets_a_fault_follow_the_wrong_table() -> None:
    """Between the store to memory and kvm_mmu_pte_write another vCPU sees the new entry above the old shadow link."""
    world = world_of("linux-3.1")
    table, other = 44, 45
    world.set_gpte(L2, 3, table, TABLE)
    world.set_gpte(table, 9, P2)
    world.set_gpte(table, 10, 52)
    world.set_gpte(other, 9, P1)
    zero, one = world.vcpus
    world.access(one, gva(l2=3, l1=10))
    address = frame_address(L2, 3 * 8)
    world.access(zero, address)
    world.exit(zero)
    store = Instruction(WRITE, address, 8, entry(other, TABLE), user=True)
    storing = world.start(kvm_mmu_page_fault(zero, address, 7, store)).until(Point.PTE_WRITE_STORED)
    world.exit(one)
    fault = Instruction(READ, gva(l2=3, l1=9), user=True)
    world.run(kvm_mmu_page_fault(one, fault.gva, 4, fault))  # walks to `other`, maps in the shadow of `table`
    storing.finish()
    (shadow,) = world.kvm.mmu_page_hash[table]
    assert not shadow.unsync
    assert (shadow.gfns[9], world.gpte(table, 9) >> 12) == (P1, P2)
    assert mmu_audit(world.kvm) == []
