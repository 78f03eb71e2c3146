"""What a vCPU asked for while in guest mode, applied in order, a bit at a time.

A lane is the queue of one vCPU's messages and the state of its guest entry. Its steps are the hardware's: some logged
accesses, a level of a walk, a load or a locked operation, the end of the entry. Between two steps anything else may
happen; the order within the lane never changes.

An incarnation ends with what it had asked for and was not applied; the program and what is pending for it stay, in the
lane's trail, for the next incarnation to go on with.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from shadowmmu.cpu import EptMisconfig, PendingWalk, Translation, WalkFault, WalkResult
from shadowmmu.kvm import VcpuMode
from shadowmmu.machine.trail import Answer, Trail
from shadowmmu.protocol import messages
from shadowmmu.protocol.events import AccessFlag, Bypassed, LockedRead, Walked
from shadowmmu.protocol.messages import LockedOp, LoggedAccess

if TYPE_CHECKING:
    from shadowmmu.kvm import Vcpu
    from shadowmmu.machine.machine import Machine

__all__ = ["VcpuLane"]

LaneItem = messages.Log | messages.Walk | messages.Load | messages.Locked | messages.Exit

_WRITE = int(AccessFlag.WRITE)
_U64 = (1 << 64) - 1
MAX_BURST = 16
"""Most logged accesses applied in one step."""


class VcpuLane:
    """One vCPU of the machine."""

    def __init__(self, machine: Machine, vcpu: Vcpu) -> None:
        self._machine = machine
        self.vcpu = vcpu
        self.number = vcpu.vcpu_id
        self.incarnation = 0  # 0: nobody is attached
        self.entry = 0
        self.halted = False
        self.task: object | None = None  # the host operation of this vCPU that is under way
        self.enter_wanted = False  # when that operation, of an incarnation before, has returned
        self.was_entered = False  # in any incarnation
        self.leaving = False  # detached while an exit was being handled
        self.resuming = False  # the first entry of this incarnation is to say where the program goes on
        self.trail = Trail()
        self.queue: deque[LaneItem] = deque()
        self.interrupts: set[int] = set()
        self._position = 0  # in the log at the head of the queue
        self._walk: PendingWalk | None = None

    @property
    def runnable(self) -> bool:
        """Something of this lane can be applied now."""
        return bool(self.queue) and self.vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE

    @property
    def pending_walk(self) -> PendingWalk | None:
        """The hardware walk that is under way."""
        return self._walk

    def begin(self, incarnation: int, *, resume: bool = False) -> None:
        """A worker attached, with an empty TLB. `resume`: it goes on with the program; else that begins anew."""
        self.incarnation = incarnation
        self.entry = 0
        self.halted = self.leaving = self.enter_wanted = False
        self.resuming = resume
        if not resume:
            self.interrupts.clear()
            self.trail.begin()
        self._clear()

    def end(self) -> None:
        """The incarnation is over: nothing more of it is applied.

        An operation that is under way goes on, and its result is the program's. A HLT that has not ended has done
        nothing yet: whoever goes on with the program executes it again, and so learns where the program is.
        """
        self.incarnation = 0
        self.halted = self.enter_wanted = self.resuming = False
        if self.task is None:
            self.trail.withdraw()
        self._clear()

    def _clear(self) -> None:
        self.queue.clear()
        self._position = 0
        self._walk = None

    def push(self, item: LaneItem) -> None:
        """A message of the vCPU in guest mode. An exit abandons a walk that is under way."""
        if isinstance(item, messages.Exit) and self.queue and isinstance(self.queue[-1], messages.Walk):
            self.queue.pop()
            self._walk = None
        self.queue.append(item)

    def step(self) -> None:
        """Applies the next bit of the lane; call only if `runnable`."""
        item = self.queue[0]
        match item:
            case messages.Log():
                self._apply_log(item)
            case messages.Walk():
                self._advance_walk(item)
            case messages.Load():
                self.queue.popleft()
                self.trail.asks(item)
                self.tell(messages.Loaded(self.entry, self._apply_one(item.access)))
            case messages.Locked():
                self.queue.popleft()
                self.trail.asks(item)
                self.tell(messages.Loaded(self.entry, self._apply_locked(item)))
            case messages.Exit():
                self.queue.popleft()
                self.trail.asks(item)
                self._machine.exit_takes_effect(self, item.reason)

    def tell(self, answer: Answer) -> None:
        """An answer that concerns the program: it has happened, whether or not a worker is there to hear it."""
        self.trail.told(answer)
        self._machine.send(self, answer)

    def _reply(self, body: messages.MmuMessage) -> None:
        self._machine.send(self, body)

    def _apply_log(self, log: messages.Log) -> None:
        accesses = log.accesses
        start = self._position
        left = len(accesses) - start
        count = left if left == 1 else min(left, 1 + self._machine.choices.below(MAX_BURST))
        items = []
        stores = 0
        locate = self._machine.host.locate
        applied = accesses[start : start + count]
        for flags, gva, pfn, size, value in applied:
            located = locate(pfn)
            assert located is not None  # `Machine.refusal` has seen to it
            memory, page = located
            index = page - memory.base
            if flags & _WRITE:
                stores += 1
                memory.write(index << 12 | gva & 0xFFF, size, value)
                items.append((flags, gva, index + memory.base_gfn, pfn, size, value))
            else:
                loaded = memory.read(index << 12 | gva & 0xFFF, size)
                items.append((flags, gva, index + memory.base_gfn, pfn, size, loaded))
        self._machine.applied(self, items, stores)
        self.trail.applied(applied)
        if count == left:
            self._position = 0
            self.queue.popleft()
            self._reply(messages.Applied(1))
        else:
            self._position = start + count

    def _apply_one(self, access: LoggedAccess) -> int:
        flags, gva, pfn, size, _ = access
        located = self._machine.host.locate(pfn)
        assert located is not None
        memory, page = located
        value = memory.read(page - memory.base << 12 | gva & 0xFFF, size)
        self._machine.applied(self, [(flags, gva, memory.gfn(page), pfn, size, value)], 0)
        return value

    def _apply_locked(self, locked: messages.Locked) -> int:
        flags, gva, pfn, size, operand = locked.access
        located = self._machine.host.locate(pfn)
        assert located is not None
        memory, page = located
        offset = page - memory.base << 12 | gva & 0xFFF
        old = memory.read(offset, size)
        gpa = (memory.gfn(page) << 12) + (gva & 0xFFF)
        self._machine.events.emit(LockedRead(self.number, gpa, size, old))
        match locked.op:
            case LockedOp.CMPXCHG:
                new = operand if old == locked.expected else old
            case LockedOp.XCHG:
                new = operand
            case _:
                new = (old + operand) & ((1 << 8 * size) - 1)
        memory.write(offset, size, new)
        flags |= AccessFlag.WRITE | AccessFlag.LOCKED
        self._machine.applied(self, [(int(flags), gva, memory.gfn(page), pfn, size, new)], 1)
        return old

    def _advance_walk(self, walk: messages.Walk) -> None:
        if self._walk is None:
            self._walk = self._machine.tables.walk(self.vcpu, walk.gva, walk.flags)
        try:
            next(self._walk)
            return
        except StopIteration as stop:
            result: WalkResult = stop.value
        self._walk = None
        self.queue.popleft()
        emit = self._machine.events.emit
        match result:
            case Translation():
                flags = int(result.flags)
                emit(
                    Walked(self.number, self.entry, walk.gva, 0, result.pfn, result.level, flags | walk.flags)
                )
                self._reply(messages.Walked(self.entry, walk.walk, result.pfn, result.level, flags))
            case WalkFault():
                error_code = result.error_code
                emit(Walked(self.number, self.entry, walk.gva, error_code, -1, 0, walk.flags))
                fault = messages.WalkFault(self.entry, walk.walk, error_code)
                if self._machine.page_fault_filter.exits(error_code):
                    self._reply(fault)
                else:
                    emit(Bypassed(self.number, walk.gva, error_code))
                    self.trail.asks(walk)
                    self.tell(fault)
            case EptMisconfig():
                emit(Walked(self.number, self.entry, walk.gva, 0, -1, 0, walk.flags))
                self._reply(messages.WalkFault(self.entry, walk.walk, 0, misconfig=True))
