"""A machine with a small guest whose first 512 pages map themselves, driven message by message."""

from __future__ import annotations

from typing import Any

from shadowmmu.machine import (
    Attached,
    GivenUp,
    HostAsked,
    HostDone,
    HostRefused,
    Input,
    Output,
    Runner,
    ToVcpu,
    VcpuSent,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag, Event

TABLES = 0x200  # first frame of the tables: one per level
ENTRY = 0x067  # P, W, U, A, D
FIRST_PFN = 0x100000
WRITE = int(AccessFlag.WRITE)


PAGING_ON, PAGING_OFF = 0x80010011, 0x11


def boot(vcpu: int, mode: m.GuestMode) -> list[m.HostOperation]:
    """The tables of the mode, and the vCPU's registers."""
    last = [page << 12 | ENTRY for page in range(512)]
    match mode:
        case m.GuestMode.PAE:  # a PDPTE has no rights
            words = [(TABLES << 12, (TABLES + 1) << 12 | 1), ((TABLES + 1) << 12, (TABLES + 2) << 12 | ENTRY)]
            words += [((TABLES + 2) * 4096 + 8 * page, entry) for page, entry in enumerate(last)]
            registers = PAGING_ON, TABLES << 12, 0x20, 0
        case m.GuestMode.PAGING32:  # entries of 4 bytes
            words = [(TABLES << 12, (TABLES + 1) << 12 | ENTRY)]
            words += [
                ((TABLES + 1) * 4096 + 4 * page, last[page + 1] << 32 | last[page])
                for page in range(0, 512, 2)
            ]
            registers = PAGING_ON, TABLES << 12, 0, 0
        case m.GuestMode.NONPAGING:
            words = [(TABLES << 12, 0)]
            registers = PAGING_OFF, 0, 0, 0
        case _:
            words = [((TABLES + level) << 12, (TABLES + level + 1) << 12 | ENTRY) for level in range(3)]
            words += [((TABLES + 3) * 4096 + 8 * page, entry) for page, entry in enumerate(last)]
            registers = PAGING_ON, TABLES << 12, 0x20, 0xD00
    return [m.WritePhys(words), m.SetRegisters(vcpu, *registers)]


class Driven:
    """The machine; `sent` is what it sent to each vCPU that was not looked at yet."""

    def __init__(self, vcpus: int = 2, **changes: Any) -> None:
        self.config = m.RunConfig(**{"park_rate": 0.0, "host_rate": 0.0, "audit": m.Audit.ALWAYS, **changes})
        self.events: list[Event] = []
        self.journal: list[bytes] = []
        self.runner = Runner(
            self.config, self.journal.append, lambda _first, events, _data: self.events.extend(events)
        )
        self.sent: list[list[m.MmuMessage]] = [[] for _ in range(vcpus)]
        self.done: list[HostDone] = []
        self.refused: list[HostRefused] = []
        for vcpu in range(vcpus):
            self.submit(Attached(vcpu, vcpu + 1))
            for operation in boot(vcpu, self.config.mode):
                self.submit(HostAsked(0, operation))
                self.settle()  # registers are set at once: PDPTEs have to be in memory by then
        self.done.clear()

    def submit(self, item: Input) -> None:
        self.runner.submit(item)

    def settle(self) -> None:
        """Lets everything happen that can."""
        while self.runner.step(100):
            pass
        self.collect(self.runner.take_outputs())

    def collect(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case ToVcpu():
                    self.sent[output.vcpu].append(output.body)
                case HostDone():
                    self.done.append(output)
                case HostRefused():
                    self.refused.append(output)

    def take(self, vcpu: int) -> list[m.MmuMessage]:
        taken, self.sent[vcpu] = self.sent[vcpu], []
        return taken

    def send(self, vcpu: int, *bodies: Any) -> list[m.MmuMessage]:
        """Sends messages of a vCPU, lets everything happen, and returns what came for that vCPU."""
        for body in bodies:
            self.submit(VcpuSent(vcpu, body))
        self.settle()
        return self.take(vcpu)

    def host(self, operation: m.HostOperation, *, paced: bool = False) -> None:
        self.submit(HostAsked(1, operation, paced))
        self.settle()

    def give_up(self, vcpu: int) -> None:
        self.submit(GivenUp(vcpu, "given-up", "silent"))
        self.settle()

    def enter(self, vcpu: int) -> None:
        (entered,) = self.send(vcpu, m.Enter())
        assert isinstance(entered, m.Entered)

    def entry(self, vcpu: int) -> int:
        return self.runner.machine.lanes[vcpu].entry

    def map_page(self, vcpu: int, page: int, flags: int = 0) -> m.Walked:
        """Walks to a page, taking the page-fault exits that this needs."""
        for number in range(4):
            (answer,) = self.send(vcpu, m.Walk(self.entry(vcpu), number + 1, page << 12, flags))
            if isinstance(answer, m.Walked):
                return answer
            assert isinstance(answer, m.WalkFault)
            exit_ = m.PageFaultExit(page << 12, answer.error_code, m.Instruction(flags))
            (entered,) = self.send(vcpu, m.Exit(self.entry(vcpu), exit_))
            assert isinstance(entered, m.Entered)
        raise AssertionError("the page was never mapped")

    def log(self, vcpu: int, page: int, value: int, pfn: int | None = None) -> m.Log:
        frame = FIRST_PFN + page if pfn is None else pfn
        return m.Log(self.entry(vcpu), [(WRITE, page << 12, frame, 8, value)])

    def word(self, page: int) -> int:
        return self.runner.machine.memory.read(page << 12, 8)

    def kicks(self, vcpu: int) -> list[int]:
        return [body.entry for body in self.take(vcpu) if isinstance(body, m.Kick)]
