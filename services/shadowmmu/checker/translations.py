"""Rules 1 and 6: an access uses a translation that the guest's paging entries gave since its processor invalidated it.

The fast way is in `accesses`: what was found admissible once stays so until the processor invalidates the address
(R5: the set only grows). What it does not find there comes here: the walk in memory as it is now, and if that says
otherwise, the walks of all earlier times that count.
"""

from __future__ import annotations

from collections.abc import Callable

from shadowmmu.checker.guest_paging import EXECUTE, USER, WRITE, access_types, describe_type
from shadowmmu.checker.history import History
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.table_history import FOREVER, TIME_SHIFT, TableHistory
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.checker.walks import Found, Walk, Walks
from shadowmmu.protocol.events import Accesses

__all__ = ["Translations", "describe_walks"]

ALL_TYPES = 0xFF
SHOWN = 6
"""Walks that a violation describes."""


class Translations:
    """Rules 1 and 6. `is_protected`: whether a guest frame is a table whose shadow is in sync."""

    def __init__(
        self, history: History, tables: TableHistory, walks: Walks, is_protected: Callable[[int], bool]
    ) -> None:
        self._history = history
        self._tables = tables
        self._walks = walks
        self._is_protected = is_protected

    def admits(self, processor: Processor, gva: int, kind: int, gfn: int) -> Rule | None:
        """Whether an access of that kind (AccessFlag bits 0 to 2) to a guest frame is admissible; the rule if not.

        What is found admissible is noted in `processor.valid`.
        """
        page = gva >> 12
        registers = processor.registers
        span = processor.span
        if registers is None:
            processor.admit(page, gfn, ALL_TYPES)  # nothing is known of this vCPU
            return None
        if span is None:
            if gfn == page:
                processor.admit(page, gfn, ALL_TYPES)
                return None
            return Rule.STALE_TRANSLATION
        walk = self._walks.present(span, gva)
        if walk.found is Found.PAGE and walk.gfn == gfn and walk.accessed:
            types = access_types(walk.rights, walk.dirty, registers)
            if types >> kind & 1:
                processor.admit(page, gfn, types)
                return None
        broken = Rule.STALE_TRANSLATION
        for walk in self._walks.all(processor, gva):
            if walk.found is Found.ANYTHING:
                return None
            if walk.found is not Found.PAGE or walk.gfn != gfn:
                continue
            if walk.accessed:
                types = access_types(walk.rights, walk.dirty, registers)
                if types >> kind & 1:
                    processor.admit(page, gfn, types)
                    return None
            if access_types(walk.rights, True, registers) >> kind & 1:
                broken = Rule.LOST_ACCESSED_DIRTY
        return broken

    def violation(self, rule: Rule, processor: Processor, event: Accesses, number: int) -> Violation:
        """What `admits` refused: item `number` of the event."""
        flags, gva, gfn, *_ = event.items[number]
        kind = describe_type(flags & 7)
        if processor.span is None:
            return self._history.access_violation(
                rule,
                event,
                number,
                why=f"used guest frame {gfn:#x}, although its paging is off: the address is the frame's",
                blame="whoever built its direct map",
                related=self._last(processor),
            )
        walks = list(self._walks.all(processor, gva))
        since = max(processor.invalidated(gva), processor.non_global)
        related = self._last(processor)
        tables = []
        for step in self._walks.path(processor.span, gva):
            change = self._tables.last_change(step)
            if change is not None:
                related.append(
                    RelatedEvent(
                        change[0] >> TIME_SHIFT, change[1], f"the entry at {step:#x} was last changed here"
                    )
                )
            tables.append(step >> 12)
        if rule is Rule.LOST_ACCESSED_DIRTY:
            why = (
                f"used it as a {kind}, but no entry that it can have had says accessed, or for a write dirty"
            )
            blame = (
                "whoever mapped it had to set the bit in the guest's entry before, or to leave the entry out"
            )
        else:
            why = f"used it as a {kind}, which no values allow that the guest's entries had"
            leaf = tables[-1] if tables else -1
            if self._is_protected(leaf):
                blame = (
                    f"the shadow of the table at guest frame {leaf:#x} is in sync: whoever changed the table, or "
                    "synchronised it, had to drop the entry and flush"
                )
            else:
                blame = (
                    f"the table at guest frame {leaf:#x} is out of sync: what the vCPU invalidated it by had to "
                    "synchronise it"
                )
        why += (
            f" since the vCPU last invalidated the page (event {since >> TIME_SHIFT}); it could have used: "
            f"{describe_walks(walks)}"
        )
        return self._history.access_violation(rule, event, number, why=why, blame=blame, related=related)

    def _last(self, processor: Processor) -> list[RelatedEvent]:
        if processor.last is None:
            return []
        index, event = processor.last
        return [RelatedEvent(index, event, f"vCPU {processor.number} last invalidated something here")]


def describe_walks(walks: list[Walk]) -> str:
    """Walks in words: what they find, and from when until when the last entry was as they read it."""
    texts = dict.fromkeys(map(_describe, walks))
    shown = list(texts)[:SHOWN]
    if len(texts) > SHOWN:
        shown.append(f"{len(texts) - SHOWN} more")
    return "; ".join(shown) or "nothing"


def _describe(walk: Walk) -> str:
    text = walk.found.value
    if walk.found is Found.PAGE:
        rights = "".join(
            letter if walk.rights & bit else "-"
            for letter, bit in (("w", WRITE), ("u", USER), ("x", EXECUTE))
        )
        text = f"guest frame {walk.gfn:#x} {rights}"
        text += "" if walk.accessed else ", not accessed"
        text += " dirty" if walk.dirty else ""
    if walk.steps:
        last = walk.steps[-1]
        until = "now" if last.until == FOREVER else f"event {last.until >> TIME_SHIFT}"
        text += (
            f" (entry {last.value:#x} at {last.gpa:#x}, from event {last.since >> TIME_SHIFT} until {until})"
        )
    return text
