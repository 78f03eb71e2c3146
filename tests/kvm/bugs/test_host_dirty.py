"""What the host knows of frames that guests have written, and what it frees unwritten if it does not know: B20.

A guest's store sets the D bit of the shadow entry. Where that bit goes KVM tells the host; a page that the host thinks
clean comes back from swap as it was last written there.
"""

from collections.abc import Callable
from typing import Any

import pytest

from shadowmmu.kvm import (
    Backing,
    Instruction,
    MemorySlot,
    Point,
    host,
    kvm_set_cr3,
    set_dirty_logging,
)
from shadowmmu.kvm.emulate import x86_emulate_instruction
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.rmap import rmap_write_protect
from tests.kvm.interleaver import Interleaver
from tests.kvm.kit import TABLE, WRITE, A, P, Running, U, World, frame_address, gva, identity_map

L3, L2, T = 17, 18, 19
X = gva(l1=9)
G = 50  # the frame that X maps
FIXED = "linux-3.1"


def swapped_in_clean(profile: str) -> World:
    """A page that holds 1, was swapped out and has come back for a load: mapped writable, and clean."""
    world = World(1, profile)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(T, 9, G)
    world.boot()
    store(world, 1)
    world.run(host.reclaim(world.kvm, G))
    assert load(world) == 1
    world.kvm.memory_points = {Point.SPTE_UPDATE}
    return world


def store(world: World, value: int) -> None:
    assert world.access(world.vcpus[0], X, write=True, value=value) == value


def load(world: World) -> int:
    value = world.access(world.vcpus[0], X)
    assert isinstance(value, int)
    return value


def store_inside(operation: Running, world: World, value: int) -> None:
    """The guest stores while KVM, under mmu_lock, is between reading a shadow entry and writing it."""
    operation.until(Point.SPTE_UPDATE)
    assert world.try_store(world.vcpus[0], X, value)
    operation.finish()


def after_swap(world: World) -> int:
    """What the guest loads when the page has been swapped out and in."""
    world.run(host.reclaim(world.kvm, G))
    return load(world)


@pytest.mark.parametrize("profile, value", [(FIXED, 2), ("linux-3.1-ad-bit-loss", 1)])
def test_b20_a_store_while_an_entry_is_dropped_is_not_lost(profile: str, value: int) -> None:
    world = swapped_in_clean(profile)
    reclaiming = world.start(host.reclaim(world.kvm, G)).until(Point.HOST_UNMAPPED)
    if profile == FIXED:  # the entry is exchanged for 0: the store falls before that
        assert world.try_store(world.vcpus[0], X, 2)
        reclaiming.finish()
    else:
        store_inside(reclaiming, world, 2)
    assert load(world) == value


def write_protect(world: World) -> Any:
    return rmap_write_protect(world.kvm, G)


def log_dirty(world: World) -> Any:
    return set_dirty_logging(world.kvm, 0, True)


@pytest.mark.parametrize(
    "change, slug", [(write_protect, "ad-bit-loss-update"), (log_dirty, "ad-bit-loss-write-access")]
)
@pytest.mark.parametrize("fixed", [True, False])
def test_b20_a_store_while_an_entry_loses_write_access_is_not_lost(
    change: Callable[[World], Any], slug: str, fixed: bool
) -> None:
    world = swapped_in_clean(FIXED if fixed else f"linux-3.1-{slug}")
    store_inside(world.start(change(world)), world, 2)
    world.exit(world.vcpus[0])
    world.tlbs[0].clear()
    assert load(world) == 2
    assert after_swap(world) == (2 if fixed else 1)


@pytest.mark.parametrize("profile, value", [(FIXED, 2), ("linux-3.1-ad-bit-loss-carry", 1)])
def test_b20_what_was_stored_before_a_sync_is_not_lost(profile: str, value: int) -> None:
    world = swapped_in_clean(profile)
    (vcpu,) = world.vcpus
    store(world, 2)
    world.access(
        vcpu, frame_address(T, 9 * 8), write=True, value=G << 12 | P | U | A
    )  # read-only from now on
    world.exit(vcpu)
    world.run(kvm_set_cr3(vcpu, vcpu.cr3))  # T is synchronised
    assert load(world) == 2
    assert after_swap(world) == value


@pytest.mark.parametrize("profile, value", [(FIXED, 2), ("linux-3.1-ad-bit-loss", 1)])
def test_b20_a_store_while_an_entry_follows_its_page_to_another_frame_is_not_lost(
    profile: str, value: int
) -> None:
    world = swapped_in_clean(profile)
    kvm = world.kvm
    store_inside(world.start(host.move(kvm, G, kvm.host.take_pfn(kvm.host.slot(G)), False)), world, 2)
    assert after_swap(world) == value


def test_a_page_that_was_only_read_is_not_written_to_swap_again() -> None:
    world = swapped_in_clean(FIXED)
    before = world.kvm.host.swap_space[G]
    assert after_swap(world) == 1
    assert world.kvm.host.swap_space[G] is before


def test_a_page_that_is_brought_back_while_it_goes_stays_dirty() -> None:
    world = swapped_in_clean(FIXED)
    store(world, 2)
    reclaiming = world.start(host.reclaim(world.kvm, G)).until(Point.HOST_UNMAPPED)
    world.kvm.host.fault_in(world.kvm.host.slot(G), G)
    reclaiming.finish()
    assert after_swap(world) == 2


def test_the_hosts_own_stores_are_known_to_it() -> None:
    world = swapped_in_clean(FIXED)
    (vcpu,) = world.vcpus
    world.exit(vcpu)
    world.run(x86_emulate_instruction(vcpu, Instruction(WRITE, X, 8, 3, user=True)))
    assert after_swap(world) == 3


def test_a_store_to_a_transparent_huge_page_is_known_for_each_of_its_pages() -> None:
    world = World(1, FIXED, memslots=(MemorySlot(0, 0, 1024), MemorySlot(1, 1024, 1024, Backing.THP)))
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, 1024, 0x80 | P | 2 | U | A | 0x40)  # a page of 2 MiB
    world.boot()
    for value in (1, 2):
        world.access(world.vcpus[0], gva(l1=7), write=True, value=value)
        world.run(host.reclaim(world.kvm, 1024 + 7))
    assert world.access(world.vcpus[0], gva(l1=7)) == 2


@pytest.mark.parametrize("seed", [0, 2])
def test_what_the_host_frees_as_clean_is_in_swap_as_it_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random interleavings, all points enabled: the host knows of whatever guests have stored."""
    freed = 0
    page_out = HostMemory.page_out

    def checked(self: HostMemory, slot: KvmMemorySlot, page: int, pfn: int) -> None:
        nonlocal freed
        offset = page - slot.memory.base << 12
        before = bytes(slot.memory.data[offset : offset + 4096])
        freed += page in self.swapped and page in self.swap_space and not self.is_dirty(slot, page, pfn)
        page_out(self, slot, page, pfn)
        assert bytes(slot.memory.data[offset : offset + 4096]) == before

    monkeypatch.setattr(HostMemory, "page_out", checked)
    Interleaver(seed).run_unaudited(40_000)
    assert freed > 0
