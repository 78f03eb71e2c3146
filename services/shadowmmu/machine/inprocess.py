"""A whole run in one process: the machine, the vCPUs' cores and the host's program, without sockets.

Everything is deterministic: the same configuration and number of vCPUs give the same journal and the same events.
Messages take a while, as between processes: what a core sends is delivered in order, but only when a seeded draw
says so.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from shadowmmu.cpu import VcpuCore, boot_image, make_program
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.machine.journal import Attached, HostAsked, VcpuSent
from shadowmmu.machine.machine import HostDone, ToVcpu
from shadowmmu.machine.runner import Runner
from shadowmmu.machine.vm_config import welcome
from shadowmmu.protocol import messages as m

__all__ = ["InProcessResult", "boot_inputs", "run_in_process"]

OUTSTANDING_HOST_REQUESTS = 2
WORDS_PER_BOOT_REQUEST = 4096


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


class _InProcessRun:
    def __init__(self, runner: Runner, config: m.RunConfig, vcpus: int) -> None:
        self._runner = runner
        self._random = random.Random(config.seed ^ 0x5EED).random
        self._cores = [VcpuCore(config, n, vcpus, make_program(config, n, vcpus)) for n in range(vcpus)]
        self._on_the_way: list[deque[m.VcpuMessage]] = [deque() for _ in range(vcpus)]
        self._host = HostProgram(config, vcpus)
        self._host_outstanding = 0
        self._host_running = config.host_rate > 0.0
        self._detached = 0
        self.host_counters: Counter[str] = Counter()
        self._boot(config, vcpus)

    def _boot(self, config: m.RunConfig, vcpus: int) -> None:
        for number in range(vcpus):
            self._runner.submit(Attached(number, 1))
        for item in boot_inputs(config, vcpus):
            self._runner.submit(item)
            self._settle()
        self._host_outstanding = 0
        for number, core in enumerate(self._cores):
            core.receive(welcome(config, number, 1, heartbeat=0.0))
            core.start()

    def _settle(self) -> None:
        while self._runner.step(1000):
            pass
        self._runner.take_outputs()

    def round(self) -> bool:
        """Lets every part do a bit; False if no part could do anything."""
        moved = False
        for number, core in enumerate(self._cores):
            if self._random() < 0.7 and core.run(1 + int(self._random() * 64)):
                moved = True
            if core.log_pending and self._random() < 0.2:
                core.ship_log()
            moved |= self._collect(number, core)
            moved |= self._deliver(number)
        moved |= self._ask_host()
        moved |= self._runner.step(1 + int(self._random() * 64), resume_parked=False)
        if not moved:
            moved = self._runner.step(1)
        for output in self._runner.take_outputs():
            moved = True
            match output:
                case ToVcpu():
                    self._cores[output.vcpu].receive(output.body)
                case HostDone():
                    self._host_outstanding -= 1
        return moved

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
            assert not isinstance(body, m.Attach | m.HostRequest)
            self._detached += isinstance(body, m.Detach)
            self._runner.submit(VcpuSent(number, body))
        return delivered

    def _ask_host(self) -> bool:
        if not self._host_running or self._host_outstanding >= OUTSTANDING_HOST_REQUESTS:
            return False
        operation = self._host.next_operation()
        self.host_counters[f"host.{m.tag_of(operation)}"] += 1
        self._host_outstanding += 1
        self._runner.submit(HostAsked(1, operation, paced=True))
        return True

    def work_done(self) -> bool:
        """Every vCPU has executed its share."""
        return all(core.done for core in self._cores)

    def drain(self) -> None:
        """Ends the host's program and lets the cores leave."""
        if self._host_running:
            self._host_running = False
            self._host_outstanding += 1
            self._runner.submit(HostAsked(1, m.TestAge(0)))
        for core in self._cores:
            core.drain()

    def ended(self) -> bool:
        """Everybody has left and nothing is under way."""
        return self._detached == len(self._cores) and not any(self._on_the_way) and self._runner.machine.idle

    def counters(self) -> dict[str, int]:
        """The machine's, the cores' summed, and the host's."""
        total: Counter[str] = Counter(self.host_counters)
        for core in self._cores:
            total.update(core.counters())
        return self._runner.machine.all_counters() | total


def run_in_process(
    config: m.RunConfig,
    vcpus: int,
    write: Callable[[bytes], object],
    *listeners: EventListener,
    progress: Callable[[int], bool] | None = None,
) -> InProcessResult:
    """Runs `config` with `vcpus` vCPUs to its end.

    `write` receives the journal. `progress` is called now and then with the instructions executed so far; if it
    returns False the run stops where it is.
    """
    runner = Runner(config, write, *listeners)
    run = _InProcessRun(runner, config, vcpus)
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
        if (
            progress is not None
            and rounds % 64 == 0
            and not progress(run.counters().get("vcpu.instructions", 0))
        ):
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
