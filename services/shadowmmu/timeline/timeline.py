"""From the events of a run to its timeline: tracks, slices, instants, flows and counters.

A pure function of (time, event) pairs, told one after another; what comes of them goes to a sink at once, so memory is
bounded by what is under way. The tracks: each vCPU (guest mode; an exit with the host operation that handles it, up
to the next entry), the host agent's operations (a track per one under way at once), mmu_lock and its holder, memory,
and counters. Relies on the events of `shadowmmu.protocol.events` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from shadowmmu.kvm.role import role_text
from shadowmmu.protocol import events as ev
from shadowmmu.timeline.bookkeeping import HostThreads, Pages
from shadowmmu.timeline.kicks import Kicks
from shadowmmu.timeline.model import (
    Address,
    Args,
    Category,
    RecordConsumed,
    Sink,
    TrackKind,
)
from shadowmmu.timeline.operation import Inner, Operation, OutcomeEvent
from shadowmmu.timeline.pen import Pen

__all__ = ["Counter", "Timeline", "build"]

_VCPU_RANK: Final = 100
_LOCK_RANK: Final = 1000
_HOST_RANK: Final = 2000
_MEMORY_RANK: Final = 4000
_COUNTER_RANK: Final = 5000


class Counter:
    """Names of counters."""

    QUEUE: Final = "waiting for mmu_lock"
    TLBS_DIRTY: Final = "tlbs_dirty"
    UNSYNC: Final = "mmu_unsync"
    PAGES: Final = "shadow pages in use"
    UNANSWERED: Final = "unanswered kicks"
    EXITS: Final = "exits"
    KICKS: Final = "kicks for flushes"


_COUNTERS: Final = {
    Counter.QUEUE: "Operations that wait for mmu_lock while another holds it.",
    Counter.TLBS_DIRTY: "kvm->tlbs_dirty: shadow entries dropped with the flush put off.",
    Counter.UNSYNC: "Shadow pages whose guest table may be written without an exit.",
    Counter.PAGES: "Shadow pages made and not zapped.",
    Counter.UNANSWERED: "vCPUs that remote flushes wait for.",
    Counter.EXITS: "Exits so far.",
    Counter.KICKS: "Kicks that remote flushes have sent so far.",
}


class _Vcpu:
    """A vCPU's track, and what is open on it."""

    def __init__(self, track: int) -> None:
        self.track = track
        self.entry = 0
        self.in_guest = False
        self.exited = False  # the slice of an exit is open
        self.gone = False  # its incarnation ended while an operation was under way
        self.operation: Operation | None = None
        self.accesses = 0
        self.walks = 0


class Timeline:
    """Takes the events of a run in order; `title` names the virtual machine, `axis` says what its time is.

    Times of one vCPU or host thread do not decrease; on a track shared by several, time stands rather than goes back.
    """

    def __init__(self, sink: Sink, title: str, axis: str) -> None:
        self._sink = sink
        self._pen = pen = Pen(sink)
        self._latest = 0
        self._vcpus: dict[int, _Vcpu] = {}
        self._operations: dict[int, Operation] = {}
        self._threads = HostThreads()
        self._thread_tracks: dict[int, int] = {}
        self._holder: Operation | None = None
        self._queue: set[int] = set()
        self._pages = Pages()
        self._kicks = Kicks()
        self._exits = 0
        self._values: dict[str, int] = {}
        self._machine = pen.track(TrackKind.MACHINE, title, 0, axis)
        self._lock = pen.track(TrackKind.SLICES, "mmu_lock", _LOCK_RANK, "Who holds it.")
        self._memory = pen.track(
            TrackKind.SLICES,
            "memory",
            _MEMORY_RANK,
            "Host frames taken away and given, memory slots, dirty logs.",
        )
        self._counters = {
            name: pen.track(TrackKind.COUNTER, name, _COUNTER_RANK + rank, note)
            for rank, (name, note) in enumerate(_COUNTERS.items())
        }
        for name in _COUNTERS:
            self._count(name, 0)
        self._handlers: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.InputConsumed: self._input_consumed,
            ev.Accesses: self._accesses,
            ev.Walked: self._walked,
            ev.Entered: self._entered,
            ev.Exited: self._exited,
            ev.Bypassed: self._bypassed,
            ev.IncarnationStarted: self._incarnation_started,
            ev.IncarnationEnded: self._incarnation_ended,
            ev.OperationStarted: self._operation_started,
            ev.OperationEnded: self._operation_ended,
            ev.LockWaited: self._lock_waited,
            ev.LockTaken: self._lock_taken,
            ev.LockReleased: self._lock_released,
            ev.FlushRequested: self._flush_requested,
            ev.FlushAnswered: self._flush_answered,
            ev.TlbsDirtyRaised: lambda event: self._count(Counter.TLBS_DIRTY, event.value),
            ev.TlbsDirtyCleared: lambda _event: self._count(Counter.TLBS_DIRTY, 0),
            ev.ShadowPageCreated: self._created,
            ev.ShadowPageUnsynced: self._unsynced,
            ev.ShadowPageSynced: self._synced,
            ev.ShadowPageZapped: self._zapped,
            ev.FrameRevoked: self._frame_revoked,
            ev.FrameBacked: self._frame_backed,
            ev.SlotsPublished: self._slots_published,
            ev.SlotSettled: self._slot_settled,
            ev.DirtyLogStarted: self._dirty_log_started,
            ev.DirtyLogRead: self._dirty_log_read,
            ev.Injected: self._injected,
            ev.EmulatedStore: self._outcome,
            ev.EmulatedLoad: self._outcome,
            ev.LockedRead: self._outcome,
            ev.MmioAccess: self._outcome,
            ev.PagingRegisters: self._outcome,
            ev.AuditFailed: self._audit_failed,
            ev.NoProgress: self._no_progress,
        }

    def event(self, time: int, event: ev.Event) -> None:
        """The next event, at `time` in nanoseconds."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            self._pen.now = time
            self._latest = max(self._latest, time)
            handler(event)

    def violation(self, time: int, text: str) -> None:
        """The event before broke a rule of coherence."""
        self._pen.now = time
        self._found("violation", text)

    def end(self) -> None:
        """There are no more events: what is open ends here, and is marked as unfinished."""
        self._pen.now = self._latest
        loose = self._kicks.loose()
        if loose:
            self._pen.instant(self._machine, "kicks unanswered", Category.KICK, ends=loose)
        if self._holder is not None:
            self._pen.end(self._lock, (("unfinished", True),))
        for operation in self._operations.values():
            operation.break_off()
        for vcpu in self._vcpus.values():
            if vcpu.in_guest or vcpu.exited:
                self._pen.end(vcpu.track, (("unfinished", True),))

    # --- tracks and counters -------------------------------------------------------------------------------------

    def _vcpu(self, number: int) -> _Vcpu:
        vcpu = self._vcpus.get(number)
        if vcpu is None:
            vcpu = _Vcpu(self._pen.track(TrackKind.SLICES, f"vCPU {number}", _VCPU_RANK + number))
            self._vcpus[number] = vcpu
        return vcpu

    def _host_track(self, thread: int) -> int:
        track = self._thread_tracks.get(thread)
        if track is None:
            track = self._pen.track(TrackKind.SLICES, f"host agent {thread}", _HOST_RANK + thread)
            self._thread_tracks[thread] = track
        return track

    def _count(self, name: str, value: int) -> None:
        if self._values.get(name) != value:
            self._values[name] = value
            self._pen.count(self._counters[name], value)

    def _found(self, name: str, text: str) -> None:
        self._pen.instant(self._machine, name, Category.FINDING, (("text", text),))

    def _input_consumed(self, event: ev.InputConsumed) -> None:
        self._sink(RecordConsumed(self._pen.now, event.record))

    # --- vCPUs ---------------------------------------------------------------------------------------------------

    def _accesses(self, event: ev.Accesses) -> None:
        self._vcpu(event.vcpu).accesses += len(event.items)

    def _walked(self, event: ev.Walked) -> None:
        self._vcpu(event.vcpu).walks += 1

    def _entered(self, event: ev.Entered) -> None:
        self._pages.entered(event)
        vcpu = self._vcpu(event.vcpu)
        self._end_exit(vcpu)
        vcpu.entry = event.entry
        vcpu.in_guest = True
        vcpu.accesses = vcpu.walks = 0
        args: Args = (("entry", event.entry), ("root", event.root), ("tlb flushed", event.flush))
        self._pen.begin(vcpu.track, "guest mode", Category.GUEST, args)

    def _leave_guest(self, vcpu: _Vcpu, reason: str) -> None:
        if vcpu.in_guest:
            vcpu.in_guest = False
            args: Args = (("exit", reason), ("accesses", vcpu.accesses), ("walks", vcpu.walks))
            self._pen.end(vcpu.track, args)

    def _exited(self, event: ev.Exited) -> None:
        vcpu = self._vcpu(event.vcpu)
        self._leave_guest(vcpu, event.reason)
        args: Args = (("entry", event.entry),)
        if event.gva >= 0:
            args += (("address", Address(event.gva)),)
        if event.reason == "page_fault":
            args += (("error code", Address(event.error_code)),)
        flows, ends = self._kicks.answer(self._pen.now, event.vcpu, event.entry)
        vcpu.exited = True
        self._pen.begin(vcpu.track, f"exit {event.reason}", Category.EXIT, args, flows=flows, ends=ends)
        self._exits += 1
        self._count(Counter.EXITS, self._exits)
        self._count(Counter.UNANSWERED, self._kicks.unanswered)

    def _end_exit(self, vcpu: _Vcpu) -> None:
        if vcpu.exited:
            vcpu.exited = False
            self._pen.end(vcpu.track)

    def _bypassed(self, event: ev.Bypassed) -> None:
        args: Args = (("address", Address(event.gva)), ("error code", Address(event.error_code)))
        track = self._vcpu(event.vcpu).track
        self._pen.instant(track, "fault without exit", Category.FAULT, args)

    def _injected(self, event: ev.Injected) -> None:
        args: Args = (("cr2", Address(event.cr2)), ("error code", Address(event.error_code)))
        self._pen.instant(self._vcpu(event.vcpu).track, "inject #PF", Category.FAULT, args)
        self._outcome(event)

    def _outcome(self, event: OutcomeEvent) -> None:
        operation = self._vcpu(event.vcpu).operation
        if operation is not None:
            operation.heard(event)

    def _incarnation_started(self, event: ev.IncarnationStarted) -> None:
        args: Args = (("incarnation", event.incarnation),)
        track = self._vcpu(event.vcpu).track
        self._pen.instant(track, "worker attached", Category.WORKER, args)

    def _incarnation_ended(self, event: ev.IncarnationEnded) -> None:
        vcpu = self._vcpu(event.vcpu)
        self._leave_guest(vcpu, event.reason)
        vcpu.gone = vcpu.operation is not None
        if not vcpu.gone:
            self._end_exit(vcpu)
        flows, ends = self._kicks.answer(self._pen.now, event.vcpu, vcpu.entry)
        args: Args = (("incarnation", event.incarnation), ("reason", event.reason))
        self._pen.instant(vcpu.track, "worker gone", Category.WORKER, args, flows=flows, ends=ends)
        self._count(Counter.UNANSWERED, self._kicks.unanswered)

    # --- host operations -----------------------------------------------------------------------------------------

    def _operation_started(self, event: ev.OperationStarted) -> None:
        if event.vcpu < 0:
            thread = self._threads.take()
            track = self._host_track(thread)
            operation = Operation(event.op, event.name, self._pen, vcpu=-1, track=track, thread=thread)
        else:
            vcpu = self._vcpu(event.vcpu)
            operation = Operation(event.op, event.name, self._pen, vcpu=event.vcpu, track=vcpu.track)
            vcpu.operation = operation
        self._operations[event.op] = operation
        operation.begin()

    def _operation_ended(self, event: ev.OperationEnded) -> None:
        operation = self._operations.pop(event.op)
        self._goes_on(operation)
        operation.end()
        if operation.vcpu < 0:
            self._threads.give_back(operation.thread)
            return
        vcpu = self._vcpu(operation.vcpu)
        vcpu.operation = None
        if vcpu.gone:
            vcpu.gone = False
            self._end_exit(vcpu)

    def _lock_waited(self, event: ev.LockWaited) -> None:
        operation = self._operations[event.op]
        self._goes_on(operation)
        operation.enter(Inner.LOCK_WAIT)
        self._queue.add(event.op)
        self._count(Counter.QUEUE, len(self._queue))

    def _lock_taken(self, event: ev.LockTaken) -> None:
        operation = self._operations[event.op]
        self._goes_on(operation)
        operation.leave(Inner.LOCK_WAIT)
        self._queue.discard(event.op)
        self._count(Counter.QUEUE, len(self._queue))
        operation.enter(Inner.LOCK_HELD)
        self._holder = operation
        who = f"host agent {operation.thread}" if operation.vcpu < 0 else f"vCPU {operation.vcpu}"
        args: Args = (("op", operation.number), ("operation", operation.name))
        self._pen.begin(self._lock, who, Category.LOCK, args)

    def _lock_released(self, event: ev.LockReleased) -> None:
        operation = self._operations[event.op]
        self._goes_on(operation)
        operation.leave(Inner.LOCK_HELD)
        self._holder = None
        self._pen.end(self._lock)

    # --- kicks ---------------------------------------------------------------------------------------------------

    def _flush_requested(self, event: ev.FlushRequested) -> None:
        operation = self._operations[event.op]
        self._goes_on(operation)
        flows = self._kicks.ask(self._pen.now, event.op, event.targets)
        who = ", ".join(f"vCPU {vcpu}" for vcpu, _ in event.targets)
        operation.enter(Inner.KICK_WAIT, (("kicked", who),), flows)
        self._count(Counter.KICKS, self._kicks.sent)
        self._count(Counter.UNANSWERED, self._kicks.unanswered)

    def _flush_answered(self, event: ev.FlushAnswered) -> None:
        operation = self._operations[event.op]
        ends = self._kicks.flushed(event.op)
        self._pen.instant(operation.track, "kicks answered", Category.KICK, ends=ends)
        operation.leave(Inner.KICK_WAIT)

    def _goes_on(self, operation: Operation) -> None:
        """An operation that does not wait for its kicks any more, though they are unanswered (a mutant's way)."""
        if self._kicks.waits(operation.number):
            self._kicks.gave_up(operation.number)
            operation.leave(Inner.KICK_WAIT)

    # --- shadow pages --------------------------------------------------------------------------------------------

    def _shadow(self, name: str, args: Args) -> None:
        """Shadow pages change under mmu_lock: it is its holder's doing."""
        track = self._machine if self._holder is None else self._holder.track
        self._pen.instant(track, name, Category.SHADOW, args)

    def _created(self, event: ev.ShadowPageCreated) -> None:
        self._pages.created(event)
        self._shadow(
            "shadow page made",
            (
                ("sp", event.sp),
                ("gfn", Address(event.gfn)),
                ("level", event.level),
                ("direct", event.direct),
                ("role", role_text(event.role)),
            ),
        )
        self._count(Counter.PAGES, len(self._pages))

    def _unsynced(self, event: ev.ShadowPageUnsynced) -> None:
        self._pages.unsynced(event)
        self._shadow("shadow page unsync", (("sp", event.sp), ("gfn", Address(event.gfn))))
        self._count(Counter.UNSYNC, self._pages.unsync)

    def _synced(self, event: ev.ShadowPageSynced) -> None:
        self._pages.synced(event)
        self._shadow("shadow page synced", (("sp", event.sp), ("gfn", Address(event.gfn))))
        self._count(Counter.UNSYNC, self._pages.unsync)

    def _zapped(self, event: ev.ShadowPageZapped) -> None:
        self._pages.zapped(event)
        args: Args = (("sp", event.sp), ("gfn", Address(event.gfn)), ("root in use", event.in_use))
        self._shadow("shadow page zapped", args)
        self._count(Counter.PAGES, len(self._pages))
        self._count(Counter.UNSYNC, self._pages.unsync)

    # --- memory, and what was found ------------------------------------------------------------------------------

    def _in_memory(self, name: str, args: Args) -> None:
        self._pen.instant(self._memory, name, Category.MEMORY, args)

    def _frame_revoked(self, event: ev.FrameRevoked) -> None:
        self._in_memory("frame revoked", (("gfn", Address(event.gfn)), ("pfn", Address(event.pfn))))

    def _frame_backed(self, event: ev.FrameBacked) -> None:
        self._in_memory("frame backed", (("gfn", Address(event.gfn)), ("pfn", Address(event.pfn))))

    def _slots_published(self, event: ev.SlotsPublished) -> None:
        slots = "; ".join(
            f"{number}: {frames} frames from {first:#x}{', going' if invalid else ''}"
            for number, first, frames, invalid in event.slots
        )
        self._in_memory("memory slots", (("slots", slots),))

    def _slot_settled(self, event: ev.SlotSettled) -> None:
        args: Args = (
            ("slot", event.slot),
            ("first frame", Address(event.base_gfn)),
            ("frames", event.npages),
            ("dirty log", event.dirty_log),
        )
        self._in_memory("slot settled", args)

    def _dirty_log_started(self, event: ev.DirtyLogStarted) -> None:
        self._in_memory("dirty log begins", (("slot", event.slot),))

    def _dirty_log_read(self, event: ev.DirtyLogRead) -> None:
        self._in_memory("dirty log read", (("slot", event.slot), ("frames", len(event.gfns))))

    def _audit_failed(self, event: ev.AuditFailed) -> None:
        self._found(f"audit failed: {event.check}", event.text)

    def _no_progress(self, event: ev.NoProgress) -> None:
        self._found("no progress", "; ".join(event.waiting))


def build(events: Iterable[tuple[int, ev.Event]], sink: Sink, title: str, axis: str) -> None:
    """The whole timeline of (time in nanoseconds, event) pairs."""
    timeline = Timeline(sink, title, axis)
    for time, event in events:
        timeline.event(time, event)
    timeline.end()
