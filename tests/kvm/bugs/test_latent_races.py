"""Two at once: A4, A8, A13, C1 and C2, and the other fix of A1 (sync-flush-now), driven step by step."""

import pytest

from shadowmmu.kvm import (
    FaultOutcome,
    HostPageLock,
    Instruction,
    Kvm,
    MmuLock,
    Operation,
    Outcome,
    Point,
    host,
    kvm_mmu_invlpg,
    kvm_mmu_page_fault,
    kvm_set_cr3,
    kvm_vm_ioctl_get_dirty_log,
    mmu_audit,
    set_dirty_logging,
)
from shadowmmu.kvm.roots import mmu_free_roots
from shadowmmu.machine.operations import HostResult, host_operation
from shadowmmu.protocol.events import TlbsDirtyRaised
from shadowmmu.protocol.messages import WritePhys
from tests.kvm.bugs.kit_latent import (
    L2,
    L3,
    P1,
    P2,
    STORE_TO_X,
    G,
    T,
    X,
    entry,
    make_unsync,
    reload_cr3,
    stale_entries,
    with_and_without,
    world_of,
)
from tests.kvm.kit import READ, TABLE, WRITE, World, frame_address, gva

Z = gva(l2=2, l1=5)  # mapped by table G, once L2 leads to it


def trap_stores_to_t(world: World) -> None:
    """T is a table of level 2 too: its shadow is in sync for good, stores to it are emulated."""
    world.set_gpte(L3, 1, T, TABLE)
    world.set_gpte(52, 0, 60)
    world.access(world.vcpus[0], gva(l3=1, l2=10))
    assert world.is_write_protected(T)


@pytest.mark.parametrize("profile, stale", with_and_without("emulated-write-race"))
def test_a4_of_two_emulated_stores_the_first_makes_the_shadow_entry(profile: str, stale: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.access(one, X)
    trap_stores_to_t(world)
    world.access(zero, STORE_TO_X)
    world.exit(zero)
    first = Instruction(WRITE, STORE_TO_X, 8, entry(P1), user=True)
    storing = world.start(kvm_mmu_page_fault(zero, STORE_TO_X, 7, first)).until(Point.PTE_WRITE_STORED)
    second = world.access(one, STORE_TO_X, write=True, value=entry(P2))
    assert isinstance(second, FaultOutcome) and second.outcome is Outcome.EMULATED
    storing.finish()
    assert world.gpte(T, 9) == entry(P2)
    world.exit(one)
    world.run(kvm_mmu_invlpg(one, X))
    reload_cr3(world, one)
    assert world.access(one, X) == (111 if stale else 222)
    assert bool(stale_entries(world)) is stale


def test_a4_an_entry_that_cannot_be_read_again_is_left_empty() -> None:
    world = world_of("fixed")
    zero, one = world.vcpus
    world.access(one, X)
    trap_stores_to_t(world)
    world.access(zero, STORE_TO_X)
    world.exit(zero)
    store = Instruction(WRITE, STORE_TO_X, 8, entry(P1), user=True)
    storing = world.start(kvm_mmu_page_fault(zero, STORE_TO_X, 7, store)).until(Point.PTE_WRITE_LOCK)
    world.run(host.unmap(world.kvm, T))
    storing.finish()
    assert stale_entries(world) == []
    assert world.access(one, X) == 111


@pytest.mark.parametrize("profile, stale", with_and_without("unexpected-gfn"))
def test_a8_a_fault_between_an_emulated_store_and_its_pte_write(profile: str, stale: bool) -> None:
    """vCPU 1 sees the new entry above the old link, and maps what `other` has in the shadow of `table`."""
    world = world_of(profile)
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
    world.run(kvm_mmu_page_fault(one, fault.gva, 4, fault))
    storing.finish()
    assert bool(stale_entries(world)) is stale
    # The guest puts the table back, and invalidates everything.
    world.access(zero, address, write=True, value=entry(table, TABLE))
    reload_cr3(world, one)
    world.access(one, gva(l2=3, l1=10))
    assert world.access(one, fault.gva) == (111 if stale else 222)
    assert mmu_audit(world.kvm) == []


# A13: the host's threads and the guest


def device_store(kvm: Kvm, gfn: int, value: int) -> Operation[HostResult]:
    """A host thread stores to a guest frame."""
    return host_operation(kvm, WritePhys([(gfn << 12, value)]))


def a_frame_that_is_shared(profile: str) -> World:
    """x maps G, read-only for the host; all vCPUs have the translation."""
    world = world_of(profile)
    world.run(host.move(world.kvm, G, 0x500000, False))
    for vcpu in world.vcpus:
        assert world.access(vcpu, X) == 0
    return world


def copying(world: World) -> Operation[None]:
    """Copy on write of G."""
    return host.break_cow(world.kvm, world.kvm.host.slot(G), G)


def test_a13_a_guest_reads_the_old_frame_when_a_host_thread_has_stored_to_the_new_one() -> None:
    world = a_frame_that_is_shared("linux-3.1")
    kvm, one = world.kvm, world.vcpus[1]
    cow = world.start(copying(world)).until(Point.HOST_COW)
    world.run(device_store(kvm, G, 1))
    assert kvm.memory.read(G << 12, 8) == 1
    assert world.access(one, X) == 0  # older than what was stored before
    cow.finish()
    assert world.access(one, X) == 1
    assert kvm.host.old_frames == {}


def test_a13_fixed_the_host_thread_waits_until_kvm_knows() -> None:
    world = a_frame_that_is_shared("linux-3.1+change-pte-order")
    kvm, one = world.kvm, world.vcpus[1]
    cow = world.start(copying(world)).until(Point.HOST_COW)
    store = world.start(device_store(kvm, G, 1)).until(HostPageLock.BUSY)
    assert world.access(one, X) == 0
    cow.finish()
    store.finish()
    assert world.access(one, X) == 1
    assert mmu_audit(kvm) == []


def test_a13_fixed_faults_wait_for_the_new_frame() -> None:
    world = a_frame_that_is_shared("fixed")
    kvm, (zero, one) = world.kvm, world.vcpus
    cow = world.start(copying(world)).until(Point.HOST_COW)
    assert not kvm.host.is_present(G)
    world.exit(zero)
    address = gva(l2=1, l1=9)
    read = Instruction(READ, address, user=True)
    fault = world.start(kvm_mmu_page_fault(zero, address, 4, read)).until(HostPageLock.BUSY)
    cow.finish()
    fault.finish()
    for vcpu in (zero, one):
        world.access(vcpu, address)
        assert world.tlbs[vcpu.vcpu_id][address >> 12][0] == kvm.host.pfn(G)
    assert mmu_audit(kvm) == []


def test_a13_fixed_a_walk_waits_for_a_table_that_is_moved() -> None:
    world = world_of("fixed")
    kvm, zero = world.kvm, world.vcpus[0]
    world.enter(zero)
    world.exit(zero)
    moving = world.start(host.move(kvm, T, 0x500000, True)).until(Point.HOST_COW)
    walk = world.start(kvm_mmu_page_fault(zero, X, 4, Instruction(READ, X, user=True)))
    walk.until(HostPageLock.BUSY)
    moving.finish()
    walk.finish()
    assert world.access(zero, X) == 0
    assert kvm.host.pfn(T) == 0x500000
    assert mmu_audit(kvm) == []


def test_a13_stores_by_old_translations_are_not_lost() -> None:
    """The model's host also moves pages that guests may write, which the kernel does in other ways."""
    world = world_of("linux-3.1")
    kvm, (zero, one) = world.kvm, world.vcpus
    for vcpu in (zero, one):
        world.access(vcpu, X, write=True, value=1)
    moving = world.start(host.move(kvm, G, 0x500000, True)).until(Point.HOST_COW)
    assert world.try_store(one, X, 2)
    assert world.access(zero, X) == 2  # in the old frame
    moving.finish()
    assert world.access(zero, X) == 2  # and in the new one
    assert kvm.memory.read(G << 12, 8) == 2


# C1: get_dirty_log


@pytest.mark.parametrize(
    "profile, point, breached",
    [
        ("fixed-wp-race-dirty-log", Point.DIRTY_LOG_UNLOCKED, True),
        ("linux-3.1-wp-race-dirty-log", Point.DIRTY_LOG_UNLOCKED, True),
        ("fixed", Point.DIRTY_LOG_COPY, False),
        ("linux-3.1", Point.DIRTY_LOG_COPY, False),
    ],
)
def test_c1_a_table_is_protected_while_the_dirty_log_has_not_flushed_yet(
    profile: str, point: Point, breached: bool
) -> None:
    world = world_of(profile)
    kvm, (zero, one) = world.kvm, world.vcpus
    world.set_gpte(G, 5, P1)
    world.run(set_dirty_logging(kvm, 0, True))
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    log = world.start(kvm_vm_ioctl_get_dirty_log(kvm, 0)).until(point)
    world.set_gpte(L2, 2, G, TABLE)
    assert world.access(zero, Z) == 111
    assert world.breaches() == ([(1, G)] if breached else [])
    assert world.try_store(one, X + 5 * 8, entry(P2)) is breached
    assert G in log.finish()
    # The flush comes too late for the shadow of G.
    reload_cr3(world, zero)
    assert world.access(zero, Z) == 111
    assert bool(stale_entries(world)) is breached


# C2: a look without the lock


def c2(profile: str, until: object, mapped: bool) -> tuple[World, object]:
    """vCPU 0 gets its write access to T; at that effect vCPU 1 uses it, writes CR3, and reads x.

    `mapped`: T was mapped before it was shadowed, so that the shadow entry is there, read-only by now.
    """
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(T, 9, P1)
    if mapped:
        world.access(zero, STORE_TO_X)
    world.enter(zero)
    assert world.access(one, X) == 111
    world.exit(zero)
    store = Instruction(WRITE, STORE_TO_X, 8, entry(P1), user=True)
    fault = world.start(kvm_mmu_page_fault(zero, STORE_TO_X, 7, store)).until(until)
    assert world.try_store(one, STORE_TO_X, entry(P2))
    world.exit(one)
    world.run(kvm_set_cr3(one, one.cr3))
    value = world.access(one, X)
    fault.finish()
    return world, value


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("base", ["fixed", "linux-3.1"])
def test_c2_cr3_is_written_between_a_writable_entry_and_its_unsync_flag(base: str, mapped: bool) -> None:
    world, value = c2(f"{base}-lockless-sync-roots", Point.UNSYNC_LATE, mapped)
    assert value == 111  # only P2 was there when the vCPU wrote CR3
    assert mmu_audit(world.kvm) == []  # once all is done the flag is set


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("base", ["fixed", "linux-3.1"])
def test_c2_with_the_lock_held_nobody_is_between(base: str, mapped: bool) -> None:
    _, value = c2(base, MmuLock.RELEASE, mapped)
    assert value == 222


@pytest.mark.parametrize("profile", ["fixed-lockless-sync-roots", "fixed"])
def test_c2_tables_known_to_be_unsync_are_synchronised(profile: str) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    assert world.access(one, X) == 0
    make_unsync(world, zero)
    assert world.try_store(zero, STORE_TO_X, entry(P2))
    reload_cr3(world, one)
    assert world.access(one, X) == 222
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile", ["fixed-lockless-sync-roots", "fixed"])
def test_c2_a_reload_of_cr3_forgets_the_mmio_cache_only_of_a_vcpu_that_has_a_root(profile: str) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    nowhere = gva(l1=11)
    world.set_gpte(T, 11, 1 << 20)
    world.access(zero, nowhere)
    assert zero.mmio_gva == nowhere
    reload_cr3(world, zero)
    assert zero.mmio_gva == 0
    world.access(zero, nowhere)
    world.run(mmu_free_roots(zero))
    reload_cr3(world, zero)
    assert zero.mmio_gva == nowhere


# The other fix of A1


@pytest.mark.parametrize(
    "profile, breached",
    [("linux-3.1", True), ("linux-3.1+sync-flush-now", False), ("fixed+sync-flush-now", False)],
)
@pytest.mark.parametrize("gfn", [0, P1], ids=["gone", "remapped"])
def test_sync_flush_now_leaves_nothing_to_flush_later(profile: str, breached: bool, gfn: int) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    make_unsync(world, zero)
    assert world.try_store(zero, STORE_TO_X, entry(gfn) if gfn else 0)
    world.access(zero, gva(l2=1, l1=10))  # by the other entry for T: it is synchronised, x's entry dropped
    assert any(isinstance(event, TlbsDirtyRaised) for event in world.events) is breached
    world.access(zero, frame_address(L2, 2 * 8), write=True, value=entry(G, TABLE))
    world.set_gpte(G, 5, P1)
    world.access(zero, Z)
    assert world.is_write_protected(G)
    assert world.breaches() == ([(1, G)] if breached else [])
