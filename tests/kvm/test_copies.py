"""A machine that is pickled, as snapshots have it, goes on like the one that it was copied from, and shares nothing with it."""

from __future__ import annotations

import pickle

from shadowmmu.kvm import Point, host, mmu_audit
from tests.kvm.kit import World, frame_address, identity_map

CONTENTS = 0x1234


def used_world() -> World:
    """Two vCPUs that have read and written: shadow pages, an unsync one among them, and dirty pages."""
    world = World()
    world.boot()
    identity_map(world)
    for vcpu in world.vcpus:
        world.access(vcpu, frame_address(20))
        world.access(vcpu, frame_address(21), write=True, value=CONTENTS)
    world.access(world.vcpus[0], frame_address(6, offset=8 * 22), write=True, value=world.gpte(6, 22))
    return world


def copy(world: World) -> World:
    copied = pickle.loads(pickle.dumps(world))
    assert isinstance(copied, World)
    return copied


def go_on(world: World) -> list[object]:
    """What some accesses more give."""
    return [
        world.access(vcpu, frame_address(gfn), write=gfn % 2 == 0, value=gfn)
        for vcpu in world.vcpus
        for gfn in range(20, 30)
    ]


def test_it_goes_on_alike() -> None:
    world = used_world()
    copied = copy(world)
    assert go_on(copied) == go_on(world)
    assert copied.events == world.events
    assert copied.kvm.stat == world.kvm.stat
    assert mmu_audit(copied.kvm) == []


def test_contexts_and_formats_are_the_programs_own() -> None:
    world = used_world()
    copied = copy(world)
    for vcpu, other in zip(world.vcpus, copied.vcpus, strict=True):
        assert other.mmu.context is vcpu.mmu.context
        assert other.mmu.fmt is vcpu.mmu.fmt


def test_stores_in_one_are_not_seen_in_the_other() -> None:
    world = used_world()
    copied = copy(world)
    copied.access(copied.vcpus[0], frame_address(21), write=True, value=7)
    assert copied.kvm.memory.read(21 << 12, 8) == 7
    assert world.kvm.memory.read(21 << 12, 8) == CONTENTS
    assert all(slot.words is slot.memory.words for slot in copied.kvm.memslots)


def test_a_frame_that_is_being_replaced_still_stores_to_the_page() -> None:
    world = used_world()
    kvm = world.kvm
    slot = kvm.memslots[0]
    kvm.host.readonly.add(21)
    old = kvm.host.page_pfn(slot, 21)
    world.start(host.break_cow(kvm, slot, 21)).until(Point.HOST_COW)
    copied = copy(world)
    copied.kvm.host.old_frames[old].write(0, 8, 7)
    assert copied.kvm.memory.read(21 << 12, 8) == 7
    assert kvm.memory.read(21 << 12, 8) == CONTENTS
