"""Rule 8: no progress. A run in which nothing can go on, and an access that faults for ever.

A vCPU may have to take a page fault again: because somebody changed a table, took the page away, zapped or
synchronised a shadow page meanwhile, or because another vCPU's entry was needed first. If nobody did anything of that
kind, KVM sees the second time what it saw the first time. REPEATS_LIMIT leaves room for what may go on for a few
exits (two entries that displace each other in a shadow page limit, one spurious fault per level of the tables). While
an operation of the host is under way nothing is counted: between invalidate_range_start and invalidate_range_end
every fault is to be tried again (mmu_notifier_retry), however long the host takes. FOREVER_LIMIT holds whatever
others do.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.checker.history import History
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.protocol.events import Exited, NoProgress

__all__ = ["Progress"]

REPEATS_LIMIT: Final = 16
"""Page-fault exits of one page, with one error code, between which nothing happens."""
FOREVER_LIMIT: Final = 1000
"""The same, whatever others do, as long as the vCPU itself gets no further."""


class _Faults:
    """A vCPU's last page-fault exits: the first of those that are alike, and how many since anything else happened."""

    __slots__ = ("first", "key", "quiet", "seen")

    def __init__(self) -> None:
        self.key = (-1, -1)
        self.quiet = 0
        self.seen = -1
        self.first = (0, Exited(0, 0, "", 0, 0))


class Progress:
    """Rule 8. `happened` counts what could explain that an access faults again; other rules' handlers raise it."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._faults: dict[int, _Faults] = {}
        self.happened = 0

    def something_happened(self, _event: object) -> None:
        """Somebody did what may explain a page fault."""
        self.happened += 1

    def exited(self, processor: Processor, event: Exited) -> Violation | None:
        """A guest exit. `processor.repeats` is 0 if the vCPU has executed something since the exit before."""
        if event.reason != "page_fault":
            # An interrupt may be served and change nothing.
            if event.reason != "external_interrupt":
                processor.repeats = 0
            return None
        faults = self._faults.get(event.vcpu)
        if faults is None:
            faults = self._faults[event.vcpu] = _Faults()
        key = event.gva >> 12, event.error_code
        if key != faults.key or not processor.repeats:
            faults.key = key
            faults.first = self._history.index, event
            processor.repeats = 0
        processor.repeats += 1
        if self.happened != faults.seen or processor.repeats == 1:
            faults.seen = self.happened
            faults.quiet = 0
        faults.quiet = 0 if self._history.host_is_at_work else faults.quiet + 1
        if faults.quiet <= REPEATS_LIMIT and processor.repeats <= FOREVER_LIMIT:
            return None
        between = "nothing that could explain it" if faults.quiet > REPEATS_LIMIT else "nothing of its own"
        index, first = faults.first
        return self._violation(
            event.vcpu,
            f"vCPU {event.vcpu} takes a page-fault exit at gva {event.gva:#x} (error code {event.error_code:#x}) for "
            f"the {processor.repeats}th time, and between the last {faults.quiet} of them {between}",
            "the page fault handler: it says that the access is to be tried again, and changes nothing",
            (RelatedEvent(index, first, "the first of these exits"),),
        )

    def no_progress(self, event: NoProgress) -> Violation:
        """Nothing can go on."""
        waiting = "; ".join(event.waiting) or "nobody"
        return self._violation(
            -1, f"nothing can go on any more; under way: {waiting}", "whoever holds what they wait for"
        )

    def _violation(
        self, vcpu: int, text: str, blame: str, related: tuple[RelatedEvent, ...] = ()
    ) -> Violation:
        return Violation(
            rule=Rule.NO_PROGRESS,
            text=text,
            vcpu=vcpu,
            access=None,
            journal_record=self._history.record,
            event_index=self._history.index,
            blame=blame,
            related=related,
        )

    def snapshot(self) -> object:
        """What future verdicts depend on, canonically."""
        return tuple(
            (vcpu, faults.key, faults.quiet, faults.seen == self.happened)
            for vcpu, faults in sorted(self._faults.items())
        )
