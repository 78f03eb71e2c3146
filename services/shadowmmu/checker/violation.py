"""What the checker finds: a rule, the event that broke it, and the earlier events that matter.

The rules keep the numbers that `docs/COHERENCE.md` gives them.
"""

from __future__ import annotations

import enum

import msgspec

from shadowmmu.protocol.events import AccessFlag, Event

__all__ = ["Access", "RelatedEvent", "Rule", "Violation"]


class Rule(enum.IntEnum):
    """A coherence rule, by its number in docs/COHERENCE.md."""

    STALE_TRANSLATION = 1
    UNJUSTIFIED_FAULT = 2
    HOST_FRAME_USE_AFTER_REVOKE = 3
    WRITE_PROTECTION_BREACH = 4
    LOST_DIRTY_PAGE = 5
    LOST_ACCESSED_DIRTY = 6
    BROKEN_STRUCTURE = 7
    NO_PROGRESS = 8
    LOST_STORE = 9

    @property
    def title(self) -> str:
        """The rule's name, as people say it."""
        return _TITLES[self]


_TITLES = {
    Rule.STALE_TRANSLATION: "stale translation",
    Rule.UNJUSTIFIED_FAULT: "unjustified fault",
    Rule.HOST_FRAME_USE_AFTER_REVOKE: "host frame use after revoke",
    Rule.WRITE_PROTECTION_BREACH: "write-protection breach",
    Rule.LOST_DIRTY_PAGE: "lost dirty page",
    Rule.LOST_ACCESSED_DIRTY: "lost accessed or dirty bit",
    Rule.BROKEN_STRUCTURE: "broken structure",
    Rule.NO_PROGRESS: "no progress",
    Rule.LOST_STORE: "lost store",
}


class Access(msgspec.Struct, frozen=True):
    """One item of an `Accesses` event. Addresses in bytes, `gfn` and `pfn` in frames, `size` in bytes."""

    vcpu: int
    entry: int
    flags: int
    gva: int
    gfn: int
    pfn: int
    size: int
    value: int

    def __str__(self) -> str:
        if self.flags & AccessFlag.LOCKED:
            kind = "locked operation"
        elif self.flags & AccessFlag.WRITE:
            kind = "store"
        else:
            kind = "fetch" if self.flags & AccessFlag.FETCH else "load"
        frame = f"guest frame {self.gfn:#x}" if self.gfn >= 0 else "no guest frame"
        return (
            f"{kind} of {self.size} bytes by vCPU {self.vcpu} at gva {self.gva:#x} in its guest entry {self.entry}"
            f" ({frame}, host frame {self.pfn:#x})"
        )


class RelatedEvent(msgspec.Struct, frozen=True):
    """An earlier event without which the violation cannot be understood. `index` counts the stream from 0."""

    index: int
    event: Event
    note: str


class Violation(msgspec.Struct, frozen=True):
    """A rule is broken by event number `event_index` of the stream (from 0).

    `journal_record` is the input that the event follows from (-1: none yet). `vcpu` is -1 and `access` None where no
    vCPU's access is at fault. `blame` says who should have flushed, or what else was missing; `related` has the
    events that matter, oldest first.
    """

    rule: Rule
    text: str
    vcpu: int
    access: Access | None
    journal_record: int
    event_index: int
    blame: str
    related: tuple[RelatedEvent, ...] = ()

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.title

    def __str__(self) -> str:
        return (
            f"rule {self.rule.value} ({self.name}) at journal record {self.journal_record}, "
            f"event {self.event_index}: {self.text}"
        )
