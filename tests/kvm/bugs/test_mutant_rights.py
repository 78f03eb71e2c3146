"""Rights that a shadow entry gives beyond the guest's, as Linux 3.1 with one fix less: B13, B15, B27, B28."""

import pytest

from shadowmmu.conform.hardware import Fault, hardware_walk
from shadowmmu.cpu.x86 import EFER_NX, X86_CR0_WP, X86_CR4_PAE, X86_CR4_SMEP
from shadowmmu.kvm import FaultOutcome, kvm_set_cr0, kvm_set_cr4, set_efer, set_regs
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
    invlpg,
    is_page_fault,
    kernel_access,
    let_unsync,
    load_cr3,
    store_unseen,
    with_and_without,
    world_of,
)
from tests.kvm.kit import CR0, EFER_64, EXECUTE, PAGE, READ, TABLE, WRITE, A, D, P, U, W, World, drive, gva

E1, E2 = gva(l2=2, l1=9), gva(l2=3, l1=9)  # by two large entries of the same 2 MiB
NO_EXECUTE = 1 << 63
NEXT = gva(l1=10)  # the neighbour of X, which is prefetched with it


@with_and_without("direct-sp-access")
def test_b13_a_direct_page_does_not_outlive_a_change_of_rights(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(L2, 2, BLOCK, P | W | U | A | LARGE)
    world.set_gpte(L2, 3, BLOCK, P | U | A | D | LARGE)
    world.access(zero, E1)  # D is clear: a read-only direct page
    world.access(zero, E2)  # the same page
    world.access(zero, E1, write=True, value=1)
    assert is_page_fault(world.access(zero, E2, write=True, value=2)) is not broken


@with_and_without("direct-sp-access-leaf")
def test_b13_mappings_with_other_rights_do_not_share_a_direct_page(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(L2, 2, BLOCK, PAGE | LARGE)
    world.set_gpte(L2, 3, BLOCK, P | U | A | D | LARGE)
    world.access(zero, E2)
    world.access(zero, E1, write=True, value=1)
    assert is_page_fault(world.access(zero, E2, write=True, value=2)) is not broken


def kernel_wrote(profile: str, smep: bool = False) -> World:
    """With CR0.WP = 0 the kernel has written X, which the guest's tables give user programs to read."""
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(T, 9, P1, P | U | A | D)
    drive(kvm_set_cr0(zero, CR0 & ~X86_CR0_WP))
    if smep:
        drive(kvm_set_cr4(zero, X86_CR4_PAE | X86_CR4_SMEP))
    assert not kernel_access(world, zero, X, WRITE)
    return world


@with_and_without("role-bits-wp")
def test_b15_what_the_kernel_may_write_it_may_not_write_with_wp(profile: str, broken: bool) -> None:
    world = kernel_wrote(profile)
    (zero,) = world.vcpus
    world.exit(zero)
    world.run(kvm_set_cr0(zero, CR0))
    assert kernel_access(world, zero, X, WRITE) is not broken


@with_and_without("role-bits-nxe")
def test_b15_a_reserved_bit_that_was_none_is_one(profile: str, broken: bool) -> None:
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(T, 9, P1, PAGE | NO_EXECUTE)
    assert world.access(zero, X) == 111
    world.exit(zero)
    world.run(set_efer(zero, EFER_64 & ~EFER_NX))
    assert is_page_fault(world.access(zero, X)) is not broken


@with_and_without("role-bits-user")
def test_b15_what_the_kernel_may_write_a_user_may_not(profile: str, broken: bool) -> None:
    world = kernel_wrote(profile)
    assert is_page_fault(world.access(world.vcpus[0], X, write=True, value=2)) is not broken


@with_and_without("role-bits-smep")
def test_b15_what_the_kernel_has_written_it_may_not_execute_with_smep(profile: str, broken: bool) -> None:
    (zero,) = kernel_wrote(profile, smep=True).vcpus
    assert isinstance(hardware_walk(zero, X, EXECUTE, user=False), Fault) is not broken


def neighbour(profile: str, bits: int, nx: bool = True) -> tuple[World, FaultOutcome | int]:
    """How an access to NEXT ends, whose entry has these bits, after one to X."""
    world = world_of(profile, vcpus=1)
    (zero,) = world.vcpus
    if not nx:
        drive(set_regs(zero, CR0, world.root << 12, X86_CR4_PAE, EFER_64 & ~EFER_NX))
    world.set_gpte(T, 10, P2, bits)
    world.access(zero, X)
    return world, world.access(zero, NEXT)


@with_and_without("prefetch-reserved-bits")
def test_b27_a_reserved_bit_is_not_overlooked_by_prefetch(profile: str, broken: bool) -> None:
    _, result = neighbour(profile, PAGE | NO_EXECUTE, nx=False)
    assert is_page_fault(result) is not broken


@with_and_without("prefetch-present")
def test_b27_an_absent_entry_is_not_overlooked_by_prefetch(profile: str, broken: bool) -> None:
    _, result = neighbour(profile, PAGE & ~P)
    assert is_page_fault(result) is not broken


@with_and_without("prefetch-accessed")
def test_b27_an_entry_that_was_never_used_is_not_prefetched(profile: str, broken: bool) -> None:
    world, result = neighbour(profile, PAGE & ~A)
    assert result == 222
    assert (world.gpte(T, 10) & A == 0) is broken


@pytest.mark.parametrize("slug", ["prefetch-present", "prefetch-accessed"])
@pytest.mark.parametrize("broken", [False, True])
def test_b27_sync_drops_what_is_not_present_or_not_used_any_more(slug: str, broken: bool) -> None:
    world = world_of(f"fixed-{slug}" if broken else "fixed", vcpus=1)
    (zero,) = world.vcpus
    world.set_gpte(T, 9, P1)
    world.access(zero, X)
    let_unsync(world, zero)
    missing = P if slug == "prefetch-present" else A
    store_unseen(world, zero, T, X_IN_T, entry(P1, PAGE & ~missing))
    load_cr3(world, zero)
    world.enter(zero)
    assert isinstance(hardware_walk(zero, X, READ, True), Fault) is not broken


def read_only_above(profile: str) -> World:
    """T is reached through a read-only entry of L2; its own entries allow writing."""
    world = world_of(profile, vcpus=1)
    world.set_gpte(L2, 0, T, TABLE & ~W)
    world.access(world.vcpus[0], X)
    return world


@with_and_without("inherited-in-prefetch")
def test_b28_a_prefetched_entry_gives_no_more_than_the_upper_ones(profile: str, broken: bool) -> None:
    world = read_only_above(profile)
    assert is_page_fault(world.access(world.vcpus[0], NEXT, write=True, value=2)) is not broken


@with_and_without("inherited-in-pte-write")
def test_b28_an_updated_entry_gives_no_more_than_the_upper_ones(profile: str, broken: bool) -> None:
    world = read_only_above(profile)
    (zero,) = world.vcpus
    let_unsync(world, zero)
    invlpg(world, zero, X)
    assert is_page_fault(world.access(zero, X, write=True, value=2)) is not broken


@with_and_without("inherited-in-sync")
def test_b28_a_synchronised_entry_gives_no_more_than_the_upper_ones(profile: str, broken: bool) -> None:
    world = read_only_above(profile)
    (zero,) = world.vcpus
    let_unsync(world, zero)
    load_cr3(world, zero)
    assert is_page_fault(world.access(zero, X, write=True, value=2)) is not broken
