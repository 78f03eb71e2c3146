"""Rule 2: a page fault that the guest takes follows from its paging entries.

A right may be missing in what the processor had cached (R7, R5). An entry that is not present, or has reserved bits
set, is never cached: the walk of this very access must have read it. With an exit that walk is KVM's, between the exit
and the injection; without one (bypass_guest_pf) the hardware's, since the vCPU was last seen to do something.
After a fault nothing older counts for its address (R4): the next one must follow from what has been there since.
"""

from __future__ import annotations

from shadowmmu.checker.guest_paging import access_types
from shadowmmu.checker.history import History
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.table_history import TIME_SHIFT, TableHistory
from shadowmmu.checker.translations import describe_walks
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.checker.walks import Found, Walk, Walks
from shadowmmu.protocol.events import Bypassed, Injected

__all__ = ["GuestFaults"]

PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = (1 << n for n in range(5))


class GuestFaults:
    """Rule 2. `slots_changed` is when memory slots last did."""

    def __init__(self, history: History, tables: TableHistory, walks: Walks) -> None:
        self._history = history
        self._tables = tables
        self._walks = walks
        self.slots_changed = 0

    def injected(self, processor: Processor, event: Injected) -> Violation | None:
        """KVM queues a page fault for the guest."""
        return self._check(processor, event.cr2, event.error_code, processor.exited, "KVM injected")

    def bypassed(self, processor: Processor, event: Bypassed) -> Violation | None:
        """The processor delivers one without an exit."""
        return self._check(
            processor, event.gva, event.error_code, processor.walking, "the processor delivered"
        )

    def _check(self, processor: Processor, gva: int, error: int, since: int, who: str) -> Violation | None:
        span = processor.span
        if processor.registers is None or processor.registers.tdp:
            return None
        if span is not None:
            if self._justified(processor, self._walks.present(span, gva), error, since):
                return None
            leaf_from = 0 if error & PF_PRESENT and not error & PF_RESERVED else since
            if any(
                self._justified(processor, walk, error, since)
                for walk in self._walks.all(processor, gva, leaf_from)
            ):
                return None
        return self._violation(processor, gva, error, since, who)

    def _justified(self, processor: Processor, walk: Walk, error: int, since: int) -> bool:
        match walk.found:
            case Found.ANYTHING:
                return True
            case Found.NOT_PRESENT:
                return not error & PF_PRESENT
            case Found.NO_MEMORY:
                return not error & PF_PRESENT
            case Found.MALFORMED:
                return error & PF_RESERVED != 0
            case Found.PAGE:
                if not error & PF_PRESENT or error & PF_RESERVED:
                    return self.slots_changed >= since  # the tables' memory may have been away
                kind = bool(error & PF_WRITE) | bool(error & PF_FETCH) << 1 | bool(error & PF_USER) << 2
                assert processor.registers is not None
                return not access_types(walk.rights, True, processor.registers) >> kind & 1

    def _violation(self, processor: Processor, gva: int, error: int, since: int, who: str) -> Violation:
        history = self._history
        number = processor.number
        if processor.span is None:
            could = "nothing that can fault: its paging is off"
        else:
            could = describe_walks(list(self._walks.all(processor, gva)))
        related = history.flushes_of(number)
        if processor.span is not None:
            for gpa in self._walks.path(processor.span, gva):
                change = self._tables.last_change(gpa)
                if change is not None:
                    note = f"the entry at {gpa:#x} was last changed here"
                    related.append(RelatedEvent(change[0] >> TIME_SHIFT, change[1], note))
        return Violation(
            rule=Rule.UNJUSTIFIED_FAULT,
            text=f"{who} a page fault to vCPU {number} at gva {gva:#x}, error code {error:#x}; since event "
            f"{since >> TIME_SHIFT}, when the access began, a walk could have met: {could}",
            vcpu=number,
            access=None,
            journal_record=history.record,
            event_index=history.index,
            blame="the walk of the guest's tables that found the fault",
            related=tuple(sorted(related, key=lambda one: one.index)),
        )
