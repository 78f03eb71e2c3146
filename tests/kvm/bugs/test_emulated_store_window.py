"""N1: a vCPU that has seen an emulated store to a table invalidates, before the shadow knows of the store."""

from collections.abc import Callable
from typing import Any

import pytest

from shadowmmu.kvm import EmulatedStores, Operation, Point, kvm_mmu_invlpg, kvm_set_cr3
from shadowmmu.kvm.emulate import emulator_write_phys
from shadowmmu.kvm.vcpu import Vcpu
from tests.kvm.kit import TABLE, Running, World, gva, identity_map

L3, L2, T, OTHER = 17, 18, 19, 20
OLD, NEW = 40, 41
X = gva(l1=9)


def invlpg(vcpu: Vcpu) -> Operation[None]:
    return kvm_mmu_invlpg(vcpu, X)


def reload_cr3(vcpu: Vcpu) -> Operation[bool]:
    return kvm_set_cr3(vcpu, vcpu.cr3)


def stored(profile: str) -> tuple[World, Running]:
    """vCPU 0's store of L2[0] := OTHER is in memory; the shadow still leads to T. vCPU 1 has exited."""
    world = World(2, profile)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(T, 9, OLD)
    world.set_gpte(OTHER, 9, NEW)
    world.boot()
    for vcpu in world.vcpus:
        world.access(vcpu, X)
        world.exit(vcpu)
    store = emulator_write_phys(world.vcpus[0], L2 << 12, 8, OTHER << 12 | TABLE)
    return world, world.start(store).until(Point.PTE_WRITE_STORED)


@pytest.mark.parametrize("invalidate", [invlpg, reload_cr3])
@pytest.mark.parametrize("profile", ["linux-3.1", "fixed-emulated-store-window"])
def test_without_the_fix_an_invalidation_leaves_what_the_store_has_replaced(
    profile: str, invalidate: Callable[[Vcpu], Operation[Any]]
) -> None:
    world, _ = stored(profile)
    one = world.vcpus[1]
    world.run(invalidate(one))
    world.access(one, X)
    assert world.tlbs[1][X >> 12][0] == world.kvm.host.pfn(OLD)


@pytest.mark.parametrize("invalidate", [invlpg, reload_cr3])
def test_with_the_fix_it_waits_until_the_shadow_knows(invalidate: Callable[[Vcpu], Operation[Any]]) -> None:
    world, store = stored("fixed")
    one = world.vcpus[1]
    invalidation = world.start(invalidate(one)).until(EmulatedStores.BUSY)
    store.finish()
    invalidation.finish()
    world.access(one, X)
    assert world.tlbs[1][X >> 12][0] == world.kvm.host.pfn(NEW)
