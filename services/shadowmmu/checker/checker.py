"""The checker: reads the event stream of a run and says when a coherence rule is broken.

It knows the architecture's rules, not KVM's intentions, and reads nothing but events: it works during a run as well
as over a recorded one. `docs/COHERENCE.md` defines each rule. Each rule has a module of its own with its state;
this one numbers the events and hands each to the rules that want it, after it has brought up to date what they share:
guest memory, the guest's tables as they were, and each vCPU as the guest sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

from shadowmmu.checker.accesses import AccessRules
from shadowmmu.checker.dirty_log import DirtyLogs
from shadowmmu.checker.guest_faults import GuestFaults
from shadowmmu.checker.guest_memory import GuestMemory
from shadowmmu.checker.history import History
from shadowmmu.checker.host_frames import HostFrames
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.progress import Progress
from shadowmmu.checker.stores import LostStores
from shadowmmu.checker.structure import audit_failed
from shadowmmu.checker.table_history import FOREVER, TIME_SHIFT, TableHistory
from shadowmmu.checker.translations import Translations
from shadowmmu.checker.violation import Rule, Violation
from shadowmmu.checker.walks import Walks
from shadowmmu.checker.write_protection import WriteProtection
from shadowmmu.protocol.events import (
    Accesses,
    AuditFailed,
    Bypassed,
    DeviceStored,
    DirtyLogRead,
    DirtyLogStarted,
    EmulatedLoad,
    EmulatedStore,
    Entered,
    Event,
    Exited,
    FlushAnswered,
    FlushRequested,
    FrameBacked,
    FrameRevoked,
    GpteUpdate,
    IncarnationEnded,
    Injected,
    InputConsumed,
    Invalidated,
    LockedRead,
    LockReleased,
    MmioAccess,
    NoProgress,
    OperationEnded,
    OperationStarted,
    PagingRegisters,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
    SlotSettled,
    SlotsPublished,
    TlbsDirtyCleared,
    TlbsDirtyRaised,
    Walked,
)

__all__ = ["ALL_RULES", "Checker"]

ALL_RULES = frozenset(Rule)

_Handler: TypeAlias = Callable[[Any], Violation | None]


class Checker:
    """Feed it every event of a run, in order; it answers with the violation that an event is, or None.

    `rules`: those that are checked; the others are as if they did not exist. Time per event is constant but for
    accesses whose translation is an old one, and for tables that the guest begins to use; memory is bounded as
    docs/COHERENCE.md says.
    """

    def __init__(self, rules: Collection[Rule] = ALL_RULES) -> None:
        self._rules = frozenset(rules)
        self._history = History()
        self._memory = GuestMemory()
        self._tables = TableHistory(self._memory)
        self._tables.roots = self._roots
        self._walks = Walks(self._memory, self._tables)
        self._processors: dict[int, Processor] = {}
        self._frames = HostFrames(self._history)
        self._protection = WriteProtection(self._history)
        self._translations = Translations(
            self._history, self._tables, self._walks, self._protection.protected.__contains__
        )
        self._faults = GuestFaults(self._history, self._tables, self._walks)
        self._stores = LostStores(self._history, self._memory)
        self._dirty_logs = DirtyLogs(self._history)
        self._progress = Progress(self._history)
        self._access_rules = AccessRules(
            self._history,
            self._rules,
            self._processors,
            self._memory,
            self._tables,
            self._frames,
            self._protection,
            self._translations,
            self._stores,
            self._dirty_logs,
            self._progress,
        )
        happened = self._progress.something_happened
        self._handlers: dict[type[Event], _Handler] = {
            # what the guest's processors did
            Accesses: self._access_rules.check,
            Walked: self._walked,
            Entered: self._entered,
            Exited: self._exited,
            PagingRegisters: self._paging_registers,
            Injected: self._injected,
            Bypassed: self._bypassed,
            IncarnationEnded: self._incarnation_ended,
            # what was done to guest memory
            EmulatedStore: self._emulated_store,
            EmulatedLoad: self._stores.emulated_load,
            LockedRead: self._stores.locked_read,
            GpteUpdate: self._gpte_update,
            DeviceStored: self._device_stored,
            MmioAccess: self._mmio_access,
            SlotsPublished: self._slots_published,
            SlotSettled: self._slot_settled,
            DirtyLogStarted: self._dirty_logs.started,
            DirtyLogRead: self._dirty_logs.read,
            # what was done to host memory and to shadow pages
            FrameRevoked: _both(self._frames.frame_revoked, happened),
            FrameBacked: _both(self._frames.frame_backed, happened),
            ShadowPageCreated: _both(self._protection.created, happened),
            ShadowPageSynced: _both(self._protection.synced, happened),
            ShadowPageUnsynced: _both(self._protection.unsynced, happened),
            ShadowPageZapped: _both(self._protection.zapped, happened),
            LockReleased: self._protection.lock_released,
            # what is a violation by itself
            AuditFailed: self._audit_failed,
            NoProgress: self._progress.no_progress,
            # what explains violations
            InputConsumed: self._input_consumed,
            OperationStarted: self._operation_started,
            OperationEnded: self._history.operation_ended,
            FlushRequested: self._history.flush_requested,
            FlushAnswered: self._history.flush_answered,
            Invalidated: self._history.invalidated,
            TlbsDirtyRaised: self._history.tlbs_dirty_raised,
            TlbsDirtyCleared: self._history.tlbs_dirty_cleared,
        }

    @property
    def events(self) -> int:
        """How many events were fed."""
        return self._history.index + 1

    def feed(self, event: Event) -> Violation | None:
        """Take in the next event."""
        return self.feed_all((event,))

    def feed_all(self, events: Iterable[Event]) -> Violation | None:
        """Take in events up to the first that is a violation, and return that; None if there is none."""
        handlers = self._handlers.get
        history = self._history
        rules = self._rules
        for event in events:
            history.index += 1
            handler = handlers(type(event))
            if handler is not None:
                violation = handler(event)
                if violation is not None and violation.rule in rules:
                    return violation
        return None

    def fingerprint(self) -> bytes:
        """A digest of all that future verdicts depend on (what violations say of the past apart).

        Two checkers with equal fingerprints, fed the same events from here on, find the same violations. How many
        faults in a row an access has taken while others did something (rule 8, FOREVER_LIMIT) is left out: such faults
        are a cycle of states. Positions in the stream are replaced by their order, and so are serial numbers of shadow
        pages; numbers of operations and journal records are left out. So a search recognises a state that it has seen.
        """
        times: set[int] = {0, FOREVER}
        pages: set[int] = set()

        def note_time(time: int) -> int:
            times.add(time)
            return time

        def note_page(page: int) -> int:
            pages.add(page)
            return page

        self._snapshot(note_time, note_page)
        time_rank = {time: rank for rank, time in enumerate(sorted(times))}
        page_rank = {page: rank for rank, page in enumerate(sorted(pages))}
        ranked = self._snapshot(time_rank.__getitem__, page_rank.__getitem__)
        state = (
            self._memory.snapshot(),
            self._frames.snapshot(),
            self._dirty_logs.snapshot(),
            self._progress.snapshot(),
            ranked,
        )
        return hashlib.blake2b(repr(state).encode(), digest_size=16).digest()

    def _snapshot(self, rank_time: Callable[[int], int], rank_page: Callable[[int], int]) -> object:
        """The state of those who remember times, or serial numbers of shadow pages."""
        return (
            self._tables.snapshot(rank_time),
            tuple(p.snapshot(rank_time) for _, p in sorted(self._processors.items())),
            self._protection.snapshot(rank_page),
            self._stores.snapshot(rank_time),
            rank_time(self._faults.slots_changed),
        )

    # --- what rules share ---------------------------------------------------------------------------------------

    @property
    def _now(self) -> int:
        return self._history.index << TIME_SHIFT

    def _processor(self, vcpu: int) -> Processor:
        processor = self._processors.get(vcpu)
        if processor is None:
            processor = self._processors[vcpu] = Processor(vcpu)
        return processor

    def _roots(self) -> list[tuple[int, int]]:
        return [
            (span.paging.root >> 12, span.paging.format.levels[0][0])
            for processor in self._processors.values()
            for span in processor.spans()
        ]

    def _set_horizons(self) -> None:
        """What held before every vCPU's last invalidation matters to nobody."""
        paging = [processor for processor in self._processors.values() if processor.span is not None]
        self._tables.horizon = min((processor.non_global for processor in paging), default=self._now)
        self._tables.horizon_global = min((processor.everything for processor in paging), default=self._now)

    # --- what the guest's processors did ------------------------------------------------------------------------

    def _walked(self, event: Walked) -> None:
        processor = self._processor(event.vcpu)
        processor.walking = processor.seen
        processor.seen = self._history.index << TIME_SHIFT

    def _entered(self, event: Entered) -> None:
        processor = self._processor(event.vcpu)
        processor.seen = self._now
        if processor.fault is not None:
            processor.invalidate_page(processor.fault, processor.exited, caches=False)
            processor.fault = None

    def _exited(self, event: Exited) -> Violation | None:
        processor = self._processor(event.vcpu)
        processor.exited = self._now
        if event.reason == "invlpg":
            processor.invalidate_page(event.gva, self._now, caches=True)
            processor.last = self._history.index, event
        return self._progress.exited(processor, event)

    def _paging_registers(self, event: PagingRegisters) -> None:
        processor = self._processor(event.vcpu)
        processor.load(event, self._now)
        processor.last = self._history.index, event
        self._set_horizons()
        if processor.span is not None:
            paging = processor.span.paging
            self._tables.follow(paging.root >> 12, paging.format.levels[0][0])
            for pdpte in event.pdptes if paging.format.name == "PAE" else ():
                if pdpte & 1:
                    self._tables.follow(paging.child(pdpte), 2, paging.root >> 12)

    def _injected(self, event: Injected) -> Violation | None:
        processor = self._processor(event.vcpu)
        processor.fault = event.cr2
        processor.repeats = 0
        return self._faults.injected(processor, event)

    def _bypassed(self, event: Bypassed) -> Violation | None:
        processor = self._processor(event.vcpu)
        processor.repeats = 0
        return self._faults.bypassed(processor, event)

    def _incarnation_ended(self, event: IncarnationEnded) -> None:
        self._processor(event.vcpu).fault = None

    # --- what was done to guest memory --------------------------------------------------------------------------

    def _emulated_store(self, event: EmulatedStore) -> Violation | None:
        violation = self._stores.emulated_store(event)
        self._access_rules.stored(event.gpa, event.size, event.value, event)
        self._dirty_logs.stored(event.gpa >> 12)
        self._progress.happened += 1
        self._processor(event.vcpu).repeats = 0
        return violation

    def _gpte_update(self, event: GpteUpdate) -> Violation | None:
        violation = self._stores.gpte_update(event)
        self._access_rules.stored(event.gpa, event.size, event.value, event)
        self._dirty_logs.stored(event.gpa >> 12)
        self._progress.happened += 1
        return violation

    def _device_stored(self, event: DeviceStored) -> None:
        for number, (gpa, value) in enumerate(event.words):
            self._access_rules.stored(gpa, 8, value, event, number)
        self._progress.happened += 1

    def _mmio_access(self, event: MmioAccess) -> Violation | None:
        processor = self._processor(event.vcpu)
        processor.repeats = 0
        return self._stores.mmio_access(processor, event)

    def _slots_published(self, event: SlotsPublished) -> None:
        self._faults.slots_changed = self._now
        self._tables.replaced(self._memory.publish(event), self._now)
        self._stores.slots_published(event)
        self._dirty_logs.slots_published(event)
        self._progress.happened += 1

    def _slot_settled(self, event: SlotSettled) -> None:
        self._stores.slot_settled(event, self._now)
        self._dirty_logs.slot_settled(event)
        self._progress.happened += 1

    # --- the rest -----------------------------------------------------------------------------------------------

    def _input_consumed(self, event: InputConsumed) -> None:
        self._history.record = event.record

    def _operation_started(self, event: OperationStarted) -> None:
        self._history.operation_started(event)
        if event.vcpu < 0:
            self._progress.happened += 1

    def _audit_failed(self, event: AuditFailed) -> Violation:
        return audit_failed(self._history, event)


def _both(first: Callable[[Any], object], second: Callable[[object], object]) -> _Handler:
    def handle(event: Event) -> None:
        first(event)
        second(event)

    return handle
