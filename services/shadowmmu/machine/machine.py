"""The virtual machine as a pure state machine: inputs and choices in, messages and events out.

The machine owns the model of KVM (`shadowmmu.kvm`) and a lane per vCPU, and runs host operations against them. It
knows nothing of sockets and time. Its user submits inputs, calls `step` until nothing is ready, and takes the
outputs. A step advances exactly one thing, chosen by the source of choices: a host operation, to the next place where
it stops, or a lane, by one bit.

What a host operation may be stopped by: mmu_lock held by another, a kick that waits for answers, or being parked at a
scheduling point for a number of steps, so that other operations, stores and kicks fall in between. A parked operation
goes on at once when nothing else is ready. At memory points only lanes run.

Operations are generators, which nobody can copy. To come to a moment without any, *admission* is closed: what begins
an operation or a hardware walk is accepted and waits, as data, until admission is opened again.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TypeAlias

import msgspec

from shadowmmu import kvm as k
from shadowmmu.kvm import (
    EmulatedStores,
    HostPageLock,
    Kick,
    MmuLock,
    Operation,
    Point,
    PointKind,
    SlotsLock,
    Srcu,
    StoreBuffer,
    VcpuMode,
)
from shadowmmu.machine.choices import Choices
from shadowmmu.machine.coverage import Coverage, WaitPoint
from shadowmmu.machine.event_stream import EventSink
from shadowmmu.machine.journal import Admission, Attached, GivenUp, HostAsked, Input, VcpuSent
from shadowmmu.machine.lane import VcpuLane
from shadowmmu.machine.operations import HostResult, VcpuRun, handle_exit, host_operation
from shadowmmu.machine.refusals import host_operation_refusal, vcpu_refusal
from shadowmmu.machine.shadow_tables import ShadowTables
from shadowmmu.machine.task import Stop, Task
from shadowmmu.machine.vm_config import kvm_config, page_fault_filter
from shadowmmu.protocol import events as ev
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode

__all__ = ["HostDone", "HostRefused", "Machine", "Output", "ToVcpu"]

UNCOVERED_PARK_RATE = 0.9
"""Share of the operations parked at a point at which no other operation, or no store, has fallen yet."""
RARE = 10
MOST_PROLONGED = 20
"""At such a point that was reached at most RARE times, how often a stay may be prolonged."""
AUDIT_SAMPLE_RATE = 0.002
"""Share of the operations after which a sampled audit looks."""

KNOWN_OUTCOMES = (
    *(f"vcpu.page_fault.{outcome.value}" for outcome in k.Outcome),
    "vcpu.register_write.done",
    "vcpu.register_write.general_protection",
)
"""Outcomes that a report shows as "never" if they did not occur."""
KNOWN_EPT_OUTCOMES = ("vcpu.ept_misconfig.retry", "vcpu.ept_misconfig.mmio")


_MEMORY_POINTS = frozenset(p for p in Point if p.kind is PointKind.MEMORY)


class ToVcpu(msgspec.Struct, frozen=True):
    """A message to the worker of a vCPU."""

    vcpu: int
    incarnation: int
    body: m.MmuMessage


class HostDone(msgspec.Struct, frozen=True):
    """A host operation returned."""

    ticket: int
    result: int
    gfns: list[int]


class HostRefused(msgspec.Struct, frozen=True):
    """The arguments of a host operation are not usable: `text` says why. Nothing has happened."""

    ticket: int
    text: str


Output: TypeAlias = ToVcpu | HostDone | HostRefused


class _Waiting(msgspec.Struct, frozen=True):
    """A vCPU's host operation that waits for admission: whose, of which incarnation, and the exit that it handles."""

    vcpu: int
    incarnation: int
    reason: m.ExitReason | None


class Machine:
    """One virtual machine.

    `config` as the run's; `choices` and `events` belong to the user, who also flushes the events. `kvm` describes
    the virtual machine if it is another than the run's. `stepwise`: operations stop at every point, and whoever drives
    the machine chooses what goes on next (`ready`, `advance`) instead of `step`.
    """

    def __init__(
        self,
        config: m.RunConfig,
        choices: Choices,
        events: EventSink,
        kvm: k.KvmConfig | None = None,
        *,
        stepwise: bool = False,
    ) -> None:
        self.config = config
        self.choices = choices
        self.events = events
        self.kvm = k.Kvm(kvm or kvm_config(config), trace=self._trace)
        self._stepwise = stepwise
        self._at_memory_point: Task | None = None
        self.audited = True  # off for steps whose audits are known
        self.host = self.kvm.host
        self.memory = self.kvm.memory
        self.tables = ShadowTables(self.kvm)
        self.page_fault_filter = page_fault_filter(config)
        self.lanes: list[VcpuLane] = []
        self.outputs: list[Output] = []
        self.coverage = Coverage()
        self.coverage.outcomes.update(dict.fromkeys(KNOWN_OUTCOMES, 0))
        if config.tdp is m.Tdp.EPT:
            self.coverage.outcomes.update(dict.fromkeys(KNOWN_EPT_OUTCOMES, 0))
        self.counters: Counter[str] = Counter()
        self.lock_wait_steps: Counter[int] = Counter()
        self.steps = 0
        self._tasks = 0
        self._ready: list[Task] = []
        self._parked: list[Task] = []
        self._lock_waiters: list[Task] = []
        self._kick_waiters: list[Task] = []
        self._busy_waiters: list[Task] = []
        self._srcu_waiters: list[Task] = []
        self._lock_owner: Task | None = None
        self._park_rate = config.park_rate
        self._tso = self.kvm.config.memory_model is m.MemoryModel.TSO
        self._paced: deque[HostAsked] = deque()
        self._admission = True
        self._waiting: deque[_Waiting] = deque()
        self._host_interval = round(1000 / config.host_rate) if config.host_rate > 0.0 else 0
        self._host_due = self._host_interval
        self._lpages_highest = 0
        self._progress = 0  # accesses and exits so far: the measure for paced host operations
        self.kvm.memory_points = _MEMORY_POINTS if config.park_rate > 0.0 or stepwise else frozenset()

    def _trace(self, event: ev.Event) -> None:
        """An event of the model."""
        if isinstance(event, ev.TlbsDirtyRaised):
            self.counters["tlbs_dirty.raised"] += 1
        elif isinstance(event, ev.TlbsDirtyCleared):
            self.counters["tlbs_dirty.cleared"] += event.value
        self.events.emit(event)

    def __getstate__(self) -> dict[str, object]:
        """Everything but what belongs to the user; `connect` gives a copy its own."""
        return {name: value for name, value in vars(self).items() if name not in {"choices", "events"}}

    def connect(self, choices: Choices, events: EventSink) -> None:
        """From now on choices come from, and events go to, others than before."""
        self.choices = choices
        self.events = events

    # --- inputs --------------------------------------------------------------------------------------------------

    def submit(self, item: Input, record: int) -> None:
        """Consumes an input that the session tables and `refusal` allow; `record` is its number in the journal.

        A host operation whose arguments are not usable is answered by HostRefused.
        """
        self.events.emit(ev.InputConsumed(record))
        match item:
            case VcpuSent():
                self._vcpu_sent(self.lanes[item.vcpu], item.body)
            case HostAsked():
                self._host_asked(item)
            case Attached():
                while len(self.lanes) <= item.vcpu:
                    self.lanes.append(VcpuLane(self, self.kvm.create_vcpu()))
                lane = self.lanes[item.vcpu]
                lane.begin(item.incarnation, resume=item.resume)
                self.events.emit(ev.IncarnationStarted(item.vcpu, item.incarnation))
                self.events.emit(ev.Invalidated(item.vcpu, -1, ev.InvalidationCause.RESET))
                if item.resume and not lane.trail.resumable:
                    self._end_not_resumable(lane)
            case GivenUp():
                self._end_incarnation(self.lanes[item.vcpu], ErrorCode(item.code), item.text)
            case Admission():
                self._admit(item.open)

    def _host_asked(self, item: HostAsked) -> None:
        text = self.host_refusal(item.operation)
        if text is not None:
            self.outputs.append(HostRefused(item.ticket, text))
        elif self._admission and isinstance(item.operation, m.SetRegisters):
            self._set_registers(item)
        else:
            self._paced.append(item)
            if self._admission and not item.paced:
                self._start_host_operations(len(self._paced))

    def _start_host_operations(self, count: int) -> None:
        """Starts the oldest `count` of the host operations asked for."""
        for _ in range(count):
            item = self._paced.popleft()
            if isinstance(item.operation, m.SetRegisters):
                self._set_registers(item)
            else:
                name = m.tag_of(item.operation)
                self._begin(f"host.{name}", host_operation(self.kvm, item.operation), ticket=item.ticket)
        self._host_due = self._progress + self._host_interval

    def _admit(self, on: bool) -> None:
        """Opens or closes admission; who has waited begins, the host's operations first."""
        self._admission = on
        if not on:
            return
        # The last one that is not paced takes those before it along, as when it was asked for.
        at_once = [
            number
            for number, item in enumerate(self._paced, start=1)
            if not item.paced or isinstance(item.operation, m.SetRegisters)
        ]
        if at_once:
            self._start_host_operations(at_once[-1])
        while self._waiting:
            waiting = self._waiting.popleft()
            self._begin_vcpu(self.lanes[waiting.vcpu], waiting.reason, waiting.incarnation)

    def _set_registers(self, item: HostAsked) -> None:
        """At once: nobody else is concerned with a vCPU that was never entered."""
        for effect in host_operation(self.kvm, item.operation):
            assert isinstance(effect, Point), effect
        self.outputs.append(HostDone(item.ticket, 0, []))

    def refusal(self, vcpu: int, body: object) -> tuple[ErrorCode, str] | None:
        """Why a message of the vCPU makes no sense for this machine, or None. Changes nothing."""
        return vcpu_refusal(self.kvm.vcpus[vcpu], body)

    def host_refusal(self, operation: m.HostOperation) -> str | None:
        """Why the arguments of a host operation are not usable, or None. Changes nothing."""
        text = host_operation_refusal(self.kvm, operation)
        if text is None and isinstance(operation, m.SetRegisters):
            lane = self.lanes[operation.vcpu]
            if lane.task is not None or lane.was_entered:
                return f"vCPU {operation.vcpu} was entered already: registers are set before that"
        return text

    def _vcpu_sent(self, lane: VcpuLane, body: m.Message) -> None:
        if not lane.incarnation:
            return  # sent before the worker knew that it was given up
        match body:
            case m.Enter():
                if lane.task is None:
                    self._start(lane, None)
                else:
                    lane.enter_wanted = True  # an operation of the incarnation before has yet to return
            case m.Detach():
                if self._busy(lane):
                    lane.leaving = True
                else:
                    self._end_incarnation(lane, ErrorCode.DETACHED)
            case m.Log() | m.Walk() | m.Load() | m.Locked() | m.Exit():
                lane.push(body)
            case _:
                raise TypeError(f"not a vCPU's message for the machine: {body!r}")

    def _busy(self, lane: VcpuLane) -> bool:
        return bool(lane.queue) or lane.task is not None

    def tasks(self) -> list[Task]:
        """The operations under way."""
        return [
            *self._ready,
            *self._parked,
            *self._lock_waiters,
            *self._kick_waiters,
            *self._busy_waiters,
            *self._srcu_waiters,
        ]

    def _end_incarnation(self, lane: VcpuLane, code: ErrorCode, text: str = "") -> None:
        incarnation = lane.incarnation
        if not incarnation:
            return
        self.send(lane, m.Ended(code.value, text))
        lane.end()
        lane.vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        self.events.emit(ev.IncarnationEnded(lane.number, incarnation, code.value))
        self._left_guest(lane)

    def _end_not_resumable(self, lane: VcpuLane) -> None:
        self._end_incarnation(lane, ErrorCode.NOT_RESUMABLE, "the program's state was not sent for too long")

    # --- steps ---------------------------------------------------------------------------------------------------

    def owns_mmu_lock(self, task: Task) -> bool:
        """Whether the operation holds mmu_lock."""
        return task is self._lock_owner

    @property
    def admission(self) -> bool:
        """Host operations and hardware walks may begin."""
        return self._admission

    @property
    def quiet(self) -> bool:
        """No host operation and no hardware walk is under way: the state is plain data."""
        return not self.tasks() and all(lane.pending_walk is None for lane in self.lanes)

    @property
    def idle(self) -> bool:
        """No host operation is under way or waits for admission, and no lane has anything to apply."""
        return not (self._waiting or self.tasks() or any(lane.runnable for lane in self.lanes))

    @property
    def parked(self) -> bool:
        """Some operation is parked."""
        return bool(self._parked)

    @property
    def parked_uncovered(self) -> bool:
        """Some operation is parked at a point at which something has yet to fall."""
        return any(task.point is not None and not self.coverage.covered(task.point) for task in self._parked)

    def step(self, *, resume_parked: bool = True) -> bool:
        """Advances one thing; False if nothing is ready (all wait for messages).

        Without `resume_parked`, parked operations do not count as ready before their time: for a user who can wait
        for messages on the way.
        """
        self.steps += 1
        if self._parked:
            self._wake(self.steps)
        if self._paced and self._progress >= self._host_due and self._admission:
            self._start_host_operations(1)
        ready = self.ready()
        # Stores alone are nothing to do: they become visible when somebody goes on.
        if not ready or isinstance(ready[0], StoreBuffer):
            if not (self._parked and resume_parked):
                self.steps -= 1
                return False
            ready += self._parked
        self.advance(ready[0] if len(ready) == 1 else ready[self.choices.below(len(ready))])
        return True

    def ready(self) -> list[Task | VcpuLane | StoreBuffer]:
        """What can go on now, without what is parked. At a memory point: that operation, and the hardware.

        The hardware is vCPUs in guest mode and, with memory model tso, the store buffers that come last in the list.
        """
        ready: list[Task | VcpuLane | StoreBuffer] = [*self._ready_lanes()]
        if self._at_memory_point is not None:
            ready.append(self._at_memory_point)
        else:
            ready += self._ready
            if self._lock_owner is None:
                ready += self._lock_waiters
        if self._tso:
            ready += self._drainable()
        return ready

    def _ready_lanes(self) -> list[VcpuLane]:
        """The lanes that can be advanced now: without admission, none that would begin a walk."""
        lanes = [lane for lane in self.lanes if lane.runnable]
        if self._admission:
            return lanes
        return [
            lane for lane in lanes if lane.pending_walk is not None or not isinstance(lane.queue[0], m.Walk)
        ]

    def _drainable(self) -> list[StoreBuffer]:
        """The store buffers whose oldest store may become visible now."""
        buffers = (vcpu.store_buffer for vcpu in self.kvm.vcpus)
        return [buffer for buffer in buffers if buffer is not None and buffer.drainable]

    @property
    def stepwise(self) -> bool:
        """Operations stop at every point."""
        return self._stepwise

    @stepwise.setter
    def stepwise(self, on: bool) -> None:
        self._stepwise = on
        self.kvm.memory_points = _MEMORY_POINTS if on else frozenset()

    @property
    def at_memory_point(self) -> bool:
        """Stepwise: an operation stands at a memory point, so that only the hardware of vCPUs may act beside it."""
        return self._at_memory_point is not None

    def advance(self, what: Task | VcpuLane | StoreBuffer) -> None:
        """One step of what is ready: an operation to where it stops next, a lane by a bit, a buffer by a store."""
        if isinstance(what, VcpuLane):
            what.step()
        elif isinstance(what, StoreBuffer):
            what.drain_oldest()
        else:
            self._at_memory_point = None
            self._advance(what)

    def _wake(self, now: int) -> None:
        for task in [task for task in self._parked if task.wake <= now]:
            if self._stays(task):
                task.prolonged += 1
                task.wake = now + self.config.park_steps
            else:
                self._parked.remove(task)
                self._ready.append(task)

    def _stays(self, task: Task) -> bool:
        """Whether a parked operation stays when its time is over: at a rare point, until something has fallen there."""
        point = task.point
        return (
            task.prolonged < MOST_PROLONGED
            and point is not None
            and self.coverage.reached[point] <= RARE
            and not self.coverage.covered(point)
            and self.coverage.fell(task.vcpu, task.mark) != (True, True)
        )

    def _start(self, lane: VcpuLane, reason: m.ExitReason | None) -> None:
        """The vCPU's host operation from an exit (None: before the first entry) to the next entry."""
        if reason is None:
            lane.trail.asks(m.Enter())
        if self._admission:
            self._begin_vcpu(lane, reason, lane.incarnation)
        else:
            lane.task = waiting = _Waiting(lane.number, lane.incarnation, reason)
            self._waiting.append(waiting)

    def _begin_vcpu(self, lane: VcpuLane, reason: m.ExitReason | None, incarnation: int) -> None:
        name = "enter" if reason is None else m.tag_of(reason)
        self._begin(f"vcpu.{name}", handle_exit(lane.vcpu, reason), lane, incarnation)

    def _begin(
        self,
        name: str,
        operation: Operation[VcpuRun] | Operation[HostResult],
        lane: VcpuLane | None = None,
        incarnation: int = 0,
        *,
        ticket: int = 0,
    ) -> None:
        self._tasks += 1
        task = Task(self._tasks, name, operation, lane, ticket)
        task.incarnation = incarnation
        if lane is not None:
            lane.task = task
        self.events.emit(ev.OperationStarted(task.number, task.vcpu, name))
        self._make_ready(task)

    def _make_ready(self, task: Task) -> None:
        """The operation can go on."""
        self._ready.append(task)

    def _stop(self, task: Task, point: Point | WaitPoint, stop: Stop) -> None:
        task.stop = stop
        task.point = point
        task.mark = self.coverage.mark(task.vcpu)
        task.since = self.steps
        task.prolonged = 0

    def _resume(self, task: Task) -> None:
        match task.stop:
            case Stop.READY | Stop.PARKED | Stop.KICK | Stop.BUSY | Stop.SRCU:
                (self._parked if task in self._parked else self._ready).remove(task)
            case Stop.LOCK:
                self._lock_waiters.remove(task)
                self._take_lock(task)
                self.lock_wait_steps[self.steps - task.since] += 1
        if task.point is not None:
            self.coverage.resumed(task.point, task.vcpu, task.mark)
            task.point = None

    def _take_lock(self, task: Task) -> None:
        self._lock_owner = task
        self.counters["lock.taken"] += 1
        self.events.emit(ev.LockTaken(task.number))

    def _advance(self, task: Task) -> None:
        """Runs an operation to the next place where it stops, or to its end."""
        was_busy = task.stop is Stop.BUSY
        self._resume(task)
        self.coverage.operation_advanced(task.vcpu)
        if not was_busy:
            self._wake_busy_waiters()
        answer, task.answer = task.answer, None
        task.fresh = True
        send = task.operation.send
        while True:
            try:
                effect = send(answer)
            except StopIteration as stop:
                self._wake_busy_waiters()
                self._finish(task, stop.value)
                return
            answer = None
            if effect is MmuLock.RELEASE:
                if not self._release(task):
                    return
            elif effect is MmuLock.ACQUIRE:
                if not self._acquire(task):
                    return
            elif isinstance(effect, Kick):
                kicked = self._kick(task, effect)
                if kicked is None:
                    return
                answer = kicked
            elif effect is Srcu.SYNCHRONIZE:
                if not self._synchronize(task):
                    return
            elif isinstance(effect, HostPageLock | SlotsLock | EmulatedStores):
                if effect is HostPageLock.BUSY:
                    self.counters["page_lock.waited"] += not was_busy
                task.stop = Stop.BUSY
                self._busy_waiters.append(task)
                return
            elif self._reached(task, effect):
                return
            was_busy = task.fresh = False

    def _wake_busy_waiters(self) -> None:
        """Whoever waits for another operation looks again: one has advanced that was not waiting itself."""
        for task in self._busy_waiters:
            self._make_ready(task)
        self._busy_waiters.clear()

    def _park(self, task: Task) -> None:
        """For some steps; for as many as there may be, while nothing has fallen at the point yet."""
        longest = self.config.park_steps
        point = task.point
        if point is None or self.coverage.covered(point):
            task.wake = self.steps + 1 + self.choices.below(longest + 1)
        else:
            task.wake = self.steps + 1 + longest
        self._parked.append(task)

    def _acquire(self, task: Task) -> bool:
        self.coverage.reached[WaitPoint.MMU_LOCK] += 1
        if self._stepwise and self._lock_owner is None and task.fresh:
            self._take_lock(task)  # it has stopped right before already
            return True
        if (
            self._lock_owner is None
            and not self._stepwise
            and not self.choices.chance(self._rate(WaitPoint.MMU_LOCK))
        ):
            self._take_lock(task)
            return True
        if self._lock_owner is not None:
            self.counters["lock.waited"] += 1
            self.events.emit(ev.LockWaited(task.number))
        self.coverage.parked[WaitPoint.MMU_LOCK] += 1
        self._stop(task, WaitPoint.MMU_LOCK, Stop.LOCK)
        self._lock_waiters.append(task)
        return False

    def _release(self, task: Task) -> bool:
        """mmu_lock is free. True: the operation goes on at once."""
        self._lock_owner = None
        self.events.emit(ev.LockReleased(task.number))
        return True

    def _synchronize(self, task: Task) -> bool:
        """True if no operation of a vCPU is under way that would have to be waited for."""
        self.coverage.reached[WaitPoint.SRCU] += 1
        task.readers = {other.number for other in self.tasks() if other.lane is not None}
        if not task.readers:
            return True
        self.coverage.parked[WaitPoint.SRCU] += 1
        self._stop(task, WaitPoint.SRCU, Stop.SRCU)
        self._srcu_waiters.append(task)
        return False

    def _reader_ended(self, number: int) -> None:
        for task in [task for task in self._srcu_waiters if number in task.readers]:
            task.readers.discard(number)
            if not task.readers:
                self._srcu_waiters.remove(task)
                self._make_ready(task)

    def _reached(self, task: Task, point: Point) -> bool:
        """True if the operation is parked at the point."""
        self.coverage.reached[point] += 1
        if self._stepwise:
            self.coverage.parked[point] += 1
            self._stop(task, point, Stop.READY)
            self._ready.append(task)
            if point.kind is PointKind.MEMORY:
                self._at_memory_point = task
            return True
        if not self.choices.chance(self._rate(point)):
            return False
        self.coverage.parked[point] += 1
        if point.kind is PointKind.MEMORY:
            mark = self.coverage.mark(task.vcpu)
            self._run_lanes()
            self.coverage.resumed(point, task.vcpu, mark)
            return False
        self._stop(task, point, Stop.PARKED)
        self._park(task)
        return True

    def _rate(self, point: Point | WaitPoint) -> float:
        """How often operations are parked at the point: more often while nothing has fallen there yet."""
        rate = self._park_rate
        return rate if rate == 0.0 or self.coverage.covered(point) else max(rate, UNCOVERED_PARK_RATE)

    def _run_lanes(self) -> None:
        """Some steps of the hardware (vCPUs in guest mode, store buffers), and of nobody else."""
        for _ in range(1 + self.choices.below(8)):
            ready: list[VcpuLane | StoreBuffer] = [*self._ready_lanes()]
            if self._tso:
                ready += self._drainable()
            if not ready:
                return
            self.advance(ready[0] if len(ready) == 1 else ready[self.choices.below(len(ready))])

    # --- kicks ---------------------------------------------------------------------------------------------------

    def _kick(self, task: Task, kick: Kick) -> bool | None:
        """Sends the kicks. The answer if there is nothing to wait for, else None: the task waits."""
        if not kick.vcpus:
            return False
        self.coverage.reached[WaitPoint.KICK] += 1
        task.kick = {(number, self.lanes[number].entry) for number in kick.vcpus}
        for number in kick.vcpus:
            self._send_kick(self.lanes[number])
        self.events.emit(ev.FlushRequested(task.number, sorted(task.kick)))
        if self.config.mutant is m.Mutant.FLUSH_NOT_AWAITED:
            task.kick = set()
            return True
        self.coverage.parked[WaitPoint.KICK] += 1
        self._stop(task, WaitPoint.KICK, Stop.KICK)
        self._kick_waiters.append(task)
        return None

    def _send_kick(self, lane: VcpuLane) -> None:
        self.counters["kicks.sent"] += 1
        self.send(lane, m.Kick(lane.entry))

    def _left_guest(self, lane: VcpuLane) -> None:
        """The vCPU's guest entry is over: that answers every kick of it."""
        for task in [task for task in self._kick_waiters if (lane.number, lane.entry) in task.kick]:
            task.kick.discard((lane.number, lane.entry))
            self.counters["kicks.answered"] += 1
            if not task.kick:
                self._kick_waiters.remove(task)
                self.events.emit(ev.FlushAnswered(task.number))
                task.answer = True
                self._make_ready(task)

    # --- what lanes report ---------------------------------------------------------------------------------------

    def send(self, lane: VcpuLane, body: m.MmuMessage) -> None:
        """A message to the vCPU's worker, if one is attached."""
        if lane.incarnation:
            self.outputs.append(ToVcpu(lane.number, lane.incarnation, body))

    def applied(self, lane: VcpuLane, items: list[tuple[int, int, int, int, int, int]], stores: int) -> None:
        """Accesses of the lane were applied, `stores` of them stores."""
        self.events.emit(ev.Accesses(lane.number, lane.entry, items))
        self._progress += len(items)
        if stores:
            self.coverage.stored(lane.number, stores)

    def exit_takes_effect(self, lane: VcpuLane, reason: m.ExitReason) -> None:
        """The guest entry ends; KVM handles the exit."""
        name = m.tag_of(reason)
        gva, error_code = -1, 0
        match reason:
            case m.PageFaultExit():
                gva, error_code = reason.gva, reason.error_code
            case m.EptMisconfigExit():
                gva = reason.gpa
            case m.InvlpgExit():
                gva = reason.gva
            case _:
                pass
        lane.vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        emit = self.events.emit
        emit(ev.Exited(lane.number, lane.entry, name, gva, error_code))
        if isinstance(reason, m.PageFaultExit):
            emit(ev.Invalidated(lane.number, gva, ev.InvalidationCause.PAGE_FAULT))
        if not self.config.vpid:
            emit(ev.Invalidated(lane.number, -1, ev.InvalidationCause.NO_VPID))
        self.counters[f"exits.{name}"] += 1
        self._progress += 1
        self._left_guest(lane)
        if isinstance(reason, m.SendIpiExit):
            for number in reason.targets:
                if number < len(self.lanes) and number != lane.number:
                    self._interrupt(self.lanes[number], reason.vector)
        if isinstance(reason, m.HaltExit) and not lane.interrupts:
            if lane.leaving:
                self._end_incarnation(lane, ErrorCode.DETACHED)
            else:
                lane.halted = True
            return
        self._start(lane, reason)

    def _interrupt(self, target: VcpuLane, vector: int) -> None:
        """kvm_vcpu_kick: the interrupt is pending, and the target leaves guest mode to take it; nobody waits."""
        target.interrupts.add(vector)
        if target.halted:
            target.halted = False
            self._start(target, m.HaltExit())
        elif target.vcpu.mode is VcpuMode.IN_GUEST_MODE:
            target.vcpu.mode = VcpuMode.EXITING_GUEST_MODE
            self._send_kick(target)

    # --- ends of operations --------------------------------------------------------------------------------------

    def _finish(self, task: Task, value: VcpuRun | HostResult) -> None:
        self._wake_busy_waiters()
        self._reader_ended(task.number)
        self._lpages_highest = max(self._lpages_highest, self.kvm.stat.lpages)
        self.events.emit(ev.OperationEnded(task.number))
        match value:
            case VcpuRun():
                assert task.lane is not None
                self.coverage.outcomes[f"{task.name}.{value.outcome}"] += 1
                task.lane.task = None
                if task.lane.vcpu.store_buffer is not None:
                    task.lane.vcpu.store_buffer.drain()
                if task.incarnation == task.lane.incarnation:
                    self._enter(task.lane, value)
                else:
                    self._nobody_to_enter(task.lane, value)
            case HostResult():
                self.coverage.outcomes[f"{task.name}.done"] += 1
                self.outputs.append(HostDone(task.ticket, value.result, value.gfns))
        if self.audited and (
            self.config.audit is m.Audit.ALWAYS
            or (self.config.audit is m.Audit.SAMPLED and self.choices.chance(AUDIT_SAMPLE_RATE))
        ):
            self.audit()

    def _nobody_to_enter(self, lane: VcpuLane, run: VcpuRun) -> None:
        """The operation was of an incarnation that has ended. Its result is for whoever goes on with the program."""
        lane.vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        lane.trail.told(_entered(lane, run, flush=False, interrupts=[]))
        if lane.enter_wanted:
            lane.enter_wanted = False
            self._start(lane, None)

    def _enter(self, lane: VcpuLane, run: VcpuRun) -> None:
        assert run.entry is not None
        shutdown = run.entry.status is k.EntryStatus.SHUTDOWN
        if shutdown or lane.leaving:
            lane.trail.told(_entered(lane, run, flush=False, interrupts=[]))
            if shutdown:
                text = "triple fault: the guest's root table is in no memory slot"
                self._end_incarnation(lane, ErrorCode.SHUTDOWN, text)
            else:
                self._end_incarnation(lane, ErrorCode.DETACHED)
            return
        if lane.resuming and not lane.trail.resumable:
            self._end_not_resumable(lane)
            return
        lane.entry += 1
        lane.was_entered = True
        flush = run.entry.hw_flushes > 0 or run.entry.root_loaded
        emit = self.events.emit
        if run.inject is not None:
            emit(ev.Invalidated(lane.number, run.inject.cr2, ev.InvalidationCause.PAGE_FAULT))
        if flush:
            emit(ev.Invalidated(lane.number, -1, ev.InvalidationCause.ENTRY_FLUSH))
        emit(ev.Entered(lane.number, lane.entry, flush, run.entry.root))
        entered = _entered(lane, run, flush=flush, interrupts=sorted(lane.interrupts))
        lane.interrupts.clear()
        if lane.resuming:
            lane.resuming = False
            resumption = lane.trail.resumption()
            lane.trail.told(entered)
            self.send(lane, msgspec.structs.replace(entered, resume=resumption))
        else:
            lane.tell(entered)

    def audit(self) -> None:
        """The mmu_audit checks, if mmu_lock is free (they hold only then)."""
        if self._lock_owner is not None:
            return
        self.counters["audits"] += 1
        for error in k.mmu_audit(self.kvm):
            self.events.emit(ev.AuditFailed(error.check, error.text))

    # --- for people ----------------------------------------------------------------------------------------------

    def operations_under_way(self) -> list[dict[str, object]]:
        """Each host operation that has not returned: number, name, vCPU, and where it stopped."""
        return [
            {
                "op": task.number,
                "name": task.name,
                "vcpu": task.vcpu,
                "at": "ready" if task.point is None else task.point.name,
                "holds_mmu_lock": task is self._lock_owner,
            }
            for task in self.tasks()
        ]

    def waiting(self) -> list[str]:
        """Each operation that has not returned, and where it stopped, in words."""
        return [
            f"operation {task.number} ({task.name}, "
            f"{'the host' if task.vcpu < 0 else f'vCPU {task.vcpu}'}) "
            f"at {'nothing' if task.point is None else task.point.name}"
            + (", holding mmu_lock" if task is self._lock_owner else "")
            for task in self.tasks()
        ]

    def all_counters(self) -> dict[str, int]:
        """Every counter under its name in docs/REPORT.md."""
        stat = self.kvm.stat
        counters = {f"kvm.{name}": value for name, value in stat.counters().items()}
        counters["kvm.mmu_unsync.current"] = counters.pop("kvm.mmu_unsync")
        counters["kvm.mmu_unsync.highest"] = stat.mmu_unsync_highest
        counters["kvm.lpages.current"] = counters.pop("kvm.lpages")
        counters["kvm.lpages.highest"] = self._lpages_highest
        counters |= {f"kvm.{name}": value for name, value in self.kvm.bypass_counters().items()}
        counters |= self.counters
        counters |= self.coverage.counters()
        counters["accesses.applied"] = self._progress - sum(
            count for name, count in self.counters.items() if name.startswith("exits.")
        )
        return counters


def _entered(lane: VcpuLane, run: VcpuRun, *, flush: bool, interrupts: list[int]) -> m.Entered:
    """What the vCPU is told of an operation's result."""
    return m.Entered(
        lane.entry,
        flush=flush,
        inject=run.inject,
        completed=run.completed,
        general_protection=run.general_protection,
        interrupts=interrupts,
        processor=lane.vcpu.cpu,
    )
