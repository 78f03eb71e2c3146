"""A host operation under way, as slices on the track of who executes it.

Within the operation's slice lie, one in another: waiting for mmu_lock, holding it, waiting for kicked vCPUs. What is
closed closes what lies in it. What came of the operation the event stream does not say; it follows from the events of
its vCPU meanwhile, as docs/TRACE.md tells.
"""

from __future__ import annotations

import enum

from shadowmmu.kvm import Outcome
from shadowmmu.protocol.events import (
    EmulatedLoad,
    EmulatedStore,
    Injected,
    LockedRead,
    MmioAccess,
    PagingRegisters,
)
from shadowmmu.timeline.model import Args, Category
from shadowmmu.timeline.pen import Pen

__all__ = ["Inner", "Operation", "OutcomeEvent"]

OutcomeEvent = Injected | EmulatedLoad | EmulatedStore | LockedRead | MmioAccess | PagingRegisters
"""An event of a vCPU's host operation that tells what comes of it."""

_OUTCOMES: dict[type[OutcomeEvent], str] = {
    Injected: Outcome.INJECT.value,
    EmulatedLoad: Outcome.EMULATED.value,
    EmulatedStore: Outcome.EMULATED.value,
    LockedRead: Outcome.EMULATED.value,
    MmioAccess: Outcome.MMIO.value,
    PagingRegisters: "done",
}
_AT_FIRST = {
    "vcpu.page_fault": Outcome.RETRY.value,
    "vcpu.ept_misconfig": Outcome.RETRY.value,
    "vcpu.register_write": "general_protection",
}
"""Outcomes of operations of which no event tells otherwise; those of all others are "done"."""


class Inner(enum.Enum):
    """A slice within an operation's."""

    LOCK_WAIT = ("waits for mmu_lock", Category.LOCK)
    LOCK_HELD = ("holds mmu_lock", Category.LOCK)
    KICK_WAIT = ("waits for kicked vCPUs", Category.KICK)

    def __init__(self, title: str, category: Category) -> None:
        self.title = title
        self.category = category


class Operation:
    """An operation: `number` as in the events, `vcpu` -1 for the host agent, whose `thread` it then runs on."""

    def __init__(self, number: int, name: str, pen: Pen, *, vcpu: int, track: int, thread: int = -1) -> None:
        self.number = number
        self.name = name
        self.vcpu = vcpu
        self.track = track
        self.thread = thread
        self._pen = pen
        self._open: list[Inner] = []
        self._outcome = _AT_FIRST.get(name, "done")

    def begin(self) -> None:
        """The operation begins."""
        self._pen.begin(self.track, self.name, Category.OPERATION, (("op", self.number),))

    def heard(self, event: OutcomeEvent) -> None:
        """Something that the operation's vCPU met meanwhile."""
        self._outcome = _OUTCOMES[type(event)]

    def enter(self, inner: Inner, args: Args = (), flows: tuple[int, ...] = ()) -> None:
        """A slice within the operation begins."""
        self._open.append(inner)
        self._pen.begin(self.track, inner.title, inner.category, args, flows=flows)

    def leave(self, inner: Inner) -> None:
        """That slice ends, if it is open, and whatever lies in it."""
        while inner in self._open:
            self._open.pop()
            self._pen.end(self.track)

    def end(self) -> None:
        """The operation has returned."""
        self._end((("outcome", self._outcome),))

    def break_off(self) -> None:
        """The run ends before the operation does."""
        self._end((("unfinished", True),))

    def _end(self, args: Args) -> None:
        while self._open:
            self._open.pop()
            self._pen.end(self.track)
        self._pen.end(self.track, args)
