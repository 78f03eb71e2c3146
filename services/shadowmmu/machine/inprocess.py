"""A whole run in one process: the machine, the vCPUs' cores and the host's program, without sockets.

Everything is deterministic: the same configuration and number of vCPUs give the same journal and the same events.
Messages take a while, as between processes: what a core sends is delivered in order, but only when a seeded draw
says so. Workers may be lost on the way, by a seeded draw too; replacements go on with their programs.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from shadowmmu.cpu import VcpuCore, boot_image, make_program
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.machine.journal import Attached, GivenUp, HostAsked, VcpuSent
from shadowmmu.machine.machine import HostDone, HostRefused, ToVcpu
from shadowmmu.machine.runner import Runner
from shadowmmu.machine.vm_config import welcome
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode

__all__ = ["InProcessResult", "InProcessRun", "boot_inputs", "run_in_process"]

OUTSTANDING_HOST_REQUESTS = 2
WORDS_PER_BOOT_REQUEST = 4096
LONGEST_ABSENCE = 20
"""Rounds until somebody is in the place of a worker that was lost."""


class InProcessResult(msgspec.Struct, frozen=True):
    """What came of an in-process run.

    `stuck`: nothing could go on before all was done; `stopped`: the caller asked for the end.
    """

    counters: dict[str, int]
    lock_wait_steps: dict[int, int]
    digest: str
    records: int
    events: int
    stuck: bool
    stopped: bool


def boot_inputs(config: m.RunConfig, vcpus: int) -> list[HostAsked]:
    """The inputs that load the guest's first page tables and the vCPUs' registers."""
    image = boot_image(config, vcpus)
    operations: list[m.HostOperation] = [
        m.WritePhys(image.words[start : start + WORDS_PER_BOOT_REQUEST])
        for start in range(0, len(image.words), WORDS_PER_BOOT_REQUEST)
    ]
    operations += image.registers
    return [HostAsked(0, operation) for operation in operations]


class InProcessRun:
    """The parts of a run, and what is on the way between them.

    `runner` may be replaced by one that goes on where it was after a round.
    """

    def __init__(self, runner: Runner, config: m.RunConfig, vcpus: int, loss_rate: float = 0.0) -> None:
        self.runner = runner
        self._config = config
        self._loss_rate = loss_rate
        self._losses = random.Random(config.seed ^ 0x1055)
        self._random = random.Random(config.seed ^ 0x5EED).random
        self._cores = [self._new_core(n, vcpus) for n in range(vcpus)]
        self._incarnations = [1] * vcpus
        self._absent: dict[int, int] = {}  # rounds until a lost vCPU's place is taken
        self._on_the_way: list[deque[m.VcpuMessage]] = [deque() for _ in range(vcpus)]
        self._host = HostProgram(config, vcpus)
        self._host_outstanding = 0
        self._host_running = config.host_rate > 0.0
        self._detached: set[int] = set()
        self._draining = False
        self.host_counters: Counter[str] = Counter()
        self._boot(config, vcpus)

    def _new_core(self, number: int, vcpus: int) -> VcpuCore:
        return VcpuCore(self._config, number, vcpus, make_program(self._config, number, vcpus))

    def _boot(self, config: m.RunConfig, vcpus: int) -> None:
        for number in range(vcpus):
            self.runner.submit(Attached(number, 1))
        for item in boot_inputs(config, vcpus):
            self.runner.submit(item)
            self._settle()
        self._host_outstanding = 0
        for number in range(vcpus):
            self._start_core(number)

    def _start_core(self, number: int) -> None:
        core = self._cores[number]
        core.receive(welcome(self._config, number, self._incarnations[number], heartbeat=0.0))
        core.start()

    def _settle(self) -> None:
        while self.runner.step(1000):
            pass
        self.runner.take_outputs()

    def round(self) -> bool:
        """Lets every part do a bit; False if no part could do anything."""
        moved = False
        if self._loss_rate:
            self._lose_some()
        for number, core in enumerate(self._cores):
            if self._draining and core.done:
                core.drain()
            if self._random() < 0.7 and core.run(1 + int(self._random() * 64)):
                moved = True
            if core.log_pending and self._random() < 0.2:
                core.ship_log()
            moved |= self._collect(number, core)
            moved |= self._deliver(number)
        moved |= self._ask_host()
        moved |= self.runner.step(1 + int(self._random() * 64), resume_parked=False)
        if not moved:
            moved = self.runner.step(1)
        for output in self.runner.take_outputs():
            moved = True
            match output:
                case ToVcpu():
                    if output.incarnation == self._incarnations[output.vcpu]:
                        self._cores[output.vcpu].receive(output.body)
                case HostDone() | HostRefused():
                    self._host_outstanding -= 1
        return moved

    def _lose_some(self) -> None:
        """Workers are lost, with their TLBs, their logs and what they sent lately; others take their places."""
        for number in range(len(self._cores)):
            if number in self._absent:
                self._absent[number] -= 1
                if not self._absent[number]:
                    del self._absent[number]
                    self.runner.submit(Attached(number, self._incarnations[number], resume=True))
                    self._start_core(number)
            elif number not in self._detached and self._losses.random() < self._loss_rate:
                self.runner.submit(GivenUp(number, ErrorCode.GIVEN_UP.value, "lost"))
                self._on_the_way[number].clear()
                self._cores[number] = self._new_core(number, len(self._cores))
                self._incarnations[number] += 1
                self._absent[number] = self._losses.randint(1, LONGEST_ABSENCE)

    def _collect(self, number: int, core: VcpuCore) -> bool:
        sent = core.take_output()
        self._on_the_way[number].extend(sent)
        return bool(sent)

    def _deliver(self, number: int) -> bool:
        queue = self._on_the_way[number]
        delivered = False
        while queue and self._random() < 0.8:
            delivered = True
            body = queue.popleft()
            if isinstance(body, m.Heartbeat):
                continue
            assert not isinstance(body, m.Attach | m.HostRequest | m.Resume)
            if isinstance(body, m.Detach):
                self._detached.add(number)
            self.runner.submit(VcpuSent(number, body))
        return delivered

    def _ask_host(self) -> bool:
        if not self._host_running or self._host_outstanding >= OUTSTANDING_HOST_REQUESTS:
            return False
        operation = self._host.next_operation()
        self.host_counters[f"host.{m.tag_of(operation)}"] += 1
        self._host_outstanding += 1
        self.runner.submit(HostAsked(1, operation, paced=True))
        return True

    def work_done(self) -> bool:
        """Every vCPU has executed its share."""
        return all(core.done for core in self._cores)

    def drain(self) -> None:
        """Ends the host's program and lets the cores leave; one that takes a lost one's place, when it is as far."""
        self._draining = True
        if self._host_running:
            self._host_running = False
            self._host_outstanding += 1
            self.runner.submit(HostAsked(1, m.TestAge(0)))

    def ended(self) -> bool:
        """Everybody has left and nothing is under way."""
        return (
            len(self._detached) == len(self._cores) and not any(self._on_the_way) and self.runner.machine.idle
        )

    def counters(self) -> dict[str, int]:
        """The machine's, the cores' summed, and the host's."""
        total: Counter[str] = Counter(self.host_counters)
        for core in self._cores:
            total.update(core.counters())
        return self.runner.machine.all_counters() | total


def run_in_process(
    config: m.RunConfig,
    vcpus: int,
    write: Callable[[bytes], object],
    *listeners: EventListener,
    progress: Callable[[dict[str, int]], bool] | None = None,
    loss_rate: float = 0.0,
) -> InProcessResult:
    """Runs `config` with `vcpus` vCPUs to its end.

    `write` receives the journal. `progress` is called now and then with the counters so far; if it returns
    False the run stops where it is. `loss_rate`: in which share of the rounds a vCPU's worker is lost.
    """
    runner = Runner(config, write, *listeners)
    run = InProcessRun(runner, config, vcpus, loss_rate)
    stuck = stopped = draining = False
    rounds = idle_rounds = 0
    while not run.ended():
        rounds += 1
        # A round may do nothing by the draw alone; only many in a row mean that nothing can be done.
        idle_rounds = 0 if run.round() else idle_rounds + 1
        if idle_rounds > 1000:
            stuck = True
            break
        if not draining and run.work_done():
            draining = True
            run.drain()
        if progress is not None and rounds % 64 == 0 and not progress(run.counters()):
            stopped = True
            break
    digest = runner.finish(stuck=stuck)
    return InProcessResult(
        counters=run.counters() | {"records": runner.records, "events": runner.events.count},
        lock_wait_steps=dict(runner.machine.lock_wait_steps),
        digest=digest,
        records=runner.records,
        events=runner.events.count,
        stuck=stuck,
        stopped=stopped,
    )
