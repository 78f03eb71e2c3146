"""Stores of KVM that its own later loads overtake: A5 and the barriers of B22, and the store buffer itself."""

from typing import Any

import pytest

from shadowmmu.kvm import (
    FIXES,
    FaultOutcome,
    Finding,
    Instruction,
    InstructionKind,
    Kick,
    MemorySlot,
    MmuLock,
    Operation,
    Point,
    StoreBuffer,
    Vcpu,
    VcpuMode,
    host,
    kvm_flush_remote_tlbs,
    kvm_mmu_invlpg,
    kvm_mmu_zap_all,
    kvm_set_cr3,
    migrate,
    mmu_audit,
    set_dirty_logging,
    vcpu_enter_guest,
)
from shadowmmu.kvm.emulate import x86_emulate_instruction
from shadowmmu.kvm.store_buffer import GuestStore, ModeStore
from shadowmmu.protocol.events import EmulatedStore
from shadowmmu.protocol.messages import MemoryModel
from tests.kvm.kit import PAGE, TABLE, WRITE, World, frame_address, gva, identity_map

SC, TSO = MemoryModel.SC, MemoryModel.TSO
L3, L2, T = 17, 18, 19  # the tables of the addresses below 512 GiB
X = gva(l1=9)  # T[9] maps OLD, later NEW
OLD, NEW = 50, 51
STORE_TO_T = frame_address(T, 9 * 8)


def entry(gfn: int) -> int:
    return gfn << 12 | PAGE


def world_of(profile: str, memory_model: MemoryModel = TSO, **config: Any) -> World:
    """Two vCPUs on the same tables, which map X to OLD."""
    world = World(2, profile, memory_model=memory_model, **config)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(T, 9, OLD)
    world.kvm.memory.write(OLD << 12, 8, 111)
    world.kvm.memory.write(NEW << 12, 8, 222)
    world.boot()
    return world


def store_to_t(vcpu: Vcpu, size: int = 8, kind: InstructionKind = WRITE) -> Operation[FaultOutcome]:
    """The emulator's store of the entry that maps X to NEW."""
    return x86_emulate_instruction(vcpu, Instruction(kind, STORE_TO_T, size, entry(NEW), user=True))


# --- A5: the test for shadowed tables overtakes the store to guest memory ---------------------------------------------


@pytest.mark.parametrize(
    "profile, memory_model, stale",
    [
        ("linux-3.1", TSO, True),
        ("linux-3.1", SC, False),
        ("linux-3.1+pte-write-fastexit-barrier", TSO, False),
    ],
)
def test_a5_a_store_in_the_buffer_escapes_who_shadows_the_table(
    profile: str, memory_model: MemoryModel, stale: bool
) -> None:
    world = world_of(profile, memory_model)
    zero, one = world.vcpus
    storing = world.start(store_to_t(zero)).until(Point.PTE_WRITE_STORED)
    assert world.kvm.indirect_shadow_pages == 0
    if stale:
        storing.until(Point.PTE_WRITE_NO_SHADOW)
    else:
        storing.finish()
    assert world.access(one, X) == (111 if stale else 222)  # shadows T
    storing.finish()
    world.enter(zero)
    assert world.gpte(T, 9) == entry(NEW)
    # T is in sync as far as KVM knows: neither INVLPG nor a write of CR3 repairs its shadow.
    for repair in (kvm_mmu_invlpg(one, X), kvm_set_cr3(one, one.cr3)):
        world.exit(one)
        world.run(repair)
        assert world.access(one, X) == (111 if stale else 222)
    assert mmu_audit(world.kvm) == []


# --- B22: the last test of requests overtakes the store of guest mode -------------------------------------------------


@pytest.mark.parametrize(
    "profile, memory_model, lost",
    [
        ("linux-3.1-mode-request-barrier", TSO, True),
        ("linux-3.1-mode-request-barrier", SC, False),
        ("linux-3.1", TSO, False),
    ],
)
def test_b22_a_flush_is_lost_on_a_vcpu_that_seems_to_be_outside(
    profile: str, memory_model: MemoryModel, lost: bool
) -> None:
    world = world_of(profile, memory_model)
    _, one = world.vcpus
    assert world.access(one, X, write=True, value=1) == 1  # TLB 1: X -> OLD, writable
    world.exit(one)
    entering = world.start(vcpu_enter_guest(one))
    point = Point.ENTER_GUEST_MODE_BUFFERED if lost else Point.ENTER_GUEST_REQUESTS
    unmapping = world.start(host.unmap(world.kvm, OLD)).until(Point.HOST_UNMAPPED)
    entering.until(point)
    unmapping.finish()  # sees vCPU 1 outside guest mode, kicks nobody and returns
    entered = entering.finish()
    assert one.mode is VcpuMode.IN_GUEST_MODE
    assert (entered.hw_flushes == 0) is lost
    if entered.hw_flushes:
        world.tlbs[1].clear()
    # The frame is the host's again.
    assert world.try_store(one, X, 2) is lost


def test_b22_the_barrier_after_setting_a_request_changes_nothing() -> None:
    """Both the bit and the mode are accessed by locked operations, which are barriers on x86."""
    assert FIXES["request-mode-barrier"].finding is Finding.EQUIVALENT
    seen = []
    for profile in ("fixed", "fixed-request-mode-barrier"):
        world = world_of(profile)
        zero, one = world.vcpus
        world.access(one, X)
        storing = world.start(store_to_t(zero)).until(Point.PTE_WRITE_STORED)
        flushing = world.start(kvm_flush_remote_tlbs(world.kvm))
        seen.append((flushing.step(), one.requests, one.mode, flushing.finish()))
        storing.finish()
    assert seen[0] == seen[1]
    assert seen[0][0] == Kick((1,))


# --- the store buffer --------------------------------------------------------------------------------------------------


def buffered(world: World) -> StoreBuffer:
    buffer = world.vcpus[0].store_buffer
    assert buffer is not None
    return buffer


def test_a_buffered_store_is_an_event_and_in_the_dirty_log_when_it_is_visible() -> None:
    world = world_of("linux-3.1")
    world.run(set_dirty_logging(world.kvm, 0, True))
    storing = world.start(store_to_t(world.vcpus[0])).until(Point.PTE_WRITE_NO_SHADOW)
    world.events.clear()
    dirty = world.kvm.memslots[0].dirty_bitmap
    assert dirty is not None
    dirty.clear()  # of what the walk has set in guest entries
    assert world.gpte(T, 9) == entry(OLD)
    assert buffered(world).drainable
    buffered(world).drain_oldest()
    assert world.gpte(T, 9) == entry(NEW)
    assert [type(event) for event in world.events] == [EmulatedStore]
    assert dirty == {T}
    storing.finish()
    assert not buffered(world)


def test_with_sequential_consistency_there_are_no_store_buffers() -> None:
    world = world_of("linux-3.1", SC)
    assert [vcpu.store_buffer for vcpu in world.vcpus] == [None, None]


def test_a_locked_operation_of_the_emulator_is_visible_at_once() -> None:
    world = world_of("linux-3.1")
    world.start(store_to_t(world.vcpus[0], kind=InstructionKind.XCHG)).until(Point.PTE_WRITE_STORED)
    assert world.gpte(T, 9) == entry(NEW)


def test_taking_mmu_lock_makes_stores_visible() -> None:
    world = world_of("linux-3.1")
    zero, one = world.vcpus
    world.access(one, X)  # T is shadowed
    storing = world.start(store_to_t(zero)).until(Point.PTE_WRITE_LOCK)
    assert world.gpte(T, 9) == entry(OLD)
    storing.until(MmuLock.ACQUIRE)
    assert world.gpte(T, 9) == entry(NEW)


def test_the_thread_reads_what_it_has_stored() -> None:
    """A store of four bytes to an entry of eight: the whole entry is read again, with the store in it."""
    world = world_of("linux-3.1")
    zero, one = world.vcpus
    world.access(one, X)
    world.run(store_to_t(zero, size=4))
    world.exit(one)
    world.tlbs[1].clear()
    assert world.access(one, X) == 222


@pytest.mark.parametrize(
    "gpa, size, value, loaded",
    [
        (0, 4, 0xAABBCCDD, 0xAABBCCDD),
        (2, 4, 0xAABBCCDD, 0xCCDD3210),  # its two low bytes are the high ones of the load
        (-3, 4, 0xAABBCCDD, 0x765432AA),  # its high byte is the low one
        (1, 1, 0xFF, 0x7654FF10),
        (4, 4, 0xAABBCCDD, 0x76543210),
        (-4, 4, 0xAABBCCDD, 0x76543210),
    ],
)
def test_a_load_has_those_bytes_of_a_buffered_store_that_it_reads(
    gpa: int, size: int, value: int, loaded: int
) -> None:
    world = world_of("linux-3.1")
    (slot,) = world.kvm.memslots
    buffered(world).put(GuestStore(slot, 4096 + gpa, size, value, None))
    assert buffered(world).forward(slot, 4096, 4, 0x76543210) == loaded


def test_of_two_buffered_stores_a_load_has_the_later_one() -> None:
    world = world_of("linux-3.1")
    (slot,) = world.kvm.memslots
    for value in (1, 2):
        buffered(world).put(GuestStore(slot, 4096, 4, value, None))
    assert buffered(world).forward(slot, 4096, 4, 0) == 2


def test_a_load_has_nothing_of_stores_to_other_things() -> None:
    """The mode, and the memory that another slot had at the same address."""
    world = world_of("linux-3.1", memslots=(MemorySlot(0, 0, 64), MemorySlot(1, 64, 64)))
    slot, other = world.kvm.memslots
    buffered(world).put(ModeStore(VcpuMode.IN_GUEST_MODE))
    buffered(world).put(GuestStore(other, 4096, 4, 1, None))
    assert buffered(world).forward(slot, 4096, 4, 5) == 5
    assert buffered(world).forward(other, 4096, 4, 5) == 1


@pytest.mark.parametrize("change", [host.unmap, host.reclaim])
def test_the_hosts_own_tlb_flush_makes_stores_visible(change: Any) -> None:
    world = world_of("linux-3.1")
    world.start(store_to_t(world.vcpus[0])).until(Point.PTE_WRITE_NO_SHADOW)
    world.start(change(world.kvm, T)).until(Point.HOST_UNMAPPED)
    assert world.gpte(T, 9) == entry(NEW)


def stored_without_a_barrier(profile: str) -> World:
    """vCPU 0's store to T is in its buffer, and nothing up to guest mode is a barrier."""
    world = world_of(profile)
    zero = world.vcpus[0]
    world.enter(zero)
    world.exit(zero)
    zero.requests = 0
    world.run(kvm_mmu_zap_all(world.kvm))
    zero.requests = 0  # the root of before is used on
    world.run(store_to_t(zero))
    return world


def test_guest_entry_makes_stores_visible_before_guest_mode() -> None:
    world = stored_without_a_barrier("linux-3.1-mode-request-barrier")
    zero = world.vcpus[0]
    entering = world.start(vcpu_enter_guest(zero)).until(Point.ENTER_GUEST_MODE_BUFFERED)
    assert (len(buffered(world)), zero.mode, world.gpte(T, 9)) == (2, VcpuMode.OUTSIDE_GUEST_MODE, entry(OLD))
    buffered(world).drain_oldest()
    assert world.gpte(T, 9) == entry(NEW)
    assert not buffered(world).drainable  # the mode is seen when the vCPU is in the guest
    entering.finish()
    assert zero.mode is VcpuMode.IN_GUEST_MODE


@pytest.mark.parametrize("processor, contents", [(0, OLD), (1, NEW)], ids=["stays", "moves"])
def test_a_thread_that_moves_to_another_processor_leaves_no_stores_behind(
    processor: int, contents: int
) -> None:
    world = stored_without_a_barrier("linux-3.1-mode-request-barrier-stale-on-old-pcpu")
    zero = world.vcpus[0]
    world.run(migrate(zero, processor))
    assert world.gpte(T, 9) == entry(OLD)
    world.start(vcpu_enter_guest(zero)).until(Point.ENTER_GUEST_MODE_BUFFERED)
    assert (zero.cpu, world.gpte(T, 9)) == (processor, entry(contents))


def test_a_vcpu_that_turns_back_for_a_request_is_outside_guest_mode_for_everybody() -> None:
    world = world_of("linux-3.1-mode-request-barrier")
    zero = world.vcpus[0]
    world.enter(zero)
    world.exit(zero)
    entering = world.start(vcpu_enter_guest(zero)).until(Point.ENTER_GUEST_REQUESTS)
    world.run(kvm_flush_remote_tlbs(world.kvm))
    entering.until(Point.ENTER_GUEST_RELOAD)
    assert (zero.mode, len(buffered(world))) == (VcpuMode.OUTSIDE_GUEST_MODE, 0)
    entered = entering.finish()
    assert (entered.passes, entered.hw_flushes, zero.mode) == (2, 1, VcpuMode.IN_GUEST_MODE)
