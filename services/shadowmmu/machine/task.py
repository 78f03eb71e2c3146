"""A host operation under way: its generator, and where it stopped."""

from __future__ import annotations

import enum

from shadowmmu.kvm import Operation, Point
from shadowmmu.machine.coverage import WaitPoint
from shadowmmu.machine.lane import VcpuLane
from shadowmmu.machine.operations import HostResult, VcpuRun

__all__ = ["Stop", "Task"]


class Stop(enum.Enum):
    """What an operation waits for."""

    READY = enum.auto()  # for its turn
    LOCK = enum.auto()  # for mmu_lock
    KICK = enum.auto()  # for the answers of kicked vCPUs
    PARKED = enum.auto()  # for some steps
    BUSY = enum.auto()  # for another operation on the same page, or on memory slots
    SRCU = enum.auto()  # for operations of vCPUs
    RELEASE = enum.auto()  # until what it does under mmu_lock is done (virtual time)


class Task:
    """A host operation under way. `lane` is None for the host agent's; `ticket` is for its answer."""

    __slots__ = (
        "answer",
        "fresh",
        "incarnation",
        "kick",
        "lane",
        "mark",
        "name",
        "number",
        "operation",
        "point",
        "prolonged",
        "readers",
        "since",
        "stop",
        "ticket",
        "wake",
    )

    def __init__(
        self,
        number: int,
        name: str,
        operation: Operation[VcpuRun] | Operation[HostResult],
        lane: VcpuLane | None,
        ticket: int,
    ) -> None:
        self.number = number
        self.name = name
        self.operation = operation
        self.lane = lane
        self.incarnation = 0 if lane is None else lane.incarnation
        self.ticket = ticket
        self.stop = Stop.READY
        self.fresh = True  # nothing has happened since it went on
        self.answer: bool | None = None
        self.point: Point | WaitPoint | None = None
        self.mark = (0, 0)
        self.since = 0  # the step at which it stopped
        self.wake = 0  # the step at which it is ready again
        self.prolonged = 0  # how often its time to be parked was over and it stayed
        self.kick: set[tuple[int, int]] = set()
        self.readers: set[int] = set()  # numbers of the operations that it waits for

    @property
    def vcpu(self) -> int:
        return -1 if self.lane is None else self.lane.number
