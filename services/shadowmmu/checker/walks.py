"""The walks that a vCPU's processor may have done: what TLB_RULES R5 calls the admissible set.

A walk chooses a value per level, each of which the entry held at some time. The times go down the levels, do not go
back, do not lie before the last invalidation of the address, and no paging-structure cache was emptied between the
first and the last (R2: a cache may hold an upper entry of an earlier time, but not across that). Whether one exists is
decided without trying times: if the values were all there at one time, it does; if not, the last level is read as
early as can be and the others as late as can be.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

import msgspec

from shadowmmu.checker.guest_memory import GuestMemory
from shadowmmu.checker.guest_paging import (
    ACCESSED,
    DIRTY,
    EXECUTE,
    GLOBAL,
    PDPT,
    PRESENT,
    USER,
    WRITE,
    own_rights,
)
from shadowmmu.checker.processor import Processor, Span
from shadowmmu.checker.table_history import FOREVER, FORGOTTEN, TableHistory, Version

__all__ = ["Found", "Step", "Walk", "Walks"]

MOST_WALKS: Final = 4096
"""Walks looked at for one access; whoever finds none among so many takes it that there is one."""


class Found(enum.Enum):
    """How a walk ended."""

    PAGE = "a page"
    NOT_PRESENT = "an entry that is not present"
    MALFORMED = "an entry with reserved bits set"
    NO_MEMORY = "a table in no memory"
    ANYTHING = "an entry whose value is not known any more"


class Step(msgspec.Struct, frozen=True):
    """One level of a walk: the entry's address, its value, and from when until when it had that."""

    level: int
    gpa: int
    value: int
    since: int
    until: int


class Walk(msgspec.Struct, frozen=True):
    """One walk. With a page: `gfn`, `rights`, whether `accessed` is set at all levels, and the leaf `dirty`."""

    found: Found
    steps: tuple[Step, ...]
    gfn: int = -1
    rights: int = 0
    accessed: bool = True
    dirty: bool = False
    is_global: bool = False


class Walks:
    """Finds walks in what the stream has told of guest memory."""

    def __init__(self, memory: GuestMemory, tables: TableHistory) -> None:
        self._memory = memory
        self._tables = tables

    def present(self, span: Span, gva: int) -> Walk:
        """The walk in memory as it is now (of PDPTEs: as they were loaded last). Steps are left out."""
        paging = span.paging
        table = paging.root
        rights = WRITE | USER | EXECUTE
        accessed = True
        size = paging.format.entry_size
        word = self._memory.word
        mask = (1 << 8 * size) - 1
        for level, shift, bits in paging.format.levels:
            index = gva >> shift & ((1 << bits) - 1)
            if level == PDPT:
                entry: int | None = span.pdptes[-1][index]
            else:
                gpa = table + index * size
                entry = word(gpa & ~7)
                if entry is not None and size == 4:
                    entry = entry >> 8 * (gpa & 4) & mask
            if entry is None:
                return Walk(Found.NO_MEMORY if self._memory.slots else Found.ANYTHING, ())
            if not entry & PRESENT:
                return Walk(Found.NOT_PRESENT, ())
            if level != PDPT:
                if paging.is_malformed(level, entry):
                    return Walk(Found.MALFORMED, ())
                rights &= own_rights(entry)
                if not entry & ACCESSED:
                    accessed = False
                if paging.is_leaf(level, entry):
                    gfn = paging.frame(level, shift, entry, gva)
                    dirty = entry & DIRTY != 0
                    return Walk(Found.PAGE, (), gfn, rights, accessed, dirty, entry & GLOBAL != 0)
            table = paging.child(entry) << 12
        raise AssertionError("a format's last level has leaves only")

    def path(self, span: Span, gva: int) -> list[int]:
        """The addresses of the entries that a walk in memory as it is now reads, from the root down."""
        paging = span.paging
        size = paging.format.entry_size
        table = paging.root
        found: list[int] = []
        for level, shift, bits in paging.format.levels:
            gpa = table + (gva >> shift & ((1 << bits) - 1)) * size
            found.append(gpa)
            word = self._memory.word(gpa & ~7)
            entry = 0 if word is None else word >> 8 * (gpa & 4) if size == 4 else word
            if not entry & PRESENT or (level != PDPT and paging.is_leaf(level, entry)):
                break
            table = paging.child(entry) << 12
        return found

    def all(self, processor: Processor, gva: int, leaf_from: int = 0) -> Iterator[Walk]:
        """Every walk that may have been done, the newest values first; the last entry read not before `leaf_from`.

        From earlier roots only those that end in a global page, or nowhere.
        """
        count = 0
        invalidated = processor.invalidated(gva)
        present_spans = len(processor.present_spans())
        for number, span in enumerate(processor.spans()):
            present = number < present_spans
            low = max(invalidated, span.begin)
            if low >= span.end:
                continue
            for walk in self._of(processor, span, gva, low, max(low, leaf_from), not present):
                count += 1
                if count > MOST_WALKS:
                    yield Walk(Found.ANYTHING, ())
                    return
                if present or walk.is_global or walk.found is Found.ANYTHING:
                    yield walk
        if invalidated < processor.forgotten:
            yield Walk(Found.ANYTHING, ())

    def _entries(self, span: Span, level: int, gpa: int, low: int, only_global: bool) -> list[Version]:
        size = span.paging.format.entry_size
        found = self._tables.versions(gpa, size, low, span.end, only_global=only_global)
        if level == PDPT:
            # Intel's processors use the registers, AMD's may read memory again (R10 is Intel's rule alone).
            index = gpa >> 3 & 3
            found += [(pdptes[index], span.begin, FOREVER) for pdptes in span.pdptes]
        return found

    def _of(  # noqa: PLR0917 - of one caller
        self, processor: Processor, span: Span, gva: int, low: int, leaf_from: int, only_global: bool
    ) -> Iterator[Walk]:
        paging = span.paging
        levels = paging.format.levels
        size = paging.format.entry_size
        clears = [] if span.merged else processor.clears
        # (depth, table, rights, accessed, steps, earliest time at which the last of them can have been read)
        stack: list[tuple[int, int, int, bool, tuple[Step, ...], int]] = [
            (0, paging.root, WRITE | USER | EXECUTE, True, (), low)
        ]
        while stack:
            depth, table, rights, accessed, steps, earliest = stack.pop()
            level, shift, bits = levels[depth]
            gpa = table + (gva >> shift & ((1 << bits) - 1)) * size
            if self._memory.slots and not self._memory.is_memory(gpa >> 12):
                yield Walk(Found.NO_MEMORY, steps)
                if gpa >> 12 not in self._tables.tables:
                    continue
            below = []
            for value, since, until in self._entries(span, level, gpa, low, only_global):
                time = max(earliest, since)
                if time >= min(until, span.end):
                    continue
                if value == FORGOTTEN:
                    yield Walk(Found.ANYTHING, steps)
                    continue
                path = (*steps, Step(level, gpa, value, since, until))
                if not value & PRESENT:
                    if _possible(path, low, leaf_from, span.end, clears):
                        yield Walk(Found.NOT_PRESENT, path)
                    continue
                if level == PDPT:
                    below.append((depth + 1, paging.child(value) << 12, rights, accessed, path, time))
                    continue
                if paging.is_suspect(level, value) and _possible(path, low, leaf_from, span.end, clears):
                    yield Walk(Found.MALFORMED, path)
                if paging.is_malformed(level, value):
                    continue
                allowed = rights & own_rights(value)
                used = accessed and value & ACCESSED != 0
                if paging.is_leaf(level, value):
                    if _possible(path, low, leaf_from, span.end, clears):
                        gfn = paging.frame(level, shift, value, gva)
                        dirty = value & DIRTY != 0
                        yield Walk(Found.PAGE, path, gfn, allowed, used, dirty, value & GLOBAL != 0)
                else:
                    below.append((depth + 1, paging.child(value) << 12, allowed, used, path, time))
            stack += reversed(below)


def _possible(steps: tuple[Step, ...], low: int, leaf_from: int, end: int, clears: list[int]) -> bool:
    """Whether times can be chosen for these values; the last not before `leaf_from`, all before `end`."""
    last = max(leaf_from, *(step.since for step in steps))
    if last >= min(steps[-1].until, end):
        return False
    first = last
    for step in reversed(steps[:-1]):
        first = min(first, step.until - 1)
        if first < max(step.since, low):
            return False
    return bisect_right(clears, first) == bisect_right(clears, last)
