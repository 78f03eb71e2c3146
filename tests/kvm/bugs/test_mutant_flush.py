"""Flushes that older kernels forgot, as Linux 3.1 with one fix less: B1, B2, B9 to B12, B17."""

import pytest

from shadowmmu.conform.hardware import Translation, hardware_walk
from shadowmmu.kvm import (
    Backing,
    MemorySlot,
    Point,
    host,
    kvm_mmu_invlpg,
    kvm_pv_mmu_op_release_pt,
    kvm_vm_ioctl_get_dirty_log,
    mmu_audit,
    set_dirty_logging,
)
from shadowmmu.protocol.events import FrameRevoked
from tests.kvm.bugs.kit_mutants import (
    BLOCK,
    L2,
    LARGE,
    P1,
    P2,
    X_IN_T,
    G,
    T,
    X,
    Z,
    entry,
    in_guest,
    invlpg,
    let_unsync,
    reaches,
    start_fault,
    store_to_table,
    store_unseen,
    with_and_without,
    world_of,
)
from tests.kvm.kit import PAGE, READ, TABLE, A, P, U, W, World, gva

HUGE = (MemorySlot(0, 0, 4096, Backing.HUGE_2M),)


def write_protect_g(world: World) -> None:
    """vCPU 0 makes G a page table, whose entry 5 maps P1, and uses it."""
    store_to_table(world, world.vcpus[0], L2, 2 * 8, entry(G, TABLE))
    world.access(world.vcpus[0], Z)
    assert world.is_write_protected(G)


def cached_writable(profile: str) -> World:
    """vCPU 1 has X writable in its TLB; T is unsync."""
    world = world_of(profile)
    world.set_gpte(G, 5, P1)
    zero, one = world.vcpus
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    let_unsync(world, zero)
    return world


@with_and_without("wr-ro-noflush")
def test_b1_an_entry_that_becomes_read_only_is_flushed(profile: str, broken: bool) -> None:
    world = cached_writable(profile)
    zero, one = world.vcpus
    store_unseen(world, zero, T, X_IN_T, entry(G, PAGE & ~W))
    world.access(zero, gva(l2=1, l1=10))  # by the other entry of L2: T is synchronised
    write_protect_g(world)
    assert world.breaches() == ([(1, G)] if broken else [])
    assert world.try_store(one, X + 5 * 8, entry(P2)) is broken
    # G's shadow is in sync: what vCPU 1 has stored there is never seen.
    assert world.access(zero, Z) == 111
    assert (world.gpte(G, 5) == entry(P2)) is broken


@pytest.mark.parametrize("slug", ["sync-drop-noflush-count", "sync-drop-noflush-clear"])
@pytest.mark.parametrize("base", ["linux-3.1", "fixed"])
@pytest.mark.parametrize("broken", [False, True])
def test_b2_what_a_sync_dropped_is_remembered_until_all_have_flushed(
    base: str, slug: str, broken: bool
) -> None:
    world = cached_writable(f"{base}-{slug}" if broken else base)
    zero, one = world.vcpus
    store_unseen(world, zero, T, X_IN_T, 0)
    world.access(zero, gva(l2=1, l1=10))  # T is synchronised, the entry of X dropped
    assert world.kvm.tlbs_dirty == (0 if broken else 1)
    world.run(host.reclaim(world.kvm, G))
    assert world.try_store(one, X, 2) is broken


@with_and_without("invlpg-noremote")
def test_b9_what_an_invlpg_drops_is_flushed_everywhere(profile: str, broken: bool) -> None:
    world = cached_writable(profile)
    zero, one = world.vcpus
    store_unseen(world, zero, T, X_IN_T, 0)
    invlpg(world, zero, X)
    world.run(host.reclaim(world.kvm, G))
    assert any(isinstance(event, FrameRevoked) for event in world.events)
    assert world.try_store(one, X, 2) is broken


@with_and_without("invlpg-noremote")
def test_b9_a_frame_that_becomes_a_table_can_be_written(profile: str, broken: bool) -> None:
    world = cached_writable(profile)
    zero = world.vcpus[0]
    store_unseen(world, zero, T, X_IN_T, 0)
    invlpg(world, zero, X)
    write_protect_g(world)
    assert world.breaches() == ([(1, G)] if broken else [])


@with_and_without("large-to-normal")
def test_b10_a_large_page_that_is_split_is_flushed(profile: str, broken: bool) -> None:
    world = world_of(profile, memslots=HUGE)
    zero, one = world.vcpus
    table, g = BLOCK + 88, BLOCK + 10  # both in the block that L2[3] maps
    world.set_gpte(L2, 2, table, TABLE)
    world.set_gpte(table, 0, P1)
    world.set_gpte(g, 5, P1)
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.access(zero, gva(l2=2))  # a table in the block: it may not be one large page
    fault = start_fault(world, zero, gva(l2=3, l1=9)).until(Point.BEFORE_LOCK)
    world.exit(one)
    world.run(kvm_pv_mmu_op_release_pt(one, table << 12))  # now it may
    world.access(one, gva(l2=3, l1=10), write=True, value=1)
    walk = hardware_walk(one, gva(l2=3, l1=10), READ, True)
    assert isinstance(walk, Translation) and walk.level == 2
    fault.finish()  # vCPU 0 does not know yet: it puts a table there
    store_to_table(world, zero, L2, 4 * 8, entry(g, TABLE))
    world.access(zero, gva(l2=4, l1=5))
    assert world.is_write_protected(g)
    assert world.breaches() == ([(1, g)] if broken else [])
    assert world.try_store(one, gva(l2=3, l1=10), entry(P2)) is broken


@with_and_without("small-to-large")
def test_b11_without_the_flush_a_tlb_can_hold_two_sizes(profile: str, broken: bool) -> None:
    """And nothing more: the dropped table's entries stay in the reverse maps."""
    world = world_of(profile, memslots=HUGE)
    zero, one = world.vcpus
    small = gva(l2=3, l1=9)
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.run(set_dirty_logging(world.kvm, 0, True))
    world.access(zero, small, write=True, value=1)
    world.run(set_dirty_logging(world.kvm, 0, False))
    world.access(one, small)
    assert hardware_walk(one, small, READ, True).level == 1  # type: ignore[union-attr]
    world.access(zero, small, write=True, value=2)
    assert hardware_walk(zero, small, READ, True).level == 2  # type: ignore[union-attr]
    # vCPU 1 may have the new size for other addresses of the block as soon as it uses them.
    assert (in_guest(one) and small >> 12 in world.tlbs[1]) is broken
    pfn = world.kvm.host.pfn(BLOCK + 9)
    world.run(host.reclaim(world.kvm, BLOCK + 9))
    assert not reaches(world, one, small, pfn)
    assert mmu_audit(world.kvm) == []


def overwritten(profile: str) -> World:
    """T[9] mapped G without D, and maps P2 now: a write fault of vCPU 0 meets the old entry. vCPU 1 has the old one."""
    world = world_of(profile)
    world.set_gpte(T, 9, G, P | W | U | A)
    zero, one = world.vcpus
    world.access(one, X)
    world.access(zero, X)
    let_unsync(world, zero)
    store_unseen(world, zero, T, X_IN_T, entry(P2))
    world.access(zero, X, write=True, value=5)
    assert world.kvm.memory.read(P2 << 12, 8) == 5
    return world


@with_and_without("pfn-overwrite")
def test_b12_an_entry_that_maps_another_frame_is_flushed(profile: str, broken: bool) -> None:
    world = overwritten(profile)
    pfn = world.kvm.host.pfn(G)
    world.run(host.reclaim(world.kvm, G))
    assert reaches(world, world.vcpus[1], X, pfn) is broken


@with_and_without("pfn-overwrite-drop")
def test_b12_an_entry_that_maps_another_frame_leaves_the_old_reverse_map(profile: str, broken: bool) -> None:
    world = overwritten(profile)
    assert {error.check for error in mmu_audit(world.kvm)} == ({"mappings"} if broken else set())
    pfn = world.kvm.host.pfn(P2)
    world.run(host.reclaim(world.kvm, P2))
    assert reaches(world, world.vcpus[0], X, pfn) is broken


def dirty_log(world: World) -> list[int]:
    log: list[int] = world.run(kvm_vm_ioctl_get_dirty_log(world.kvm, 0))
    return log


@with_and_without("dirty-log-flush")
def test_b17_a_write_after_the_log_was_read_is_in_the_next_one(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.run(set_dirty_logging(world.kvm, 0, True))
    world.access(zero, X, write=True, value=1)
    assert G in dirty_log(world)
    world.access(zero, X, write=True, value=2)
    assert (G not in dirty_log(world)) is broken


@with_and_without("dirty-log-flush-early")
def test_b17_the_flush_comes_after_write_access_was_taken_away(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.run(set_dirty_logging(world.kvm, 0, True))
    world.access(zero, X, write=True, value=1)
    reading = world.start(kvm_vm_ioctl_get_dirty_log(world.kvm, 0))
    if broken:
        reading.until(Point.DIRTY_LOG_FLUSHED_EARLY)
        world.access(zero, X, write=True, value=2)  # the TLB has it again
    assert G in reading.finish()
    world.access(zero, X, write=True, value=3)
    assert (G not in dirty_log(world)) is broken


@with_and_without("dirty-log-large-maps")
def test_b17_a_slot_that_is_logged_has_no_large_pages(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1, memslots=HUGE)
    (zero,) = world.vcpus
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.run(set_dirty_logging(world.kvm, 0, True))
    world.access(zero, gva(l2=3, l1=9), write=True, value=1)
    world.access(zero, gva(l2=3, l1=10), write=True, value=1)
    log = dirty_log(world)
    assert (BLOCK + 10 not in log) is broken
    assert (BLOCK in log) is broken  # all that is noted of a large page


def test_b9_nothing_is_flushed_when_nothing_was_dropped() -> None:
    world = world_of("linux-3.1")
    zero, one = world.vcpus
    world.access(one, X)
    world.exit(zero)
    world.run(kvm_mmu_invlpg(zero, X))
    assert in_guest(one)
