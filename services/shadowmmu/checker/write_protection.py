"""Rule 4: write-protection breach.

A guest page table whose shadow is *in sync* must be write-protected: a vCPU that stores to it has to exit, or the
shadow goes stale and nobody ever notices. The kernel makes a table's shadow in sync (by creating it, or by
synchronising it again) under mmu_lock; from the moment that lock region is released, whether or not a flush was
issued, no vCPU may store to the table without an exit. Every TLB counts (TLB_RULES R12).

What is protected is the guest frame, by any of its shadow pages: a frame can have several (one per role), and its
protection lasts from the first release of mmu_lock that found one of them in sync until the last of them has gone
out of sync or was zapped. That end takes effect at once, in the middle of a lock region: from then on the kernel
gives out writable mappings.

    event inside a lock region                     pages in sync    protected
    ShadowPageCreated(1, gfn=5)                    {1}              no: the flush may still be to come
    LockReleased                                   {1}              yes
    ShadowPageCreated(2, gfn=5)                    {1, 2}           yes
    ShadowPageZapped(1)                            {2}              yes: protected all the time
    ShadowPageUnsynced(2)                          {}               no, at once
    ShadowPageSynced(2)                            {2}              no: as for a new one
    LockReleased                                   {2}              yes

Direct shadow pages shadow no table and count for nothing. Memory is bounded by the number of shadow pages.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from shadowmmu.checker.history import History
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    LockReleased,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
)

__all__ = ["WriteProtection"]


class _Protection(msgspec.Struct):
    """Why a guest frame is, or will be at the next release, write-protected."""

    in_sync: set[int]  # serial numbers of its shadow pages
    index: int  # of the event that made the first of them in sync
    event: ShadowPageCreated | ShadowPageSynced
    release_index: int = -1
    release: LockReleased | None = None
    who: str = ""


class WriteProtection:
    """The state of rule 4. `protected`: the guest frames that no vCPU may store to now."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._tables: dict[int, int] = {}  # valid indirect shadow pages: serial number to gfn
        self._protections: dict[int, _Protection] = {}  # by gfn, while a shadow page of it is in sync
        self._fresh: set[int] = set()  # gfns that become protected at the next release
        self.protected: set[int] = set()

    def created(self, event: ShadowPageCreated) -> None:
        if not event.direct:
            self._tables[event.sp] = event.gfn
            self._in_sync(event.sp, event.gfn, event)

    def synced(self, event: ShadowPageSynced) -> None:
        gfn = self._tables.get(event.sp)
        if gfn is not None:  # else: a page that is zapped while unsync leaves that state too
            self._in_sync(event.sp, gfn, event)

    def unsynced(self, event: ShadowPageUnsynced) -> None:
        gfn = self._tables.get(event.sp)
        if gfn is not None:
            self._not_in_sync(event.sp, gfn)

    def zapped(self, event: ShadowPageZapped) -> None:
        gfn = self._tables.pop(event.sp, None)
        if gfn is not None:  # else: direct, or a root in use that was zapped before
            self._not_in_sync(event.sp, gfn)

    def _in_sync(self, sp: int, gfn: int, event: ShadowPageCreated | ShadowPageSynced) -> None:
        protection = self._protections.get(gfn)
        if protection is None:
            self._protections[gfn] = _Protection({sp}, self._history.index, event)
            self._fresh.add(gfn)
        else:
            protection.in_sync.add(sp)

    def _not_in_sync(self, sp: int, gfn: int) -> None:
        protection = self._protections.get(gfn)
        if protection is None:
            return
        protection.in_sync.discard(sp)
        if not protection.in_sync:
            del self._protections[gfn]
            self._fresh.discard(gfn)
            self.protected.discard(gfn)

    def lock_released(self, event: LockReleased) -> None:
        if not self._fresh:
            return
        who = self._history.describe_operation(event.op)
        for gfn in self._fresh:
            protection = self._protections[gfn]
            protection.release_index = self._history.index
            protection.release = event
            protection.who = who
        self.protected |= self._fresh
        self._fresh.clear()

    def violation(self, event: Accesses, number: int) -> Violation:
        """Item `number` stores to a frame in `protected`."""
        gfn = event.items[number][2]
        protection = self._protections[gfn]
        assert protection.release is not None
        pages = ", ".join(map(str, sorted(protection.in_sync)))
        made = "created" if isinstance(protection.event, ShadowPageCreated) else "synchronised"
        return self._history.access_violation(
            Rule.WRITE_PROTECTION_BREACH,
            event,
            number,
            why=f"wrote to a guest page table without an exit, although its shadow (page {pages}) is in sync: "
            f"{made} at event {protection.index}, mmu_lock released at event {protection.release_index}",
            blame=f"{protection.who} had to see to it, before it released mmu_lock, that vCPU {event.vcpu} had no "
            f"writable translation of guest frame {gfn:#x} left",
            related=[
                RelatedEvent(protection.index, protection.event, f"the table's shadow was {made}"),
                RelatedEvent(
                    protection.release_index, protection.release, "mmu_lock released: protected from here on"
                ),
            ],
        )

    def snapshot(self, rank: Callable[[int], int]) -> object:
        """What future verdicts depend on, canonically; `rank` replaces serial numbers of shadow pages."""
        return (
            tuple(sorted((gfn, rank(sp)) for sp, gfn in self._tables.items())),
            tuple((gfn, tuple(sorted(map(rank, p.in_sync)))) for gfn, p in sorted(self._protections.items())),
            tuple(sorted(self._fresh)),
            tuple(sorted(self.protected)),
        )
