"""The hot loop: every access of every vCPU, by all rules that look at accesses (1, 3, 4, 5, 6, 9).

One pass, one item after another, since a store changes what the next item may do. Each rule keeps a set or a table in
which an innocent access is found by one look-up (host frames known to be fine, translations known to be admissible,
frames that are protected or followed as tables, the contents of memory); what is not found goes to the rule itself.
"""

from __future__ import annotations

from collections.abc import Collection

from shadowmmu.checker.dirty_log import DirtyLogs
from shadowmmu.checker.guest_memory import GuestMemory
from shadowmmu.checker.history import History
from shadowmmu.checker.host_frames import HostFrames
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.progress import Progress
from shadowmmu.checker.stores import LostStores
from shadowmmu.checker.table_history import TIME_SHIFT, TableHistory
from shadowmmu.checker.translations import Translations
from shadowmmu.checker.violation import Rule, Violation
from shadowmmu.checker.write_protection import WriteProtection
from shadowmmu.protocol.events import Accesses, Event

__all__ = ["AccessRules"]

_WRITE = 1  # an IntFlag in the loop over accesses would cost ten times as much
_LOCKED = 16
_MASKS = {size: (1 << 8 * size) - 1 for size in range(1, 9)}


class AccessRules:
    """Runs the rules over `Accesses` events, and other stores through what rules share."""

    def __init__(  # noqa: PLR0917 - what the rules share
        self,
        history: History,
        rules: Collection[Rule],
        processors: dict[int, Processor],
        memory: GuestMemory,
        tables: TableHistory,
        frames: HostFrames,
        protection: WriteProtection,
        translations: Translations,
        stores: LostStores,
        dirty_logs: DirtyLogs,
        progress: Progress,
    ) -> None:
        self._history = history
        self._processors = processors
        self._memory = memory
        self._tables = tables
        self._followed = tables.tables
        self._frames = frames
        self._protection = protection
        self._protected = protection.protected
        self._translations = translations
        self._stores = stores
        self._dirty_logs = dirty_logs
        self._progress = progress
        self._rules = rules
        self._use_after_revoke = Rule.HOST_FRAME_USE_AFTER_REVOKE in rules
        self._write_protection = Rule.WRITE_PROTECTION_BREACH in rules
        self._stale = Rule.STALE_TRANSLATION in rules or Rule.LOST_ACCESSED_DIRTY in rules
        self._lost_store = Rule.LOST_STORE in rules

    def check(self, event: Accesses) -> Violation | None:
        """The first item that breaks a rule."""
        vcpu = event.vcpu
        processor = self._processors.get(vcpu)
        if processor is None:
            processor = self._processors[vcpu] = Processor(vcpu)
        processor.seen = (self._history.index + 1 << TIME_SHIFT) - 1
        processor.repeats = 0
        fine = self._frames.fine if self._use_after_revoke else None
        valid = processor.valid if self._stale else None
        frames = self._memory.frames.get
        for number, (flags, gva, gfn, pfn, size, value) in enumerate(event.items):
            if fine is not None and pfn not in fine:
                violation = self._frames.look_closely(event, number)
                if violation is not None:
                    return violation
            if valid is not None and valid[flags & 7].get(gva >> 12) != gfn >= 0:
                rule = self._translations.admits(processor, gva, flags & 7, gfn)
                if rule is not None and rule in self._rules:
                    return self._translations.violation(rule, processor, event, number)
            frame = frames(gfn)
            if not flags & _WRITE:
                if frame is None or size != 8 or gva & 7 or frame[gva >> 3 & 511] != value:
                    violation = self._stores.loaded(event, number, report=self._lost_store)
                    if violation is not None:
                        return violation
                continue
            self._progress.happened += 1
            if gfn in self._protected and self._write_protection:
                return self._protection.violation(event, number)
            if self._dirty_logs.logging:
                self._dirty_logs.written.add(gfn)
            if flags & _LOCKED and self._stores.pending(vcpu):
                violation = self._stores.locked_access(event, number)
                if violation is not None and self._lost_store:
                    return violation
            shift = gva & 7
            if frame is None or gfn in self._followed or shift + size > 8:
                if gfn >= 0:
                    self.stored(gfn << 12 | gva & 0xFFF, size, value, event, number)
            elif size == 8:
                frame[gva >> 3 & 511] = value
            else:
                word = frame[gva >> 3 & 511]
                if word is not None:
                    mask = _MASKS[size]
                    frame[gva >> 3 & 511] = word & ~(mask << 8 * shift) | (value & mask) << 8 * shift
        return None

    def stored(self, gpa: int, size: int, value: int, event: Event, number: int = 0) -> None:
        """Item or word `number` of the event, or the whole event, is a store to guest memory."""
        changed = self._memory.store(gpa, size, value)
        if gpa >> 12 in self._followed:
            time = (self._history.index << TIME_SHIFT) + number + 1
            for word, old, new in changed:
                self._tables.stored(word, old, new, time, event)
