"""A machine without a trace goes the same way as one with it, also where a bug would stop the kernel and the run is told."""

from collections.abc import Callable, Hashable

import pytest

from shadowmmu.kvm import (
    Instruction,
    InstructionKind,
    Kvm,
    Point,
    kvm_pv_mmu_op_release_pt,
    x86_emulate_instruction,
)
from tests.kvm.bugs.kit_mutants import (
    BLOCK,
    L2,
    LARGE,
    P1,
    P2,
    X_IN_T,
    T,
    X,
    entry,
    let_unsync,
    start_fault,
    store_to_table,
    store_unseen,
    world_of,
)
from tests.kvm.kit import PAGE, READ, World, drive, frame_address, gva


def machine(profile: str, traced: bool) -> World:
    world = world_of(profile)
    if not traced:
        world.kvm.trace = None
    world.events.clear()
    return world


def state(kvm: Kvm) -> Hashable:
    """The shadow pages, the flush that is owed, and what the vCPUs are asked to do."""
    pages = tuple(
        (sp.serial, sp.gfn, sp.role, sp.unsync, tuple(sorted(sp.spt.items())))
        for sp in kvm.active_mmu_pages.values()
    )
    return pages, kvm.tlbs_dirty, tuple(vcpu.requests for vcpu in kvm.vcpus)


def emulated_load(traced: bool) -> tuple[World, object]:
    world = machine("linux-3.1", traced)
    load = Instruction(READ, frame_address(P1), user=True)
    return world, drive(x86_emulate_instruction(world.vcpus[0], load)).value


def locked_operation(traced: bool) -> tuple[World, object]:
    world = machine("linux-3.1", traced)
    add = Instruction(InstructionKind.XADD, frame_address(P1), value=5, user=True)
    old = drive(x86_emulate_instruction(world.vcpus[0], add)).value
    return world, (old, world.kvm.memory.read(P1 << 12, 8))


def local_flush_that_forgets_others(traced: bool) -> tuple[World, object]:
    """Bug B2: T is synchronised, the entry of X dropped, and one vCPU flushes."""
    world = machine("linux-3.1-sync-drop-noflush-clear", traced)
    zero, one = world.vcpus
    world.access(one, X, write=True, value=1)
    world.access(zero, X)
    let_unsync(world, zero)
    store_unseen(world, zero, T, X_IN_T, 0)
    world.access(zero, gva(l2=1, l1=10))
    return world, world.kvm.tlbs_dirty


def direct_page_of_other_frames(traced: bool) -> tuple[World, object]:
    """Bug A8: a large entry that changes behind KVM's back."""
    world = machine("linux-3.1", traced)
    zero = world.vcpus[0]
    world.kvm.memory.write(2 * BLOCK + 16 << 12, 8, 777)
    world.set_gpte(L2, 3, BLOCK, PAGE | LARGE)
    world.access(zero, gva(l2=3))
    world.set_gpte(L2, 3, 2 * BLOCK, PAGE | LARGE)
    return world, world.access(zero, gva(l2=3, l1=16))


def parent_that_is_gone(traced: bool) -> tuple[World, object]:
    """Bug B26: a page noted a parent that never led to it, and that is freed first."""
    world = machine("linux-3.1-unreachable-child", traced)
    zero, one = world.vcpus
    store_to_table(world, one, T, X_IN_T, entry(P1))
    fault = start_fault(world, zero, X).until(Point.BEFORE_LOCK)
    store_unseen(world, one, T, X_IN_T, entry(P2))
    fault.finish()
    for table in (L2, T):
        drive(kvm_pv_mmu_op_release_pt(one, table << 12))
    world.exit(one)
    return world, world.access(one, X)


@pytest.mark.parametrize(
    "scenario, result",
    [
        (emulated_load, 111),
        (locked_operation, (111, 116)),
        (local_flush_that_forgets_others, 0),
        (direct_page_of_other_frames, 777),
        (parent_that_is_gone, 222),
    ],
)
def test_without_a_trace_the_same_happens(
    scenario: Callable[[bool], tuple[World, object]], result: object
) -> None:
    traced, untraced = scenario(True), scenario(False)
    assert traced[1] == untraced[1] == result
    assert state(traced[0].kvm) == state(untraced[0].kvm)
    assert traced[0].events and not untraced[0].events
