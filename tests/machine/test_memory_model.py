"""Store buffers in the machine: what may become visible when, runs with them, and a flush that they lose."""

from __future__ import annotations

import io
from typing import Any

import pytest

from shadowmmu.checker import Checker
from shadowmmu.cpu.x86 import PFERR_PRESENT_MASK, PFERR_WRITE_MASK
from shadowmmu.kvm import Point, StoreBuffer
from shadowmmu.machine import (
    Attached,
    HostAsked,
    Input,
    Machine,
    Task,
    ToVcpu,
    VcpuSent,
    read_journal,
    replay_records,
)
from shadowmmu.machine.choices import SeededChoices
from shadowmmu.machine.event_stream import EventStream
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import EmulatedStore, Event
from tests.machine.guest import ENTRY, FIRST_PFN, TABLES, WRITE, boot
from tests.machine.test_inprocess import Run, config

TSO = m.MemoryModel.TSO
PAGE = 7
ALIAS = 8  # a page that maps the guest's table of level 2: stores to it are emulated


class Stepwise:
    """A machine of two vCPUs whose operations a test advances one point at a time."""

    def __init__(self, profile: str) -> None:
        self.events: list[Event] = []
        self.stream = EventStream(lambda _first, events, _data: self.events.extend(events))
        run = m.RunConfig(profile=profile, memory_model=TSO, host_rate=0.0, audit=m.Audit.NEVER)
        self.machine = Machine(run, SeededChoices(0), self.stream, stepwise=True)
        self._records = 0
        for vcpu in (0, 1):
            self.submit(Attached(vcpu, 1))
            for operation in boot(vcpu, m.GuestMode.PAGING64):
                self.submit(HostAsked(0, operation))
                self.settle()
        self.submit(HostAsked(0, m.WritePhys([((TABLES + 3 << 12) + 8 * ALIAS, TABLES + 2 << 12 | ENTRY)])))
        self.settle()

    def submit(self, item: Input) -> None:
        self._records += 1
        self.machine.submit(item, self._records)

    def send(self, vcpu: int, *bodies: Any) -> list[m.MmuMessage]:
        for body in bodies:
            self.submit(VcpuSent(vcpu, body))
        self.settle()
        return self.sent(vcpu)

    def sent(self, vcpu: int) -> list[m.MmuMessage]:
        """What the machine has sent to the vCPU since this was last asked of any."""
        outputs, self.machine.outputs = self.machine.outputs, []
        return [output.body for output in outputs if isinstance(output, ToVcpu) and output.vcpu == vcpu]

    def settle(self) -> None:
        while ready := self.machine.ready():
            self.machine.advance(ready[0])

    def until(self, name: str, point: Point | None) -> None:
        """Advances the operation of that name to the point; to its end with None."""
        while task := next((t for t in self.machine.ready() if isinstance(t, Task) and t.name == name), None):
            if task.point is point and point is not None:
                return
            self.machine.advance(task)
        assert point is None, f"{point} was not reached"

    def entry(self, vcpu: int) -> int:
        return self.machine.lanes[vcpu].entry

    def map_page(self, vcpu: int, gva: int) -> None:
        """Until a walk for a store finds a translation."""
        for number in range(4):
            (answer,) = self.send(vcpu, m.Walk(self.entry(vcpu), number + 1, gva, WRITE))
            if isinstance(answer, m.Walked):
                return
            assert isinstance(answer, m.WalkFault)
            exit_ = m.PageFaultExit(gva, answer.error_code, m.Instruction(WRITE))
            self.send(vcpu, m.Exit(self.entry(vcpu), exit_))
        raise AssertionError("the page was never mapped")

    def violated_rule(self) -> int | None:
        self.stream.flush()
        found = Checker().feed_all(self.events)
        return None if found is None else found.rule.value


@pytest.mark.parametrize("profile, rule", [("fixed-mode-request-barrier", 3), ("fixed", None)])
def test_a_flush_that_a_buffered_mode_hides_from_lets_a_revoked_frame_be_used(
    profile: str, rule: int | None
) -> None:
    run = Stepwise(profile)
    run.send(1, m.Enter())
    run.map_page(1, PAGE << 12)
    run.submit(VcpuSent(1, m.Exit(run.entry(1), m.ExternalInterruptExit())))
    run.machine.advance(run.machine.ready()[0])  # the exit
    run.submit(HostAsked(1, m.Unmap(PAGE)))
    run.until("host.unmap", Point.HOST_UNMAPPED)
    point = Point.ENTER_GUEST_REQUESTS if rule is None else Point.ENTER_GUEST_MODE_BUFFERED
    run.until("vcpu.external_interrupt", point)
    run.until("host.unmap", None)
    run.settle()
    (entered,) = (body for body in run.sent(1) if isinstance(body, m.Entered))
    assert entered.flush is (rule is None)
    if rule is not None:  # the TLB still has the page
        run.send(1, m.Log(run.entry(1), [(WRITE, PAGE << 12, FIRST_PFN + PAGE, 8, 1)]))
    assert run.violated_rule() == rule


def test_a_buffered_store_is_one_of_the_things_that_can_happen_next() -> None:
    run = Stepwise("fixed")
    gva = ALIAS << 12 | 8 * 5
    run.send(0, m.Enter())
    store = m.PageFaultExit(gva, PFERR_PRESENT_MASK | PFERR_WRITE_MASK, m.Instruction(WRITE, value=0))
    run.submit(VcpuSent(0, m.Exit(run.entry(0), store)))
    run.machine.advance(run.machine.ready()[0])  # the exit
    run.until("vcpu.page_fault", Point.PTE_WRITE_STORED)
    run.stream.flush()
    assert not any(isinstance(event, EmulatedStore) for event in run.events)
    buffer = run.machine.ready()[-1]
    assert isinstance(buffer, StoreBuffer)
    run.machine.advance(buffer)
    run.stream.flush()
    assert isinstance(run.events[-1], EmulatedStore)
    assert not any(isinstance(what, StoreBuffer) for what in run.machine.ready())


@pytest.mark.parametrize("workload", [m.Workload.MIXED, m.Workload.SLOPPY])
def test_a_run_with_store_buffers_ends_clean_and_replays_to_its_digest(workload: m.Workload) -> None:
    run = Run(config(workload=workload, memory_model=TSO, audit=m.Audit.ALWAYS), 3)
    assert run.violation is None
    assert not run.result.stuck
    assert run.result.counters["point.PTE_WRITE_STORED.reached"] > 0
    replayed = replay_records(read_journal(io.BytesIO(run.journal)), None)
    assert replayed.diverged_at is None, replayed.divergence
    assert replayed.digest == run.result.digest
