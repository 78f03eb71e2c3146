"""The host's side: notifiers, kicks, slots and large pages, as Linux 3.1 with one fix less: B16, B18, B19, B21, B22, B25."""

import pytest

from shadowmmu.conform.hardware import Fault
from shadowmmu.cpu.x86 import EFER_NX, X86_CR4_PAE
from shadowmmu.kvm import (
    Backing,
    FaultOutcome,
    MemorySlot,
    Point,
    host,
    kvm_mmu_zap_all,
    kvm_reload_remote_mmus,
    kvm_set_memory_region,
    mmu_audit,
    set_regs,
    vcpu_enter_guest,
)
from shadowmmu.protocol.events import FrameRevoked
from shadowmmu.protocol.messages import Tdp
from tests.kvm.bugs.kit_mutants import (
    BLOCK,
    L2,
    L3,
    LARGE,
    P1,
    P2,
    G,
    T,
    X,
    entry,
    reaches,
    start_fault,
    store_to_table,
    until_kick,
    with_and_without,
    world_of,
)
from tests.kvm.kit import CR0, PAGE, TABLE, P, World, drive, gva

HUGE = (MemorySlot(0, 0, 4096, Backing.HUGE_2M),)
OTHER = gva(l1=10)  # maps frame 52


def revoked(world: World) -> set[int]:
    """The host frames that were taken away."""
    return {event.pfn for event in world.events if isinstance(event, FrameRevoked)}


# Large pages


@with_and_without("wp-huge-iteration")
def test_b16_every_large_page_of_a_table_is_dropped(profile: str, broken: bool) -> None:
    world = world_of(profile, memslots=HUGE)
    zero, one = world.vcpus
    g = BLOCK + 10
    world.set_gpte(g, 5, P1)
    for index in (3, 4):
        world.set_gpte(L2, index, BLOCK, PAGE | LARGE)
        world.access(one, gva(l2=index, l1=9), write=True, value=1)
    store_to_table(world, zero, L2, 2 * 8, entry(g, TABLE))
    world.access(zero, gva(l2=2, l1=5))
    assert world.is_write_protected(g)
    world.enter(one)
    stored = [world.try_store(one, gva(l2=index, l1=10, offset=5 * 8), entry(P2)) for index in (3, 4)]
    assert any(stored) is broken
    assert ("write_protection" in {error.check for error in mmu_audit(world.kvm)}) is broken


@with_and_without("notifier-huge-index")
def test_b18_a_notifier_finds_the_large_page(profile: str, broken: bool) -> None:
    world = world_of(profile, memslots=HUGE, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.access(zero, gva(l2=3, l1=9), write=True, value=1)
    pfn = world.kvm.host.pfn(BLOCK + 9)
    world.run(host.reclaim(world.kvm, BLOCK + 9))
    assert pfn in revoked(world)
    assert reaches(world, zero, gva(l2=3, l1=9), pfn) is broken


@with_and_without("notifier-huge-index")
def test_b18_a_range_finds_the_large_page(profile: str, broken: bool) -> None:
    world = world_of(profile, memslots=HUGE, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.access(zero, gva(l2=3, l1=9), write=True, value=1)
    pfn = world.kvm.host.pfn(BLOCK + 9)
    world.start(host.unmap_range(world.kvm, BLOCK, 4)).until(Point.NOTIFIER_RANGE_STARTED)
    assert pfn in revoked(world)
    assert reaches(world, zero, gva(l2=3, l1=9), pfn) is broken


# Notifiers and faults


@pytest.mark.parametrize("slug", ["notifier-retry", "notifier-retry-late-seq", "notifier-retry-seq"])
@pytest.mark.parametrize("base", ["linux-3.1", "fixed"])
@pytest.mark.parametrize("broken", [False, True])
def test_b19_a_frame_that_went_after_it_was_looked_up_is_not_mapped(
    base: str, slug: str, broken: bool
) -> None:
    world = world_of(f"{base}-{slug}" if broken else base, vcpus=1)
    (zero,) = world.vcpus
    pfn = world.kvm.host.pfn(G)
    late = broken and slug == "notifier-retry-late-seq"
    fault = start_fault(world, zero, X).until(Point.LATE_SEQ if late else Point.BEFORE_LOCK)
    world.run(host.reclaim(world.kvm, G))
    assert revoked(world) == {pfn}
    fault.finish()
    assert reaches(world, zero, X, pfn) is broken


@pytest.mark.parametrize("tdp", [None, Tdp.NPT, Tdp.EPT], ids=["paging off", "npt", "ept"])
@with_and_without("notifier-retry-late-seq")
def test_b19_a_frame_that_went_is_not_mapped_directly_either(
    profile: str, broken: bool, tdp: Tdp | None
) -> None:
    world = World(1, profile, tdp=tdp)
    (zero,) = world.vcpus
    pfn = world.kvm.host.pfn(G)
    fault = start_fault(world, zero, G << 12).until(Point.LATE_SEQ if broken else Point.DIRECT_BEFORE_LOCK)
    world.run(host.reclaim(world.kvm, G))
    assert revoked(world) == {pfn}
    fault.finish()
    assert reaches(world, zero, G << 12, pfn) is broken


@pytest.mark.parametrize("slug", ["notifier-retry", "notifier-retry-count"])
@pytest.mark.parametrize("base", ["linux-3.1", "fixed"])
@pytest.mark.parametrize("broken", [False, True])
def test_b19_nothing_is_mapped_while_a_range_goes(base: str, slug: str, broken: bool) -> None:
    world = world_of(f"{base}-{slug}" if broken else base, vcpus=1)
    (zero,) = world.vcpus
    pfn = world.kvm.host.pfn(G)
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    world.start(host.unmap_range(world.kvm, G, 1)).until(Point.NOTIFIER_RANGE_STARTED)
    assert revoked(world) == {pfn}
    fault.finish()
    assert reaches(world, zero, X, pfn) is broken


@with_and_without("notifier-retry-raise-late")
def test_b19_a_fault_that_gets_the_lock_next_knows_of_the_notifier(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    pfn = world.kvm.host.pfn(G)
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    reclaiming = world.start(host.reclaim(world.kvm, G))
    if broken:
        reclaiming.until(Point.NOTIFIER_SEQ_LATE)
    else:
        reclaiming.finish()
    fault.finish()
    reclaiming.finish()
    assert revoked(world) == {pfn}
    assert reaches(world, zero, X, pfn) is broken


@pytest.mark.parametrize(
    "take_away",
    [
        host.reclaim,
        lambda kvm, gfn: host.unmap_range(kvm, gfn, 1),
        lambda kvm, gfn: host.move(kvm, gfn, 9, True),
    ],
    ids=["page", "range", "move"],
)
def test_b19_mmu_notifier_seq_is_raised_late_but_as_often(take_away: object) -> None:
    raised = []
    for profile in ("linux-3.1", "linux-3.1-notifier-retry-raise-late"):
        world = world_of(profile, vcpus=1)
        world.run(take_away(world.kvm, G))  # type: ignore[operator]
        raised.append(world.kvm.mmu_notifier_seq)
    assert raised == [1, 1]


# Kicks


@with_and_without("second-flusher-returns-early", bases=("linux-3.1", "fixed-notifier-flush-outside-lock"))
def test_b21_a_second_flush_waits_for_a_vcpu_that_has_not_answered_the_first(
    profile: str, broken: bool
) -> None:
    world = world_of(profile)
    one = world.vcpus[1]
    world.access(one, OTHER)
    world.access(one, X, write=True, value=1)
    pfn = world.kvm.host.pfn(G)
    first = until_kick(world.start(host.reclaim(world.kvm, 52)))
    world.run(host.reclaim(world.kvm, G))
    assert revoked(world) == {pfn}
    assert world.try_store(one, X, 2) is broken
    first.finish()
    assert not world.try_store(one, X, 3)


@with_and_without("second-flusher-returns-early")
def test_b21_a_reload_under_mmu_lock_waits_for_a_vcpu_that_another_reload_has_asked(
    profile: str, broken: bool
) -> None:
    """PAE: a root maps the large page itself, and what zaps a root in use flushes by its reload alone."""
    world = World(1, profile, memslots=HUGE)
    (zero,) = world.vcpus
    world.set_gpte(L3, 0, L2, P)
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    drive(set_regs(zero, CR0, L3 << 12, X86_CR4_PAE, EFER_NX))
    x = gva(l2=3, l1=9)
    world.access(zero, x, write=True, value=1)
    pfn = world.kvm.host.pfn(BLOCK + 9)
    until_kick(world.start(kvm_reload_remote_mmus(world.kvm)))
    world.run(kvm_mmu_zap_all(world.kvm))
    world.run(host.reclaim(world.kvm, BLOCK + 9))
    assert pfn in revoked(world)
    assert world.try_store(zero, x, 2) is broken


@with_and_without("second-flusher-exiting")
def test_b21_a_flush_waits_for_a_vcpu_that_is_on_its_way_out(profile: str, broken: bool) -> None:
    world = world_of(profile)
    one = world.vcpus[1]
    world.access(one, X, write=True, value=1)
    pfn = world.kvm.host.pfn(G)
    until_kick(world.start(kvm_reload_remote_mmus(world.kvm)))
    world.run(host.reclaim(world.kvm, G))
    assert revoked(world) == {pfn}
    assert world.try_store(one, X, 2) is broken


@with_and_without("mode-vs-request-order")
def test_b22_no_flush_is_lost_while_a_vcpu_enters(profile: str, broken: bool) -> None:
    world = world_of(profile)
    one = world.vcpus[1]
    world.access(one, X, write=True, value=1)
    world.exit(one)  # its TLB stays as it is
    entering = world.start(vcpu_enter_guest(one))
    entering.until(Point.ENTER_GUEST_LATE_MODE if broken else Point.ENTER_GUEST_REQUESTS)
    pfn = world.kvm.host.pfn(G)
    world.run(host.reclaim(world.kvm, G))
    assert revoked(world) == {pfn}
    if entering.finish().hw_flushes:
        world.tlbs[1].clear()
    assert world.try_store(one, X, 2) is broken


@pytest.mark.parametrize("profile", ["linux-3.1", "linux-3.1-mode-vs-request-order"])
def test_b22_a_request_that_precedes_the_last_test_is_served(profile: str) -> None:
    world = world_of(profile)
    one = world.vcpus[1]
    world.access(one, X)
    world.exit(one)
    entering = world.start(vcpu_enter_guest(one)).until(Point.ENTER_GUEST_REQUESTS)
    world.run(host.reclaim(world.kvm, G))
    entered = entering.finish()
    assert (entered.passes, entered.hw_flushes, one.requests) == (2, 1, 0)


# Memory slots


@with_and_without("memslot-delete-flush-early")
def test_b25_a_slot_that_goes_is_not_mapped_again(profile: str, broken: bool) -> None:
    base = 1024
    world = world_of(profile, vcpus=1, memslots=(MemorySlot(0, 0, 512), MemorySlot(1, base, 16)))
    (zero,) = world.vcpus
    world.set_gpte(T, 9, base)
    world.access(zero, X, write=True, value=1)
    pfn = world.kvm.host.pfn(base)
    deleting = world.start(kvm_set_memory_region(world.kvm, MemorySlot(1, 0, 0)))
    deleting.until(Point.FLUSH_SHADOW_ZAPPED)
    result = world.access(zero, X, write=True, value=2)
    assert isinstance(result, FaultOutcome) is not broken  # with the fix there is no memory any more
    world.run(host.munmap(world.kvm, deleting.finish()))
    assert pfn in revoked(world)
    world.enter(zero)
    assert isinstance(world.translate(zero, X), Fault) is not broken
    assert (mmu_audit(world.kvm) != []) is broken
