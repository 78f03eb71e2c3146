"""Rights that a shadow gives and the guest's tables do not: A3, A6, A7, A15. One vCPU does it all, but for A7."""

import pytest

from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PT64_NX_MASK,
    PT_PAGE_SIZE_MASK,
    X86_CR0_WP,
    X86_CR4_PAE,
    X86_CR4_SMEP,
)
from shadowmmu.kvm import FaultOutcome, Instruction, Outcome, Point, kvm_mmu_page_fault, mmu_audit, set_regs
from tests.kvm.bugs.kit_latent import (
    L2,
    L3,
    STORE_TO_X,
    G,
    T,
    X,
    entry,
    kernel_access,
    make_unsync,
    reload_cr3,
    with_and_without,
    world_of,
)
from tests.kvm.kit import (
    CR0,
    EFER_64,
    PAGE,
    TABLE,
    WRITE,
    A,
    D,
    P,
    U,
    W,
    World,
    drive,
    frame_address,
    gva,
    identity_map,
)

READ_ONLY = P | U | A


def injected(outcome: FaultOutcome | int | None) -> int | None:
    """The error code of the page fault that an access ended with; None if it did not."""
    if isinstance(outcome, FaultOutcome) and outcome.outcome is Outcome.INJECT:
        assert outcome.inject is not None
        return outcome.inject[0]
    return None


@pytest.mark.parametrize(
    "profile, granted",
    [
        ("linux-3.1", True),
        ("linux-3.1+inherited-perms", False),
        ("fixed", False),
        ("fixed-inherited-perms", False),
    ],
)
def test_a3_a_shadow_page_is_shared_by_entries_of_other_rights(profile: str, granted: bool) -> None:
    """In `fixed` without the fix unexpected-role (A9) mends this: it does not follow a page of other rights."""
    world = World(1, profile)
    identity_map(world)
    table_d, t1, t2 = 18, 19, 20
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, table_d, TABLE)  # e1
    world.set_gpte(L3, 1, table_d, READ_ONLY)  # e2
    world.set_gpte(table_d, 1, t1, READ_ONLY)
    world.set_gpte(table_d, 2, t2, TABLE)
    world.set_gpte(t1, 0, 60)
    world.set_gpte(t2, 0, 61)
    world.boot()
    vcpu = world.vcpus[0]
    world.access(vcpu, gva(l3=0, l2=1))
    assert world.access(vcpu, gva(l3=0, l2=2), write=True, value=1) == 1
    world.access(vcpu, gva(l3=1, l2=1))
    outcome = world.access(vcpu, gva(l3=1, l2=2), write=True, value=2)  # e2 does not allow it
    assert (injected(outcome) is None) is granted
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile, stale", with_and_without("pf-injection-no-sync"))
@pytest.mark.parametrize("bits", [P | W | A | D, 0], ids=["for the kernel", "not present"])
def test_a6_a_translation_outlives_a_page_fault(profile: str, stale: bool, bits: int) -> None:
    """Whatever the fault's reason: upstream's fix asks for P in the error code, the architecture does not."""
    world = world_of(profile, vcpus=1)
    vcpu = world.vcpus[0]
    world.set_gpte(T, 9, G, READ_ONLY)
    world.kvm.memory.write(G << 12, 8, 7)
    assert world.access(vcpu, X) == 7
    make_unsync(world, vcpu)
    assert world.try_store(vcpu, STORE_TO_X, entry(G, bits) if bits else 0)  # and no INVLPG
    code = injected(world.access(vcpu, X, write=True, value=1))
    assert code is not None
    assert code & PFERR_PRESENT_MASK == bool(bits)
    after = world.access(vcpu, X)  # the fault has removed the translation: this one faults too
    assert after == 7 if stale else injected(after) is not None
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile, stale", with_and_without("pf-injection-no-sync"))
def test_a6_a_page_fault_that_the_emulator_finds_too(profile: str, stale: bool) -> None:
    world = world_of(profile)
    zero, one = world.vcpus
    protected = frame_address(L2)
    leaf_table = 6  # of identity_map
    world.access(zero, X)
    world.access(zero, protected)
    world.access(one, frame_address(leaf_table, 8 * L2), write=True, value=entry(L2))
    world.exit(zero)
    store = Instruction(WRITE, protected + 8 * 100, 8, 0, user=True)
    fault = world.start(kvm_mmu_page_fault(zero, store.gva, 7, store)).until(Point.EMULATE_FAULT)
    assert world.try_store(one, frame_address(leaf_table, 8 * L2), entry(L2, P | W | A | D))
    assert injected(fault.finish()) is not None
    assert (injected(world.access(zero, protected)) is None) is stale


@pytest.mark.parametrize("profile, stale", with_and_without("sync-wrong-role"))
def test_a7_a_table_is_synchronised_by_the_rules_of_another_vcpu(profile: str, stale: bool) -> None:
    """vCPU 1 has NX off, so that bit 63 is reserved for it; vCPU 0 has it on, and makes T a table of level 2."""
    world = world_of(profile)
    zero, one = world.vcpus
    drive(set_regs(one, CR0, world.root << 12, X86_CR4_PAE, EFER_LME | EFER_LMA))
    world.kvm.memory.write(G << 12, 8, 7)
    assert world.access(one, X) == 7
    make_unsync(world, zero)
    assert world.try_store(zero, STORE_TO_X, entry(G, PAGE | PT64_NX_MASK))
    world.set_gpte(L3, 1, T, TABLE)
    world.set_gpte(52, 0, 60)  # T[10] leads to frame 52
    world.access(zero, gva(l3=1, l2=10))
    assert world.is_write_protected(T)
    reload_cr3(world, one)
    after = world.access(one, X)
    if stale:  # for ever: T is in sync now
        assert after == 7
    else:
        assert injected(after) == PFERR_USER_MASK | PFERR_PRESENT_MASK | PFERR_RSVD_MASK
    assert mmu_audit(world.kvm) == []


@pytest.mark.parametrize("profile, missed", with_and_without("wp0-dirty-missed"))
@pytest.mark.parametrize("smep", [0, X86_CR4_SMEP])
def test_a15_a_kernel_write_goes_by_a_read_only_large_page_without_its_dirty_bit(
    profile: str, missed: bool, smep: int
) -> None:
    world = World(1, profile)
    vcpu = world.vcpus[0]
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    for index in range(2):
        world.set_gpte(L2, index, 512, READ_ONLY | PT_PAGE_SIZE_MASK)
    drive(set_regs(vcpu, CR0 & ~X86_CR0_WP, world.root << 12, X86_CR4_PAE | smep, EFER_64))
    one, two = gva(l2=0), gva(l2=1)
    assert kernel_access(world, vcpu, one, write=True) is None
    assert world.gpte(L2, 0) & D
    assert (
        kernel_access(world, vcpu, two + (16 << 12)) is None
    )  # links the page in which the entry for `one` is
    assert not world.gpte(L2, 1) & D
    assert kernel_access(world, vcpu, two, write=True) is None
    assert (world.gpte(L2, 1) & D == 0) is missed
    # What the kernel may write so, the user may not.
    assert injected(world.access(vcpu, one, write=True)) is not None
    assert mmu_audit(world.kvm) == []
