"""Guest tables that change under a fault, a sync or an emulated store, as Linux 3.1 with one fix less.

B3 to B8, B23, B24, B26.
"""

import pytest

from shadowmmu.kvm import (
    MEMORY_POINTS,
    Instruction,
    InstructionKind,
    Outcome,
    Point,
    kvm_mmu_invlpg,
    kvm_pv_mmu_op_release_pt,
    mmu_audit,
    x86_emulate_instruction,
)
from shadowmmu.protocol.events import AuditFailed, ShadowPageSynced
from tests.kvm.bugs.kit_mutants import (
    L2,
    L3,
    P1,
    P2,
    X_IN_T,
    T,
    X,
    entry,
    invlpg,
    let_unsync,
    load_cr3,
    start_fault,
    store_to_table,
    store_unseen,
    with_and_without,
    world_of,
)
from tests.kvm.interleaver import Interleaver
from tests.kvm.kit import PAGE, TABLE, World, drive, frame_address, gva

T1, T2 = 20, 21
OLD, NEW = 111, 222  # what the frames P1 and P2 hold


@with_and_without("writable-sync-sp")
def test_b3_a_table_that_is_synchronised_later_is_not_left_writable(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(L2, 2, T1, TABLE)
    world.set_gpte(L2, 3, T2, TABLE)
    world.set_gpte(T1, 0, T2)
    world.set_gpte(T2, 5, P1)
    mapped_by_t2, t2_itself = gva(l2=3, l1=5), gva(l2=2)
    assert world.access(zero, mapped_by_t2) == OLD
    world.access(zero, t2_itself + 500 * 8, write=True, value=0)  # T2 is unsync
    let_unsync(world, zero, T1)
    load_cr3(world, zero)  # T1 is synchronised before T2
    world.enter(zero)
    assert world.is_write_protected(T2)
    assert world.try_store(zero, t2_itself + 5 * 8, entry(P2)) is broken
    assert (mmu_audit(world.kvm) != []) is broken
    if broken:
        invlpg(world, zero, mapped_by_t2)
        assert world.access(zero, mapped_by_t2) == OLD
        assert world.gpte(T2, 5) == entry(P2)


@pytest.mark.parametrize(
    "profile, broken",
    [
        ("fixed", False),
        ("fixed-selfref-sync", False),
        ("linux-3.1-selfref-sync", False),
        ("fixed-writable-sync-sp", False),
        ("fixed-writable-sync-sp-selfref-sync", True),
        ("linux-3.1-writable-sync-sp-selfref-sync", True),
    ],
)
def test_b4_a_table_that_maps_itself_is_left_writable_only_with_b3(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(T, 11, T)
    itself = gva(l1=11)
    world.access(zero, itself + 500 * 8, write=True, value=0)
    assert not world.is_write_protected(T)
    load_cr3(world, zero)
    world.enter(zero)
    assert world.is_write_protected(T)
    assert world.try_store(zero, itself + X_IN_T, entry(P2)) is broken


@pytest.mark.parametrize("base", ["fixed", "linux-3.1"])
@pytest.mark.parametrize("seed", range(3))
def test_b4_alone_changes_nothing(base: str, seed: int) -> None:
    """The same choices have the same effects, but for the moment at which a page is said to be in sync."""
    runs = []
    for profile in (base, f"{base}-selfref-sync"):
        interleaver = Interleaver(seed, profile, checks=False)
        interleaver.run_unaudited(3000)
        runs.append([event for event in interleaver.world.events if not isinstance(event, ShadowPageSynced)])
    assert runs[0] == runs[1]
    assert len(runs[0]) > 100


@with_and_without("fetch-revalidate-all")
def test_b5_an_upper_entry_that_changed_makes_a_fault_give_up(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(L2, 3, T1, TABLE)
    world.set_gpte(T1, 9, P1)
    world.set_gpte(T2, 9, P2)
    world.set_gpte(T2, 20, 52)
    address = gva(l2=3, l1=9)
    world.access(one, gva(l2=1, l1=10))
    fault = start_fault(world, zero, address).until(Point.BEFORE_LOCK)
    store_to_table(world, one, L2, 3 * 8, entry(T2, TABLE))
    world.access(one, gva(l2=3, l1=20))
    fault.finish()
    for vcpu in world.vcpus:
        invlpg(world, vcpu, address)
        load_cr3(world, vcpu)
        assert world.access(vcpu, address) == (OLD if broken else NEW)


@with_and_without("fetch-revalidate-leaf")
def test_b6_a_last_entry_that_changed_makes_a_fault_give_up(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(T, 9, P1)
    store_to_table(world, one, T, X_IN_T, entry(P1))
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    store_unseen(world, one, T, X_IN_T, entry(P2))  # not shadowed yet
    fault.finish()
    assert world.is_write_protected(T)
    invlpg(world, zero, X)
    assert world.access(zero, X) == (OLD if broken else NEW)


@with_and_without("fetch-revalidate-leaf-existing")
def test_b6_also_where_the_table_was_shadowed_meanwhile(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    store_to_table(world, one, T, X_IN_T, entry(P1))
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    world.set_gpte(T, 20, 52)
    world.access(one, gva(l1=20))
    fault.finish()
    assert world.is_write_protected(T)
    invlpg(world, zero, X)
    assert world.access(zero, X) == (OLD if broken else NEW)


def stored_at(profile: str, number: int) -> World | None:
    """vCPU 1 changes T[9] at that memory point of vCPU 0's first fault on X; None if there is none, or it cannot."""
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(L2, 3, T1, TABLE)
    world.set_gpte(T1, 0, 52)
    world.access(one, gva(l2=3))  # all but T is shadowed
    store_to_table(world, one, T, X_IN_T, entry(P1))
    world.kvm.memory_points = MEMORY_POINTS
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    world.enter(one)
    for _ in range(number):
        while fault.step() not in MEMORY_POINTS:
            if fault.done:
                return None
    if not world.try_store(one, frame_address(T, X_IN_T), entry(P2)):
        return None
    fault.finish()
    return world


@with_and_without("read-before-wp")
def test_b7_an_entry_is_read_again_when_its_table_cannot_change_any_more(profile: str, broken: bool) -> None:
    stale = set()
    for number in range(1, 40):
        world = stored_at(profile, number)
        if world is not None:
            zero = world.vcpus[0]
            invlpg(world, zero, X)
            stale.add(world.access(zero, X) == OLD)
    assert stale == ({True, False} if broken else {False})


@with_and_without("invlpg-prefault-race")
def test_b8_an_older_value_does_not_replace_one_read_after_a_later_invlpg(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(T, 9, P1)
    assert world.access(zero, X) == OLD
    world.access(one, X)
    let_unsync(world, one)
    world.exit(zero)
    invalidating = world.start(kvm_mmu_invlpg(zero, X)).until(Point.PTE_WRITE_LOCK)  # has read the entry
    world.enter(one)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    invlpg(world, one, X)
    invalidating.finish()
    assert world.access(one, X) == (OLD if broken else NEW)


@with_and_without("locked-op-emulation")
def test_b23_a_store_between_compare_and_exchange_is_not_lost(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    world.set_gpte(T, 9, P1)
    store_to_table(world, one, T, X_IN_T, entry(P1))
    world.enter(zero)
    world.exit(zero)
    exchange = Instruction(
        InstructionKind.CMPXCHG, frame_address(T, X_IN_T), value=7, user=True, expected=entry(P1)
    )
    emulating = world.start(x86_emulate_instruction(zero, exchange))
    emulating.until(Point.LOCKED_OP_COMPARED if broken else Point.EMULATE_TRANSLATED)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    result = emulating.finish()
    assert result.outcome is Outcome.EMULATED
    assert (result.value == entry(P1)) is broken  # the exchange has succeeded, so it says
    assert world.gpte(T, 9) == (7 if broken else entry(P2))


@with_and_without("sync-on-cr3-reload")
def test_b24_loading_the_same_cr3_synchronises(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(T, 9, P1)
    assert world.access(zero, X) == OLD
    let_unsync(world, zero)
    store_unseen(world, zero, T, X_IN_T, entry(P2))
    load_cr3(world, zero)
    assert world.access(zero, X) == (OLD if broken else NEW)


@pytest.mark.parametrize(
    "profile, broken",
    [
        ("linux-3.1", False),
        ("linux-3.1-sync-on-load", False),  # the page that is found asks for a sync
        ("fixed", False),
        ("fixed-sync-on-load", True),  # with link-before-sync it does not any more
        ("fixed-sync-on-load-link-before-sync", False),
    ],
)
def test_b24_loading_another_root_synchronises(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    other = 28
    for index in range(2):
        world.set_gpte(other, index, world.gpte(world.root, index) >> 12, TABLE)
    world.set_gpte(T, 9, P1)
    assert world.access(zero, X) == OLD
    let_unsync(world, zero)
    store_unseen(world, zero, T, X_IN_T, entry(P2))
    load_cr3(world, zero, other)
    world.enter(zero)
    load_cr3(world, zero, world.root)  # its page has unsync ones below it
    assert world.access(zero, X) == (OLD if broken else NEW)


@with_and_without("unreachable-child")
def test_b26_a_fault_that_gives_up_leaves_no_parent_behind(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    store_to_table(world, one, T, X_IN_T, entry(P1))
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    fault.finish()
    assert [error.check for error in mmu_audit(world.kvm)] == (["parents"] if broken else [])
    for table in (L2, T):  # the page with the entry goes, then the page that was never linked there
        drive(kvm_pv_mmu_op_release_pt(one, table << 12))
    failed = [event.check for event in world.events if isinstance(event, AuditFailed)]
    assert failed == (["kvm_mmu_unlink_parents"] if broken else [])
    world.exit(one)
    assert world.access(one, X) == NEW
    assert L3 in world.kvm.mmu_page_hash
    assert mmu_audit(world.kvm) == []


@with_and_without("unreachable-child")
def test_b26_an_unlinked_parent_does_not_stop_a_page_from_going_unsync(profile: str, broken: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    store_to_table(world, one, T, X_IN_T, entry(P1))
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    fault.finish()
    drive(kvm_pv_mmu_op_release_pt(one, L2 << 12))
    world.exit(one)
    let_unsync(world, one)
    assert (len(mmu_audit(world.kvm)) != 0) is broken
    assert world.access(zero, X, write=True, value=3) == 3
    assert world.gpte(T, 9) == entry(P2, PAGE)
