"""The host agent changes memory slots while vCPUs run."""

from shadowmmu.kvm import VcpuMode
from shadowmmu.machine import HostAsked, VcpuSent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import FrameRevoked, OperationEnded, OperationStarted
from tests.machine.guest import WRITE, Driven

SLOT, BASE, PAGES = 2, (1 << 15) + 8, 8
CREATE = m.SetMemoryRegion(SLOT, BASE, PAGES)
MOVE = m.SetMemoryRegion(SLOT, BASE + PAGES, PAGES)
DELETE = m.SetMemoryRegion(SLOT, BASE, 0)


def results(driven: Driven) -> list[int]:
    taken, driven.done = [done.result for done in driven.done], []
    return taken


def test_the_host_agent_creates_moves_and_deletes_a_slot() -> None:
    driven = Driven(vcpus=1)
    kvm = driven.runner.machine.kvm
    for operation, base in ((CREATE, BASE), (MOVE, BASE + PAGES), (DELETE, None)):
        driven.host(operation)
        slot = kvm.memslot(SLOT)
        assert (None if slot is None else slot.base_gfn) == base
    assert results(driven) == [1, 1, 1]
    assert sum(isinstance(event, FrameRevoked) for event in driven.events) == PAGES


def test_what_makes_no_sense_any_more_has_the_result_0() -> None:
    driven = Driven(vcpus=1)
    driven.host(DELETE)
    driven.host(CREATE)
    driven.host(m.SetMemoryRegion(SLOT + 1, BASE + 1, 1))
    driven.submit(HostAsked(1, DELETE))
    driven.submit(HostAsked(1, m.Unmap(BASE)))
    driven.settle()
    assert results(driven)[:3] == [0, 1, 0]
    driven.host(m.GetDirtyLog(SLOT))
    assert driven.refused[-1].text == f"there is no memory slot {SLOT}"


def test_a_slot_beyond_all_addresses_is_refused() -> None:
    machine = Driven(vcpus=1).runner.machine
    text = machine.host_refusal(m.SetMemoryRegion(SLOT, 1 << 24, 1))
    assert text is not None and "beyond" in text
    assert machine.host_refusal(DELETE) is None


def test_deleting_a_slot_waits_for_exits_that_are_being_handled() -> None:
    """vCPU 0's fault waits for mmu_lock, whose holder waits for vCPU 1, which is silent."""
    driven = Driven()
    driven.host(CREATE)
    for vcpu in (0, 1):
        driven.enter(vcpu)
        driven.map_page(vcpu, 7)
    driven.submit(HostAsked(7, m.ZapAll()))
    driven.settle()
    for vcpu in (0, 1):
        assert driven.runner.machine.kvm.vcpus[vcpu].mode is VcpuMode.EXITING_GUEST_MODE
    driven.send(0, m.Exit(driven.entry(0), m.PageFaultExit(9 << 12, 4, m.Instruction(0))))
    driven.submit(HostAsked(8, DELETE))
    driven.settle()
    assert driven.runner.machine.kvm.memslot(SLOT) is not None
    waiting = {
        operation["name"]: operation["at"] for operation in driven.runner.machine.operations_under_way()
    }
    assert waiting["host.set_memory_region"] == "SRCU"
    while len(driven.done) < 3:  # from now on both answer their kicks
        for lane in driven.runner.machine.lanes:
            if lane.vcpu.mode is VcpuMode.EXITING_GUEST_MODE:
                driven.send(lane.number, m.Exit(lane.entry, m.ExternalInterruptExit()))
    assert {done.ticket: done.result for done in driven.done}[8] == 1
    started = {e.op: e.name for e in driven.events if isinstance(e, OperationStarted)}
    ended = [started[e.op] for e in driven.events if isinstance(e, OperationEnded)]
    assert ended.index("vcpu.page_fault") < len(ended) - 1 - ended[::-1].index("host.set_memory_region")


def test_a_store_by_a_stale_translation_of_a_deleted_slot_goes_nowhere() -> None:
    driven = Driven(vcpus=1)
    driven.host(CREATE)
    pfn = driven.runner.machine.host.pfn(BASE)
    driven.enter(0)
    driven.submit(HostAsked(1, DELETE))
    driven.settle()
    log = m.Log(driven.entry(0), [(WRITE, 0, pfn, 8, 1), (0, 0, pfn, 8, 0)])
    assert driven.runner.machine.refusal(0, log) is None
    driven.submit(VcpuSent(0, log))
    driven.settle()
    assert driven.take(0)
