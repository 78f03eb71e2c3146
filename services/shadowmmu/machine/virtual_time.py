"""A whole run in virtual time: what it would cost on a machine with given costs. Single-process, deterministic.

Every vCPU and every host thread has a clock. The next thing to happen is the one with the smallest clock (and, among
equals, the one that was planned first), so nothing depends on the computer that executes this:

    a run of TLB hits          at most 64 accesses; they happen at its end, and so is a kick taken that comes in between
    a walk, a load, an exit    when the vCPU's clock says so
    a segment of an operation  (`timed_machine`) at its start, as far as its effects go; it ends when its work is done
    mmu_lock                   a ticket lock: whoever waits longest gets it, after the hand-over
    a kick                     leaves its sender after the kicks before it, and arrives after the delivery time
    an answer                  when the target has left guest mode and its processor has taken the interrupt

`on_event` receives the events with their times. They come in the order in which they took effect on the state; the
times of one vCPU, or host thread, do not decrease, but those of different ones may, by the length of a segment.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec
from hdrh.histogram import HdrHistogram

from shadowmmu.cpu import VcpuCore, boot_image, make_program
from shadowmmu.cpu.loads import LoadProgram, load_boot_image, make_load
from shadowmmu.kvm import Tracepoints
from shadowmmu.machine.costs import Costs
from shadowmmu.machine.inprocess import WORDS_PER_BOOT_REQUEST
from shadowmmu.machine.journal import Attached, HostAsked, VcpuSent
from shadowmmu.machine.machine import HostDone, HostRefused, ToVcpu
from shadowmmu.machine.task import Stop, Task
from shadowmmu.machine.timed_config import Cause, Latencies, TimedConfig, TimedResult, VcpuTime
from shadowmmu.machine.timed_host import HostThread
from shadowmmu.machine.timed_machine import TimedMachine, WorkMeter
from shadowmmu.machine.vm_config import kvm_config, welcome
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event

__all__ = ["StuckError", "run_timed"]

RUN: Final = m.LOG_LIMIT
"""Accesses of a run of TLB hits."""
GO_ON: Final = 2
"""A vCPU that has done its iterations goes on, so that others have company, until it has done so many times as many."""
HOST_CPU: Final = 1 << 16
"""Host thread N runs on processor HOST_CPU + N; vCPU N on processor N."""
BOOT_TICKET: Final = -1
HIGHEST: Final = 1 << 42
"""Cycles; longer latencies are counted as this."""


class StuckError(Exception):
    """Nothing can happen any more, although the run is not over."""


class _Histogram:
    def __init__(self) -> None:
        self._values = HdrHistogram(1, HIGHEST, 3)
        self._sum = 0

    def record(self, cycles: int) -> None:
        self._values.record_value(min(max(cycles, 1), HIGHEST))
        self._sum += cycles

    def summary(self) -> Latencies:
        values = self._values
        count = values.get_total_count()
        return Latencies(
            count,
            self._sum / count,
            values.get_value_at_percentile(50),
            values.get_value_at_percentile(99),
            values.get_max_value(),
            values.encode().decode(),
        )


class _Vcpu:
    """A vCPU's clock, and where its time went. `program` is None if it is no load."""

    def __init__(self, number: int, core: VcpuCore, program: LoadProgram | None) -> None:
        self.number = number
        self.core = core
        self.program = program
        self.begin = 0
        self.causes: Counter[Cause] = Counter()
        self.marks: list[int] = []  # when each iteration was over
        self.kick = 0  # the entry in which a kick is to be taken
        self.since = 0  # when it began to wait for something, or its last exit
        self.halted = False
        self.done = False
        self.resting = False  # in guest mode without executing anything
        self.work = 0, 0  # of its own: when it began, and when it will be done
        self.left = 0  # of it after an interruption
        self.turn = 0  # counts what was planned and can be interrupted


class _Flush:
    """A kick on its way: when its sender is done with sending, and how many it was sent to."""

    __slots__ = ("begin", "sent", "targets")

    def __init__(self, begin: int, sent: int, targets: int) -> None:
        self.begin = begin
        self.sent = sent
        self.targets = targets


class _Sink:
    """Events, stamped with the time at which they happen: the segment's start and what has been done in it."""

    def __init__(self, on_event: Callable[[int, Event], None] | None) -> None:
        self.emit: Callable[[Event], None] = self._stamp if on_event is not None else _ignore
        self._on_event = on_event
        self.now: Callable[[], int] = lambda: 0

    def _stamp(self, event: Event) -> None:
        assert self._on_event is not None
        self._on_event(self.now(), event)


def _ignore(event: Event) -> None:
    pass


class _TimedRun:
    def __init__(
        self,
        config: TimedConfig,
        costs: Costs,
        on_event: Callable[[int, Event], None] | None,
        tracepoints: Callable[[Callable[[], int]], Tracepoints] | None,
    ) -> None:
        self._config = config
        self._costs = costs
        run = config.run
        sink = _Sink(on_event)
        kvm = msgspec.structs.replace(kvm_config(run), oos_shadow=config.oos_shadow)
        self.machine = machine = TimedMachine(run, sink, kvm)
        machine.next_lock = self._hand_over
        self._meter = WorkMeter(machine.kvm, costs)
        sink.now = lambda: self._now + self._meter.cycles()
        if tracepoints is not None:
            machine.kvm.tracepoints = tracepoints(sink.now)
        self._now = 0
        self._planned: list[tuple[int, int, Callable[[], None]]] = []
        self._plans = 0
        self.steps = 0
        self._guest_prices = costs.guest
        self._vcpus = [self._new_vcpu(number) for number in range(config.vcpus)]
        self._hosts = [HostThread(number, actor, config) for number, actor in enumerate(config.host)]
        self._flushes: dict[int, _Flush] = {}  # by number of the operation
        self._stalled: dict[int, int] = {}  # operations that wait for others, and since when
        self._began: dict[int, int] = {}
        self._queue: deque[tuple[Task, int]] = deque()  # for mmu_lock, with the time since when
        self._reserved: Task | None = None  # mmu_lock is on its way to it
        self._last_cpu = -1  # that had mmu_lock
        self._lock_since = 0
        self.lock_held = 0
        self._histograms: dict[str, _Histogram] = {}
        self._counts: Counter[str] = Counter()
        self._unfinished = config.vcpus
        self._rest = GO_ON * (config.warmup + config.iterations)
        self._end = 0
        self._boot()

    def _new_vcpu(self, number: int) -> _Vcpu:
        config, run = self._config, self._config.run
        if config.load is None:
            program = make_program(run, number, config.vcpus)
            return _Vcpu(number, VcpuCore(run, number, config.vcpus, program), None)
        load = make_load(config.load, run, number, config.vcpus)
        endless = msgspec.structs.replace(run, ops=1 << 48)
        return _Vcpu(number, VcpuCore(endless, number, config.vcpus, load), load)

    def _boot(self) -> None:
        config, run, machine = self._config, self._config.run, self.machine
        image = (
            boot_image(run, config.vcpus)
            if config.load is None
            else load_boot_image(config.load, run, config.vcpus)
        )
        for number in range(config.vcpus):
            machine.submit(Attached(number, 1), 0)
        for start in range(0, len(image.words), WORDS_PER_BOOT_REQUEST):
            words = image.words[start : start + WORDS_PER_BOOT_REQUEST]
            machine.submit(HostAsked(BOOT_TICKET, m.WritePhys(words)), 0)
            while machine.woken:
                machine.advance(machine.woken.pop())
        for registers in image.registers:
            machine.submit(HostAsked(BOOT_TICKET, registers), 0)
        machine.outputs.clear()
        machine.finished.clear()
        starts = random.Random(f"{run.seed} start")
        for vcpu in self._vcpus:
            vcpu.begin = starts.randint(0, config.start_spread)
            vcpu.causes[Cause.IDLE] += vcpu.begin
            vcpu.core.receive(welcome(run, vcpu.number, 1, heartbeat=0.0))
            vcpu.core.start()
            self._plan(vcpu.begin, partial(self._deliver, vcpu))
        for host in self._hosts:
            self._plan(host.first, partial(self._ask, host))

    # --- the clock ---------------------------------------------------------------------------------------------------

    def _plan(self, time: int, what: Callable[[], None]) -> None:
        self._plans += 1
        heapq.heappush(self._planned, (time, self._plans, what))

    def run(self) -> None:
        """To the end. Raises StuckError."""
        planned = self._planned
        meter = self._meter
        while self._unfinished:
            if not planned:
                raise StuckError(f"at cycle {self._now}: " + "; ".join(self.machine.waiting()))
            self._now, _, what = heapq.heappop(planned)
            meter.begin()
            self.steps += 1
            what()

    def _record(self, name: str, cycles: int) -> None:
        histogram = self._histograms.get(name)
        if histogram is None:
            histogram = self._histograms[name] = _Histogram()
        histogram.record(cycles)

    # --- guest mode --------------------------------------------------------------------------------------------------

    def _guest(self, vcpu: _Vcpu) -> None:
        """Guest mode goes on: the next run of TLB hits, to where something else is needed."""
        core = vcpu.core
        if vcpu.kick == core.entry:
            self._deliver(vcpu)
            return
        if len(vcpu.marks) >= self._rest:
            vcpu.resting = True
            return
        executed = core.run(RUN)
        core.ship_log()
        hits = executed * self._costs.tlb_hit
        vcpu.causes[Cause.GUEST] += hits
        end = self._now + hits
        self._work(vcpu, end, self._guest_work(vcpu, end), self._deliver)

    def _work(self, vcpu: _Vcpu, begin: int, cycles: int, then: Callable[[_Vcpu], None]) -> None:
        """The guest does work of its own from `begin` on, unless a kick comes, or has come."""
        if vcpu.kick == vcpu.core.entry:
            vcpu.left += cycles
            self._plan(begin, partial(self._deliver, vcpu))
            return
        vcpu.causes[Cause.GUEST] += cycles
        vcpu.work = begin, begin + cycles
        vcpu.turn += 1
        self._plan(begin + cycles, partial(self._goes_on, vcpu, vcpu.turn, then))

    def _goes_on(self, vcpu: _Vcpu, turn: int, then: Callable[[_Vcpu], None]) -> None:
        """The guest's work is done, if it was not interrupted."""
        if vcpu.turn == turn:
            then(vcpu)

    def _guest_work(self, vcpu: _Vcpu, now: int) -> int:
        """What the program has done beside its accesses; notes iterations and its end."""
        program = vcpu.program
        if program is None:
            if vcpu.core.done:
                self._done(vcpu, now)
            return 0
        cycles = 0
        if program.work:
            prices = self._guest_prices
            for name, count in program.work.items():
                cycles += count * prices[name]
            program.work.clear()
        marks = vcpu.marks
        if len(marks) < program.iterations:
            marks.extend([now + cycles] * (program.iterations - len(marks)))
            if len(marks) >= self._config.warmup + self._config.iterations:
                self._done(vcpu, now + cycles)
        return cycles

    def _done(self, vcpu: _Vcpu, now: int) -> None:
        """The vCPU has executed what it is here for; it goes on until all have."""
        if not vcpu.done:
            vcpu.done = True
            self._unfinished -= 1
            self._end = max(self._end, now)

    def _deliver(self, vcpu: _Vcpu) -> None:
        """What the vCPU has asked for happens, up to its next exit or its next run of hits."""
        core, lane, costs = vcpu.core, self.machine.lanes[vcpu.number], self._costs
        miss = delivery = 0
        submit = self.machine.submit
        if vcpu.kick and core.in_guest and vcpu.kick == core.entry:
            core.receive(m.Kick(core.entry))
        while sent := core.take_output():
            for body in sent:
                assert not isinstance(body, m.Heartbeat | m.Attach | m.HostRequest | m.Resume)
                submit(VcpuSent(vcpu.number, body), 0)
            while lane.runnable and not isinstance(lane.queue[0], m.Exit):
                walk = isinstance(lane.queue[0], m.Walk)
                if walk and lane.pending_walk is None:
                    miss += costs.tlb_miss
                lane.step()
                miss += costs.tlb_miss_level * walk
            outputs, self.machine.outputs = self.machine.outputs, []
            for output in outputs:
                assert isinstance(output, ToVcpu)
                bypassed = isinstance(output.body, m.WalkFault) and core.in_guest
                core.receive(output.body)
                delivery += costs.fault_delivery * (bypassed and core.in_guest)
        vcpu.causes[Cause.TLB_MISS] += miss
        vcpu.causes[Cause.FAULT_DELIVERY] += delivery
        after = self._now + miss + delivery
        if lane.queue:
            item = lane.queue[0]
            assert isinstance(item, m.Exit)
            self._leave(vcpu, item.reason, after)
        elif core.in_guest:
            self._work(vcpu, after, self._guest_work(vcpu, after), self._guest)
        else:
            self._start_woken(vcpu)  # the first entry

    def _leave(self, vcpu: _Vcpu, reason: m.ExitReason, now: int) -> None:
        """An exit begins."""
        costs = self._costs
        vcpu.since = now
        vcpu.causes[Cause.EXIT] += costs.exit
        self._counts["exits"] += 1
        extra = 0
        if isinstance(reason, m.ExternalInterruptExit):
            extra = costs.kick_receive
            vcpu.causes[Cause.INTERRUPTED] += extra
        self._plan(now + costs.exit + extra, partial(self._exit, vcpu, reason))

    def _exit(self, vcpu: _Vcpu, reason: m.ExitReason) -> None:
        """It takes effect, and KVM handles it."""
        machine, costs = self.machine, self._costs
        vcpu.kick = 0
        machine.lanes[vcpu.number].step()
        begin = 0
        match reason:
            case m.PageFaultExit() | m.EptMisconfigExit():
                begin = costs.page_fault
            case m.InvlpgExit():
                begin = costs.invlpg
            case m.RegisterWriteExit():
                begin = costs.register_write
            case m.SendIpiExit():
                begin = costs.ipi * len(reason.targets)
            case m.HaltExit():
                begin = costs.halt
            case _:
                pass
        vcpu.causes[Cause.HANDLER] += begin
        if machine.lanes[vcpu.number].halted:
            vcpu.halted = True
            vcpu.since = self._now
        self._kicks(self._now)
        self._start_woken(vcpu, begin)

    def _enter(self, vcpu: _Vcpu, body: m.Entered) -> None:
        """The guest goes on."""
        self._record("exit_cycles", self._now - vcpu.since)
        vcpu.core.receive(body)
        work, vcpu.left = self._guest_work(vcpu, self._now) + vcpu.left, 0
        self._work(vcpu, self._now, work, self._guest)

    # --- operations --------------------------------------------------------------------------------------------------

    def _start_woken(self, acting: _Vcpu | None, delay: int = 0) -> None:
        """Whatever can go on since the last step is planned. `delay`: before the acting vCPU's own operation."""
        machine = self.machine
        woken, machine.woken = machine.woken, []
        for task in woken:
            start = self._now
            if task.number not in self._began:
                self._began[task.number] = start
                if acting is not None and task.vcpu == acting.number:
                    start += delay
                elif task.vcpu >= 0:  # an interrupt wakes it
                    start += self._costs.kick_delivery
                    self._wake(self._vcpus[task.vcpu], start)
            elif task.stop is Stop.KICK:
                start = self._answered(task)
            else:
                since = self._stalled.pop(task.number)
                start = max(start, since)
                self._spend(task, Cause.WAIT, start - since)
            self._plan(start, partial(self._segment, task))

    def _wake(self, vcpu: _Vcpu, now: int) -> None:
        if vcpu.halted:
            vcpu.halted = False
            vcpu.causes[Cause.IDLE] += now - vcpu.since
            vcpu.since = now

    def _answered(self, task: Task) -> int:
        """When a flush of which every answer has come goes on."""
        flush = self._flushes.pop(task.number)
        took = max(self._now, flush.sent)
        answers = self._costs.kick_acknowledge * flush.targets
        self._spend(task, Cause.KICK_WAIT, took - flush.sent)
        self._spend(task, Cause.KICK, answers)
        self._record("flush_cycles", took + answers - flush.begin)
        return took + answers

    def _spend(self, task: Task, cause: Cause, cycles: int) -> None:
        if task.vcpu >= 0:
            self._vcpus[task.vcpu].causes[cause] += cycles

    def _segment(self, task: Task) -> None:
        """The next segment of an operation."""
        machine, costs = self.machine, self._costs
        if task is self._reserved:
            self._reserved = None
            self._lock_since = self._now
        machine.advance(task)
        work = self._meter.cycles()
        end = self._now + work
        if task.stop is Stop.KICK and not self._is_finished(task):
            targets = len(task.kick)
            sent = end + costs.kick + costs.kick_send * targets
            self._flushes[task.number] = _Flush(end, sent, targets)
            self._counts["flushes"] += 1
            self._counts["flush_targets"] += targets
            self._spend(task, Cause.KICK, sent - end)
            self._kicks(end + costs.kick)
        self._spend(task, Cause.HANDLER, work)
        if self._is_finished(task):
            machine.finished.clear()
            self._finished(task, end)
        elif task.stop is Stop.LOCK:
            self._plan(end, partial(self._want_lock, task))
        elif task.stop is Stop.RELEASE:
            self._plan(end, partial(self._segment, task))
        elif task.stop is not Stop.KICK:
            self._stalled[task.number] = end
        self._start_woken(None)

    def _is_finished(self, task: Task) -> bool:
        return bool(self.machine.finished) and self.machine.finished[-1] is task

    def _kicks(self, time: int) -> None:
        """The kicks among the outputs are on their way, one after the other from `time` on."""
        machine, costs = self.machine, self._costs
        rest = []
        for output in machine.outputs:
            if isinstance(output, ToVcpu) and isinstance(output.body, m.Kick):
                time += costs.kick_send
                target, entry = self._vcpus[output.vcpu], output.body.entry
                self._plan(
                    time + costs.kick_delivery,
                    partial(self._kicked, target, entry),
                )
            else:
                rest.append(output)
        machine.outputs = rest

    def _kicked(self, vcpu: _Vcpu, entry: int) -> None:
        """The kick is there. It interrupts the guest's own work; a run of accesses, a walk, or an entry ends first."""
        vcpu.kick = max(vcpu.kick, entry)
        if entry != vcpu.core.entry or not vcpu.core.in_guest:
            return
        begin, end = vcpu.work
        if vcpu.resting:
            vcpu.resting = False
            self._plan(self._now, partial(self._deliver, vcpu))
        elif self._now < end:
            taken = max(self._now, begin)
            vcpu.left += end - taken
            vcpu.causes[Cause.GUEST] -= end - taken
            vcpu.turn += 1
            vcpu.work = 0, 0
            self._plan(taken, partial(self._deliver, vcpu))

    def _finished(self, task: Task, end: int) -> None:
        costs = self._costs
        began = self._began.pop(task.number)
        outputs, self.machine.outputs = self.machine.outputs, []
        for output in outputs:
            match output:
                case ToVcpu(number, _, m.Entered() as body):
                    vcpu = self._vcpus[number]
                    entry = costs.entry + costs.tlb_flush * body.flush
                    delivery = 0
                    if body.inject is not None:
                        entry += costs.inject
                        delivery = costs.fault_delivery
                    entry += costs.inject * len(body.interrupts)
                    vcpu.causes[Cause.EXIT] += entry
                    vcpu.causes[Cause.FAULT_DELIVERY] += delivery
                    self._plan(end + entry + delivery, partial(self._enter, vcpu, body))
                case HostDone(ticket):
                    host = self._hosts[ticket]
                    end += costs.dirty_log_page * len(output.gfns)
                    self._record(f"host_{host.kind.value}_cycles", end - began)
                    self._plan(max(host.next_start, end), partial(self._ask, host))
                case ToVcpu(number, _, m.Ended() as ended):
                    raise StuckError(f"vCPU {number} was ended: {ended.code} {ended.text}")
                case _:
                    raise AssertionError(output)

    # --- mmu_lock ----------------------------------------------------------------------------------------------------

    def _cpu(self, task: Task) -> int:
        return task.vcpu if task.vcpu >= 0 else HOST_CPU + task.ticket

    def _want_lock(self, task: Task) -> None:
        if self.machine.locked or self._reserved is not None:
            self._queue.append((task, self._now))
            self.machine.waits_for_lock(task)
        else:
            self._record("lock_wait_cycles", 0)
            self._give_lock(task, 0)

    def _give_lock(self, task: Task, waiting: int) -> None:
        """mmu_lock is free, and `task` gets it; `waiting` others go on waiting."""
        costs = self._costs
        cpu = self._cpu(task)
        cycles = costs.lock + costs.lock_waiter * waiting
        if cpu != self._last_cpu:
            cycles += costs.lock_transfer
            self._counts["lock_transfers"] += 1
        self._last_cpu = cpu
        self._reserved = task
        self._spend(task, Cause.LOCK, cycles)
        self._plan(self._now + cycles, partial(self._segment, task))

    def _hand_over(self) -> None:
        """mmu_lock has been released."""
        self.lock_held += self._now - self._lock_since
        if self._queue:
            task, since = self._queue.popleft()
            self._spend(task, Cause.LOCK_WAIT, self._now - since)
            self._record("lock_wait_cycles", self._now - since)
            self._give_lock(task, len(self._queue))

    # --- the host ----------------------------------------------------------------------------------------------------

    def _ask(self, host: HostThread) -> None:
        """A host thread begins its next operation."""
        operation = host.next_operation(self._now)
        self._counts[f"host.{m.tag_of(operation)}"] += 1
        self.machine.submit(HostAsked(host.number, operation), 0)
        outputs, self.machine.outputs = self.machine.outputs, []
        for output in outputs:
            assert isinstance(output, HostRefused), output
            self._plan(host.next_start, partial(self._ask, host))
        woken, self.machine.woken = self.machine.woken, []
        for task in woken:
            self._began[task.number] = self._now
            self._plan(self._now + self._costs.host_operation, partial(self._segment, task))

    # --- the result --------------------------------------------------------------------------------------------------

    def result(self) -> TimedResult:
        """What came of it."""
        warmup, wanted = self._config.warmup, self._config.iterations
        vcpus, spans, total = [], [], Counter[str]()
        for vcpu in self._vcpus:
            causes = {cause.value: vcpu.causes[cause] for cause in Cause}
            marks = vcpu.marks
            vcpus.append(VcpuTime(sum(causes.values()), causes, marks))
            total.update(causes)
            if marks:
                begin = marks[warmup - 1] if warmup else vcpu.begin
                spans.append((marks[warmup + wanted - 1] - begin) / wanted)
        counters = Counter(self.machine.all_counters())
        counters.update({f"timed.{name}": count for name, count in self._counts.items()})
        for vcpu in self._vcpus:
            counters.update(vcpu.core.counters())
        result = TimedResult(
            cycles=self._end,
            iteration_cycles=sum(spans) / len(spans) if spans else 0.0,
            vcpus=vcpus,
            causes=dict(total),
            lock_held=self.lock_held,
            counters=dict(sorted(counters.items())),
            latencies={name: self._histograms[name].summary() for name in sorted(self._histograms)},
            steps=self.steps,
            digest="",
        )
        digest = hashlib.blake2b(msgspec.json.encode(result), digest_size=16).hexdigest()
        return msgspec.structs.replace(result, digest=digest)


def run_timed(
    config: TimedConfig,
    costs: Costs,
    on_event: Callable[[int, Event], None] | None = None,
    tracepoints: Callable[[Callable[[], int]], Tracepoints] | None = None,
) -> TimedResult:
    """Executes a run in virtual time. `on_event` receives each event with its time in cycles.

    `tracepoints` makes who is told of tracepoints; it gets a function that says what time it is, in cycles.

    Raises ValueError if the guest does not fit into its memory, ProfileError for an unknown profile, StuckError if
    nothing can go on.
    """
    run = _TimedRun(config, costs, on_event, tracepoints)
    run.run()
    return run.result()
