"""A vCPU as the guest sees it: its paging registers, and what it has invalidated when (TLB_RULES R4, R10, R13).

What KVM flushes in addition counts for nothing here (R3): a translation that the guest may still have stays admissible.
Nor does a worker that attaches anew: the guest knows nothing of it.

An invalidation counts from when the exit that KVM handles it by took effect (INVLPG, page faults), or the register
changed: KVM looks at the guest's tables after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from shadowmmu.checker.guest_paging import (
    CR0_PG,
    CR4_PAE,
    CR4_PGE,
    CR4_SMEP,
    EFER_NXE,
    Paging,
    paging_of,
)
from shadowmmu.checker.table_history import FOREVER
from shadowmmu.protocol.events import Event, PagingRegisters

__all__ = ["Processor", "Span"]

ACCESS_TYPES: Final = 8
PAGES_LIMIT: Final = 4096
"""Pages of which the last invalidation is remembered; of those forgotten it is that of all pages."""
CLEARS_LIMIT: Final = 1024
"""Moments remembered at which the paging-structure caches were emptied."""
ROOTS_LIMIT: Final = 64
"""Earlier roots remembered, for global translations that come from them."""


class Span(msgspec.Struct):
    """Paging with one root, from `begin` to `end`. `merged`: of several times, with others between.

    `pdptes`: each set of four that was loaded in that time.
    """

    paging: Paging
    pdptes: tuple[tuple[int, ...], ...]
    begin: int
    end: int = FOREVER
    merged: bool = False


class Processor:
    """One vCPU. Times are those of `table_history`.

    `valid`: per access type (AccessFlag bits 0 to 2), by page, a guest frame that is known to be admissible since the
    page was last invalidated. `repeats`: page-fault exits since it last got further. `exited`: when the last exit took
    effect. `span` is None while paging is off.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.registers: PagingRegisters | None = None
        self.valid: tuple[dict[int, int], ...] = tuple({} for _ in range(ACCESS_TYPES))
        self.repeats = 0
        self.exited = 0
        self.seen = 0  # when it last did something in the guest
        self.walking = 0  # the same before the last walk
        self.fault: int | None = None  # the address of a page fault that the next entry delivers
        self.last: tuple[int, Event] | None = (
            None  # the last event that invalidated something, and its number
        )
        self.span: Span | None = None
        self.earlier: dict[tuple[int, bool], Span] = {}  # by root, and how large pages are marked
        self.variants: list[Span] = []  # the present root, read as registers said before
        self.clears: list[int] = []
        self.everything = 0  # when everything was last invalidated
        self.non_global = 0  # everything but global translations
        self.forgotten = 0  # roots from before then were dropped because of the limit
        self._pages: dict[int, int] = {}
        self._no_execute = False  # EFER.NXE was set at some time since `non_global`

    def invalidated(self, gva: int) -> int:
        """When the global translations of an address were last invalidated; others: not before `non_global`."""
        return max(self.everything, self._pages.get(gva >> 12, 0))

    def admit(self, page: int, gfn: int, types: int) -> None:
        """These access types (bits) of a page may use the guest frame."""
        for kind, pages in enumerate(self.valid):
            if types >> kind & 1:
                pages[page] = gfn

    def invalidate_page(self, gva: int, time: int, *, caches: bool) -> None:
        """INVLPG, which empties the paging-structure `caches`; or a page fault, for which those of the page go."""
        page = gva >> 12
        for pages in self.valid:
            pages.pop(page, None)
        self._pages.pop(page, None)  # so that it is the newest
        self._pages[page] = time
        if len(self._pages) > PAGES_LIMIT:
            del self._pages[next(iter(self._pages))]
        if caches:
            self._clear(time)

    def _clear(self, time: int) -> None:
        self.clears.append(time)
        if len(self.clears) > CLEARS_LIMIT:
            del self.clears[: CLEARS_LIMIT // 2]

    def load(self, registers: PagingRegisters, time: int) -> None:
        """The registers are these now."""
        old = self.registers
        self.registers = registers
        for pages in self.valid:
            pages.clear()
        tables = registers.register in ("cr3", "") or old is None
        everything = old is None or not registers.register
        if old is not None:
            changed = old.cr4 ^ registers.cr4
            everything = (
                everything
                or changed & (CR4_PGE | CR4_PAE) != 0
                or changed & registers.cr4 & CR4_SMEP != 0
                or (old.cr0 ^ registers.cr0) & CR0_PG != 0
            )
        if everything:
            self.everything = self.non_global = time
            self._pages.clear()
            self.clears.clear()
            self.earlier.clear()
            self.variants.clear()
            self._no_execute = False
        elif tables:
            self.non_global = time
            self._clear(time)
            for span in reversed(self.present_spans()):
                self._keep(span, min(span.end, time))
            self.variants.clear()
            self._no_execute = False
        self._no_execute |= registers.efer & EFER_NXE != 0
        paging = paging_of(registers, no_execute=self._no_execute)
        if paging is None:
            self.span = None
        elif self.span is None or everything or tables:
            self.span = Span(paging, (tuple(registers.pdptes),), time)
        else:  # entries are read in another way, without an invalidation: what was read before may stay
            if self.span.paging != paging:
                self.variants = [
                    span for span in self.variants if span.paging not in (self.span.paging, paging)
                ]
                self.variants.append(Span(self.span.paging, self.span.pdptes, self.span.begin, time))
            self.span = Span(paging, self.span.pdptes, self.span.begin)

    def _keep(self, span: Span, time: int) -> None:
        """The span is over; global translations from it stay. Those with the same root become one."""
        if self.registers is None or not self.registers.cr4 & CR4_PGE:
            return
        key = span.paging.root, span.paging.pse
        before = self.earlier.pop(key, None)
        if before is None:
            self.earlier[key] = Span(span.paging, span.pdptes, span.begin, time)
        else:
            pdptes = tuple(dict.fromkeys(before.pdptes + span.pdptes))
            self.earlier[key] = Span(span.paging, pdptes, before.begin, time, True)
        if len(self.earlier) > ROOTS_LIMIT:
            oldest = next(iter(self.earlier))
            self.forgotten = max(self.forgotten, self.earlier.pop(oldest).end)

    def spans(self) -> list[Span]:
        """The present span, and those before it with other roots, newest first."""
        return [*self.present_spans(), *reversed(self.earlier.values())]

    def present_spans(self) -> list[Span]:
        """Those with the present root."""
        return [] if self.span is None else [self.span, *reversed(self.variants)]

    def snapshot(self, rank: Callable[[int], int]) -> object:
        """What future verdicts depend on, canonically; `rank` replaces times."""
        pages = tuple(
            (page, rank(time)) for page, time in sorted(self._pages.items()) if time > self.everything
        )
        return (
            self.number,
            None if self.registers is None else msgspec.structs.astuple(self.registers),
            self.repeats > 0,  # how many: only for FOREVER_LIMIT (rule 8), which a search does not wait for
            rank(self.exited),
            rank(self.walking),
            self.fault,
            rank(self.everything),
            rank(self.non_global),
            rank(self.forgotten),
            self._no_execute,
            pages,
            tuple(rank(time) for time in self.clears),
            tuple(
                (
                    span.paging.root,
                    span.paging.format.name,
                    span.pdptes,
                    rank(span.begin),
                    rank(span.end),
                    span.merged,
                )
                for span in self.spans()
            ),
        )
