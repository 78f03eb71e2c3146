"""vCPUs that move between physical processors, whose TLBs stay behind: B30."""

import pytest

from shadowmmu.kvm import Kick, Point, Vcpu, VcpuMode, host, kvm_mmu_invlpg, migrate, vcpu_enter_guest
from tests.kvm.kit import PAGE, TABLE, World, frame_address, gva, identity_map

L3, L2, T = 17, 18, 19
X = gva(l1=9)
OLD, NEW = 50, 51


class TwoProcessors:
    """One vCPU, and the TLBs of the processors that it runs on."""

    def __init__(self, profile: str) -> None:
        self.world = world = World(1, profile)
        identity_map(world)
        world.set_gpte(world.root, 0, L3, TABLE)
        world.set_gpte(L3, 0, L2, TABLE)
        world.set_gpte(L2, 0, T, TABLE)
        world.set_gpte(T, 9, OLD)
        world.kvm.memory.write(OLD << 12, 8, 111)
        world.kvm.memory.write(NEW << 12, 8, 222)
        world.boot()
        self.vcpu: Vcpu = world.vcpus[0]
        self.tlbs: dict[int, dict[int, tuple[int, bool]]] = {}

    def move(self, processor: int) -> None:
        """The vCPU leaves the guest and enters it again there."""
        world, vcpu = self.world, self.vcpu
        world.run(migrate(vcpu, processor))
        self.tlbs[vcpu.cpu] = world.tlbs[0]
        world.tlbs[0] = self.tlbs.get(processor, {})
        world.enter(vcpu)
        assert vcpu.cpu == processor


@pytest.mark.parametrize("profile, value", [("linux-3.1", 222), ("linux-3.1-stale-on-old-pcpu", 111)])
def test_b30_what_the_guest_invalidated_elsewhere_is_not_used(profile: str, value: int) -> None:
    run = TwoProcessors(profile)
    world, vcpu = run.world, run.vcpu
    assert world.access(vcpu, X) == 111
    run.move(1)
    assert world.access(vcpu, X) == 111
    world.access(vcpu, frame_address(T, 9 * 8), write=True, value=NEW << 12 | PAGE)
    world.exit(vcpu)
    world.run(kvm_mmu_invlpg(vcpu, X))
    assert world.access(vcpu, X) == 222
    run.move(0)
    assert world.access(vcpu, X) == value


@pytest.mark.parametrize("profile, reached", [("linux-3.1", False), ("linux-3.1-stale-on-old-pcpu", True)])
def test_b30_a_frame_that_the_host_took_away_meanwhile_is_not_reached(profile: str, reached: bool) -> None:
    run = TwoProcessors(profile)
    run.world.access(run.vcpu, X, write=True, value=1)
    run.move(1)
    run.world.run(host.unmap(run.world.kvm, OLD))
    run.world.enter(run.vcpu)
    run.move(0)
    assert run.world.try_store(run.vcpu, X, 2) is reached


def test_a_vcpu_in_the_guest_is_kicked_and_loaded_before_it_enters_again() -> None:
    run = TwoProcessors("linux-3.1")
    run.world.enter(run.vcpu)
    moving = run.world.start(migrate(run.vcpu, 1)).until(Kick((0,)))
    assert (run.vcpu.mode, run.vcpu.cpu) == (VcpuMode.EXITING_GUEST_MODE, 0)
    moving.finish()
    entry = run.world.run(vcpu_enter_guest(run.vcpu))
    assert (run.vcpu.cpu, entry.hw_flushes) == (1, 1)


def test_a_vcpu_that_stays_where_it_is_is_left_alone() -> None:
    run = TwoProcessors("linux-3.1")
    run.world.enter(run.vcpu)
    run.world.run(migrate(run.vcpu, 0))
    assert run.vcpu.mode is VcpuMode.IN_GUEST_MODE


def test_a_move_after_requests_were_served_flushes_on_the_new_processor() -> None:
    run = TwoProcessors("linux-3.1")
    entering = run.world.start(vcpu_enter_guest(run.vcpu)).until(Point.ENTER_GUEST_REQUESTS)
    run.world.run(migrate(run.vcpu, 1))
    assert entering.finish().hw_flushes == 1
