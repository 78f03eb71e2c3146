"""What the tests of part B share: a guest with two tables' worth of addresses, kernels with and without a fix.

Relies on `tests.kvm.kit` for machines and drivers. The guest's tables: L3 -> L2 -> T, and T is reached from two entries
of L2. `X` is the address that T[9] maps, at first to the frame G; P1 and P2 are two more frames, which hold 111 and 222.
"""

from collections.abc import Callable
from typing import Any

import pytest

from shadowmmu.conform.hardware import Fault, Misconfiguration, hardware_walk
from shadowmmu.cpu.x86 import PFERR_USER_MASK, X86_CR4_PSE
from shadowmmu.kvm import (
    FaultOutcome,
    Instruction,
    InstructionKind,
    Kick,
    Outcome,
    Vcpu,
    VcpuMode,
    kvm_mmu_invlpg,
    kvm_mmu_page_fault,
    kvm_set_cr3,
    set_regs,
)
from tests.kvm.kit import CR0, PAGE, TABLE, Running, World, drive, frame_address, gva, identity_map

L3, L2, T = 17, 18, 19
G = 40
P1, P2, P3 = 50, 51, 53
X = gva(l1=9)
X_IN_T = 9 * 8  # where the entry of X is in T
Z = gva(l2=2, l1=5)  # mapped by table G, once there is an entry of L2 for it
LARGE = 1 << 7  # bit 7 of an entry: it maps a large page
BLOCK = 512  # the first frame of a block of 2 MiB


def entry(gfn: int, bits: int = PAGE) -> int:
    """A guest entry."""
    return gfn << 12 | bits


def with_and_without(
    slug: str, bases: tuple[str, ...] = ("linux-3.1", "fixed")
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in each base kernel with the fix (`broken` is False) and without it (True)."""
    cases = [(base + suffix, suffix != "") for base in bases for suffix in ("", f"-{slug}")]
    return pytest.mark.parametrize("profile, broken", cases)


def world_of(profile: str, vcpus: int = 2, **config: Any) -> World:
    """A machine with the tables above, all vCPUs on them."""
    world = World(vcpus, profile, **config)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(L2, 1, T, TABLE)
    world.set_gpte(T, 9, G)
    world.set_gpte(T, 10, 52)  # so that something is left when x's entry is gone
    for gfn, value in ((P1, 111), (P2, 222), (P3, 333)):
        world.kvm.memory.write(gfn << 12, 8, value)
    world.boot()
    return world


# What a guest does


def store_to_table(world: World, vcpu: Vcpu, table: int, offset: int, value: int) -> None:
    """The guest stores to one of its tables, with as many exits as it takes."""
    result = world.access(vcpu, frame_address(table, offset), write=True, value=value)
    assert isinstance(result, int) or result.outcome is Outcome.EMULATED


def let_unsync(world: World, vcpu: Vcpu, table: int = T) -> None:
    """The guest stores to a table: from now on it can do so without an exit."""
    store_to_table(world, vcpu, table, 500 * 8, 0)
    assert not world.is_write_protected(table)


def store_unseen(world: World, vcpu: Vcpu, table: int, offset: int, value: int) -> None:
    """A store to a table that needs no exit."""
    assert world.try_store(vcpu, frame_address(table, offset), value)


def invlpg(world: World, vcpu: Vcpu, address: int) -> None:
    world.exit(vcpu)
    world.run(kvm_mmu_invlpg(vcpu, address))


def load_cr3(world: World, vcpu: Vcpu, root: int | None = None) -> None:
    """MOV to CR3, of the same value or of another table."""
    world.exit(vcpu)
    world.run(kvm_set_cr3(vcpu, vcpu.cr3 if root is None else root << 12))


def start_fault(world: World, vcpu: Vcpu, address: int, write: bool = False) -> Running:
    """A page fault exit of a user access, to be driven by the test."""
    world.enter(vcpu)
    world.exit(vcpu)
    kind = InstructionKind.WRITE if write else InstructionKind.READ
    error_code = PFERR_USER_MASK | (2 if write else 0)
    return world.start(kvm_mmu_page_fault(vcpu, address, error_code, Instruction(kind, address, user=True)))


def is_page_fault(result: FaultOutcome | int) -> bool:
    """Whether the access ended with a page fault for the guest."""
    return isinstance(result, FaultOutcome) and result.outcome is Outcome.INJECT


def kernel_access(world: World, vcpu: Vcpu, address: int, kind: InstructionKind) -> bool:
    """An access with supervisor rights, without a TLB; returns whether it ends with a page fault for the guest."""
    for _ in range(9):
        world.enter(vcpu)
        walk = hardware_walk(vcpu, address, kind, user=False)
        assert not isinstance(walk, Misconfiguration)
        if not isinstance(walk, Fault):
            return False
        world.exit(vcpu)
        instruction = Instruction(kind, address, 8, 7)
        outcome = world.run(kvm_mmu_page_fault(vcpu, address, walk.error_code, instruction))
        if outcome.outcome is not Outcome.RETRY:
            return is_page_fault(outcome)
    raise AssertionError("the access makes no progress")


# What a processor has


def reaches(world: World, vcpu: Vcpu, address: int, pfn: int) -> bool:
    """Whether the vCPU would use that host frame for a read of the address now, by its TLB or by a walk.

    A vCPU that is outside of guest mode serves its requests first.
    """
    world.enter(vcpu)
    return world.translate(vcpu, address) == pfn


def until_kick(running: Running) -> Running:
    """Run an operation until it waits for vCPUs that it has kicked, which have not answered yet."""
    while not (isinstance(running.effect, Kick) and running.effect.vcpus):
        running.step()
        assert not running.done, "nobody was kicked"
    return running


def in_guest(vcpu: Vcpu) -> bool:
    """Whether the vCPU runs its guest, kicked or not."""
    return vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE


class TwoLevelWorld(World):
    """A machine with 32-bit paging; tables have 1024 entries of 4 bytes. PD is the root; PD[1] maps frames 0 to 63."""

    WINDOW = 6

    def gpte(self, table: int, index: int) -> int:
        return self.kvm.memory.read((table << 12) + 4 * index, 4)

    def set_gpte(self, table: int, index: int, gfn: int, bits: int = PAGE) -> None:
        self.kvm.memory.write((table << 12) + 4 * index, 4, gfn << 12 | bits if bits else 0)

    def boot(self) -> None:
        self.set_gpte(self.root, 1, self.WINDOW, TABLE)
        for frame in range(64):
            self.set_gpte(self.WINDOW, frame, frame)
        for gfn, value in ((P1, 111), (P2, 222), (P3, 333)):
            self.kvm.memory.write(gfn << 12, 8, value)
        for vcpu in self.vcpus:
            drive(set_regs(vcpu, CR0, self.root << 12, X86_CR4_PSE, 0))

    def store_entry(self, vcpu: Vcpu, table: int, index: int, value: int) -> None:
        """The guest stores an entry, together with the one behind it, which it clears."""
        result = self.access(vcpu, (1 << 22) + (table << 12) + 4 * index, write=True, value=value)
        assert isinstance(result, int)


def address32(directory_index: int, index: int) -> int:
    """An address of a 32-bit guest."""
    return directory_index << 22 | index << 12
