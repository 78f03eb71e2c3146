"""Rule 5: lost dirty page. What is stored after get_dirty_log has returned is in what its next call returns.

Stores of vCPUs, the emulator's, and those of accessed and dirty bits in guest entries count; a device's do not. What
is stored while a call is at work may be in its answer or in the next one's. The rule holds from when logging was
switched on and that call has returned. A slot that goes, moves or is logged no more is forgotten.
"""

from __future__ import annotations

from shadowmmu.checker.history import History
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.protocol.events import DirtyLogRead, DirtyLogStarted, SlotSettled, SlotsPublished

__all__ = ["DirtyLogs"]


class _Log:
    """A slot that is logged: its frames, those that the next answer must have, and when the last one was given."""

    __slots__ = ("base", "due", "npages", "since", "under_way")

    def __init__(self, base: int, npages: int, since: int) -> None:
        self.base = base
        self.npages = npages
        self.since = since
        self.due: set[int] = set()
        self.under_way = False


class DirtyLogs:
    """Rule 5. `written`: guest frames stored to, into which `accesses` puts them while `logging` is true."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._logs: dict[int, _Log] = {}
        self.written: set[int] = set()
        self.logging = False
        self._answers: dict[int, tuple[int, DirtyLogRead]] = {}

    def stored(self, gfn: int) -> None:
        """Somebody whose stores are logged stores to the frame."""
        if self.logging:
            self.written.add(gfn)

    def _take(self, log: _Log) -> set[int]:
        """The frames of the slot stored to since this was last asked."""
        end = log.base + log.npages
        found = {gfn for gfn in self.written if log.base <= gfn < end}
        self.written -= found
        return found

    def slots_published(self, event: SlotsPublished) -> None:
        """A slot that is elsewhere now, or going, is not the one that is logged."""
        now = {slot: (base, npages) for slot, base, npages, going in event.slots if not going}
        for slot in [slot for slot, log in self._logs.items() if now.get(slot) != (log.base, log.npages)]:
            self._forget(slot)

    def slot_settled(self, event: SlotSettled) -> None:
        """Logging was switched on, or off."""
        if not event.dirty_log or not event.npages:
            self._forget(event.slot)
            return
        log = self._logs.get(event.slot)
        if log is None or (log.base, log.npages) != (event.base_gfn, event.npages):
            log = self._logs[event.slot] = _Log(event.base_gfn, event.npages, self._history.index)
            self._take(log)
            self.logging = True

    def _forget(self, slot: int) -> None:
        log = self._logs.pop(slot, None)
        if log is not None:
            self._take(log)
        self._answers.pop(slot, None)
        self.logging = bool(self._logs)
        if not self.logging:
            self.written.clear()

    def started(self, event: DirtyLogStarted) -> None:
        """get_dirty_log begins."""
        log = self._logs.get(event.slot)
        if log is not None:
            log.due |= self._take(log)
            log.under_way = True

    def read(self, event: DirtyLogRead) -> Violation | None:
        """get_dirty_log returns."""
        log = self._logs.get(event.slot)
        if log is None or not log.under_way:
            return None
        answered = set(event.gfns)
        lost = log.due - answered
        since, before = log.since, self._answers.get(event.slot)
        log.due = self._take(log) - answered
        log.since = self._history.index
        log.under_way = False
        self._answers[event.slot] = self._history.index, event
        if not lost:
            return None
        frames = ", ".join(f"{gfn:#x}" for gfn in sorted(lost)[:8])
        related = []
        if before is not None:
            related.append(RelatedEvent(before[0], before[1], "the answer before"))
        return Violation(
            rule=Rule.LOST_DIRTY_PAGE,
            text=f"the dirty log of slot {event.slot} lacks guest frames {frames}, which were stored to after event "
            f"{since}, when the log was begun anew, and before this call",
            vcpu=-1,
            access=None,
            journal_record=self._history.record,
            event_index=self._history.index,
            blame="whoever gave a writable translation of these frames without marking them dirty, or left one when "
            "the log was begun anew",
            related=tuple(related),
        )

    def snapshot(self) -> object:
        """What future verdicts depend on, canonically."""
        logs = [
            (slot, log.base, log.npages, tuple(sorted(log.due)), log.under_way)
            for slot, log in sorted(self._logs.items())
        ]
        return tuple(logs), tuple(sorted(self.written))
