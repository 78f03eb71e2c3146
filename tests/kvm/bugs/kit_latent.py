"""What the tests of parts A and C of the catalogue have in common: a guest's tables, and what is wrong with a shadow."""

from collections.abc import Iterator

from shadowmmu.conform.hardware import Fault, hardware_walk
from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK, PT_PAGE_SIZE_MASK
from shadowmmu.kvm import (
    FaultOutcome,
    Instruction,
    Kvm,
    Outcome,
    ShadowPage,
    Vcpu,
    kvm_mmu_page_fault,
    kvm_set_cr3,
)
from shadowmmu.protocol.events import AuditFailed
from tests.kvm.kit import PAGE, READ, TABLE, WRITE, A, D, P, U, W, World, frame_address, gva, identity_map

L3, L2, T = 17, 18, 19  # the tables of the addresses below 512 GiB
G = 40  # the frame that x maps
X = gva(l1=9)  # T[9] maps G
P1, P2 = 50, 51
STORE_TO_X = frame_address(T, 9 * 8)  # where the guest stores x's entry
LARGE = PAGE | PT_PAGE_SIZE_MASK


def world_of(profile: str, vcpus: int = 2, **config: int) -> World:
    """vCPUs on the same tables; T is reached from two entries of L2. Frames P1 and P2 hold 111 and 222."""
    world = World(vcpus, profile, **config)
    identity_map(world)
    world.set_gpte(world.root, 0, L3, TABLE)
    world.set_gpte(L3, 0, L2, TABLE)
    world.set_gpte(L2, 0, T, TABLE)
    world.set_gpte(L2, 1, T, TABLE)
    world.set_gpte(T, 9, G)
    world.set_gpte(T, 10, 52)  # so that something is left when x's entry is gone
    world.kvm.memory.write(P1 << 12, 8, 111)
    world.kvm.memory.write(P2 << 12, 8, 222)
    world.boot()
    return world


def with_and_without(slug: str) -> list[tuple[str, bool]]:
    """(profile, whether it has the bug) for a fix that 3.1 lacks."""
    return [("linux-3.1", True), (f"fixed-{slug}", True), (f"linux-3.1+{slug}", False), ("fixed", False)]


def entry(gfn: int, bits: int = PAGE) -> int:
    return gfn << 12 | bits


def make_unsync(world: World, vcpu: Vcpu) -> None:
    """The guest stores x's entry as it is: from then on stores to T cause no exit."""
    world.access(vcpu, STORE_TO_X, write=True, value=world.gpte(T, 9))
    assert not world.is_write_protected(T)


def reload_cr3(world: World, vcpu: Vcpu) -> None:
    """MOV to CR3 of the same value: all translations of the vCPU are invalid."""
    world.exit(vcpu)
    assert world.run(kvm_set_cr3(vcpu, vcpu.cr3)) is False


def kernel_access(world: World, vcpu: Vcpu, address: int, write: bool = False) -> FaultOutcome | None:
    """An access of the guest's kernel, without a TLB: None if it succeeds, or why it ended otherwise."""
    kind = WRITE if write else READ
    for _ in range(9):
        world.enter(vcpu)
        walk = hardware_walk(vcpu, address, kind, False)
        if not isinstance(walk, Fault):
            return None
        world.exit(vcpu)
        instruction = Instruction(kind, address, 8)
        outcome: FaultOutcome = world.run(kvm_mmu_page_fault(vcpu, address, walk.error_code, instruction))
        if outcome.outcome is not Outcome.RETRY:
            return outcome
    raise AssertionError("the access makes no progress")


def audit_failures(world: World) -> list[str]:
    """The checks that the model has reported as failed."""
    return [event.check for event in world.events if isinstance(event, AuditFailed)]


def _tables_in_sync(kvm: Kvm) -> Iterator[ShadowPage]:
    """Pages that follow a 64-bit guest table, all stores to which KVM intercepts."""
    for sp in kvm.active_mmu_pages.values():
        if not (sp.direct or sp.invalid or sp.unsync):
            yield sp


def stale_entries(world: World) -> list[str]:
    """Entries of pages in sync that do not follow from the guest's table: nothing repairs them."""
    stale = []
    for sp in _tables_in_sync(world.kvm):
        for index, spte in sp.spt.items():
            if not world.kvm.spte_format.is_shadow_present(spte):
                continue
            gpte = world.gpte(sp.gfn, index)
            gfn = (gpte & PT64_BASE_ADDR_MASK) >> 12
            where = f"entry {index} of {sp!r}, guest entry {gpte:#x}"
            if not gpte & P or not gpte & A:
                stale.append(f"{where}: nothing may be mapped")
            elif sp.level == 1:
                if sp.gfns[index] != gfn:
                    stale.append(f"{where}: frame {sp.gfns[index]} is mapped")
                if spte & W and not (gpte & W and gpte & D):
                    stale.append(f"{where}: it is mapped writable")
                if spte & U and not gpte & U:
                    stale.append(f"{where}: it is mapped for the user")
            elif not spte & PT_PAGE_SIZE_MASK:
                child = world.kvm.child(spte)
                large = gpte & PT_PAGE_SIZE_MASK != 0
                if child.direct != large or child.gfn != gfn:
                    stale.append(f"{where}: leads to {child!r}")
    return stale
