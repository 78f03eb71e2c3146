"""Structures that break, flushes that are missed, accesses that never end: A8, A9, A11, A16 and C8. One vCPU, and a host."""

import pytest

from shadowmmu.cpu.x86 import EFER_NX, PT_PAGE_SIZE_MASK, X86_CR4_PAE
from shadowmmu.kvm import (
    Backing,
    ConfigError,
    EntryStatus,
    KvmConfig,
    MemorySlot,
    Vcpu,
    host,
    kvm_mmu_zap_all,
    mmu_audit,
    set_dirty_logging,
    set_regs,
    vcpu_enter_guest,
)
from shadowmmu.protocol.messages import Tdp
from tests.kvm.bugs.kit_latent import (
    L2,
    L3,
    LARGE,
    P1,
    STORE_TO_X,
    G,
    T,
    X,
    audit_failures,
    make_unsync,
    stale_entries,
    with_and_without,
    world_of,
)
from tests.kvm.kit import CR0, PAGE, TABLE, P, World, drive, gva

FIRST, SECOND = 512, 1024  # first frames of the guest's large pages


def world_with_entry(profile: str, gfn: int, bits: int) -> tuple[World, Vcpu]:
    """L2[3] maps or leads to that frame, which has been used as such at index 0."""
    world = World(1, profile)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 3, gfn, bits)
    world.set_gpte(FIRST, 0, 60)
    world.set_gpte(FIRST, 16, 61)
    for frame, value in ((61, 61), (FIRST + 16, 528), (SECOND + 16, 1040)):
        world.kvm.memory.write(frame << 12, 8, value)
    world.boot()
    vcpu = world.vcpus[0]
    world.access(vcpu, gva(l2=3))
    return world, vcpu


@pytest.mark.parametrize("profile, broken", with_and_without("unexpected-gfn"))
def test_a8_a_large_entry_is_changed_behind_kvms_back(profile: str, broken: bool) -> None:
    world, vcpu = world_with_entry(profile, FIRST, LARGE)
    world.set_gpte(L2, 3, SECOND, LARGE)
    assert world.access(vcpu, gva(l2=3, l1=16)) == 1040
    assert ("kvm_mmu_page_set_gfn" in audit_failures(world)) is broken
    assert bool(mmu_audit(world.kvm)) is broken
    assert bool(stale_entries(world)) is broken
    world.run(kvm_mmu_zap_all(world.kvm))  # the entry is in the reverse map of another frame than it says
    assert ("rmap_remove" in audit_failures(world)) is broken


@pytest.mark.parametrize("profile, broken", with_and_without("unexpected-role"))
def test_a9_a_large_entry_becomes_one_of_a_table_in_the_same_frame(profile: str, broken: bool) -> None:
    world, vcpu = world_with_entry(profile, FIRST, LARGE)
    world.set_gpte(L2, 3, FIRST, TABLE)
    assert world.access(vcpu, gva(l2=3, l1=16)) == 61
    assert ("kvm_mmu_page_set_gfn" in audit_failures(world)) is broken
    assert bool(mmu_audit(world.kvm)) is broken
    assert bool(stale_entries(world)) is broken


@pytest.mark.parametrize("profile, broken", with_and_without("unexpected-role"))
def test_a9_an_entry_of_a_table_becomes_a_large_one_of_the_same_frame(profile: str, broken: bool) -> None:
    """Nothing stops the kernel here: what a direct page should have is in the shadow of a table."""
    world, vcpu = world_with_entry(profile, FIRST, TABLE)
    world.set_gpte(L2, 3, FIRST, LARGE)
    assert world.access(vcpu, gva(l2=3, l1=16)) == 528
    assert bool(stale_entries(world)) is broken
    assert mmu_audit(world.kvm) == []
    # The same table, as such, by another entry.
    world.set_gpte(L2, 4, FIRST, TABLE)
    world.access(vcpu, gva(l2=4))
    assert world.access(vcpu, gva(l2=4, l1=16)) == (528 if broken else 61)


@pytest.mark.parametrize(
    "profile, bits, reached",
    [
        ("linux-3.1", 2, True),
        ("linux-3.1", 3, False),
        ("linux-3.1+tlbs-dirty-truncation", 2, False),
        ("fixed", 2, False),
    ],
)
def test_a11_the_low_bits_of_tlbs_dirty_are_0(profile: str, bits: int, reached: bool) -> None:
    world = world_of(profile, tlbs_dirty_bits=bits)
    zero, one = world.vcpus
    for index in range(11, 14):
        world.set_gpte(T, index, G + index)
    for index in (9, 11, 12, 13):
        world.access(one, gva(l1=index), write=True, value=1)
    world.access(zero, X)
    make_unsync(world, zero)
    for index in (9, 11, 12, 13):
        assert world.try_store(zero, STORE_TO_X + 8 * (index - 9), 0)
    world.access(zero, gva(l2=1, l1=10))  # by the other entry for T: four entries are dropped
    assert world.kvm.tlbs_dirty == 4
    world.run(host.reclaim(world.kvm, G))
    assert world.try_store(one, X, 2) is reached


@pytest.mark.parametrize("bits", [1, 33])
def test_a11_the_int_has_2_to_32_bits(bits: int) -> None:
    with pytest.raises(ConfigError, match="tlbs_dirty_bits"):
        KvmConfig(memslots=(MemorySlot(0, 0, 64),), tlbs_dirty_bits=bits).check()


@pytest.mark.parametrize("profile, leaks", with_and_without("pae-root-leak"))
def test_a16_roots_taken_before_one_that_is_outside_of_memory(profile: str, leaks: bool) -> None:
    world = World(1, profile)
    vcpu = world.vcpus[0]
    world.set_gpte(20, 0, 18, P)
    world.set_gpte(18, 0, 19, TABLE)
    world.set_gpte(19, 0, P1, PAGE)
    world.set_gpte(20, 2, 1 << 20, P)
    drive(set_regs(vcpu, CR0, 20 << 12, X86_CR4_PAE, EFER_NX))
    for _ in range(2):
        assert drive(vcpu_enter_guest(vcpu)).status is EntryStatus.SHUTDOWN
    assert [error.check for error in mmu_audit(world.kvm)] == (["roots"] if leaks else [])
    world.run(kvm_mmu_zap_all(world.kvm))
    assert bool(world.kvm.active_mmu_pages) is leaks  # it can never be freed
    # With all PDPTEs in memory the roots are those of the PDPTEs.
    world.set_gpte(20, 2, 0, 0)
    drive(set_regs(vcpu, CR0, 20 << 12, X86_CR4_PAE, EFER_NX))  # which loads them
    assert drive(vcpu_enter_guest(vcpu)).status is EntryStatus.OK
    assert [root != 0 for root in vcpu.mmu.pae_root] == [True, False, False, False]


@pytest.mark.parametrize("tdp", [None, Tdp.NPT], ids=["paging off", "npt"])
@pytest.mark.parametrize("base", ["fixed", "linux-3.1"])
def test_c8_a_direct_map_never_gets_below_a_read_only_large_entry(base: str, tdp: Tdp | None) -> None:
    def write_after_logging(profile: str) -> object:
        world = World(1, profile, memslots=(MemorySlot(0, 0, 1024, Backing.HUGE_2M),), tdp=tdp)
        kvm, vcpu = world.kvm, world.vcpus[0]
        world.run(host.move(kvm, FIRST, 0x500000, False))  # shared with somebody
        world.access(vcpu, FIRST << 12)
        assert any(
            spte & PT_PAGE_SIZE_MASK for sp in kvm.active_mmu_pages.values() for spte in sp.spt.values()
        )
        world.run(set_dirty_logging(kvm, 0, True))
        kvm.host.readonly.clear()  # nobody shares it any more: the host lets it be written where it is, and says nothing
        return world.access(vcpu, FIRST << 12, write=True, value=5)

    assert write_after_logging(base) == 5
    with pytest.raises(AssertionError, match="no progress"):
        write_after_logging(f"{base}-ro-large-spte-dirty-log")
