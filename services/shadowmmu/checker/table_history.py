"""What the guest's paging entries were: the values that a processor may still have, per word of each table.

A frame is followed as a table from the moment at which an entry of a followed table, or a root register, first named
it; no walk can have come through it before. Of each word that changed since, the earlier values are kept with the time
until which they held, as long as some vCPU may have them: not longer than the oldest invalidation that all vCPUs have
behind them (values that can make a global translation: the oldest one that removes those too), and not more than
VALUES_LIMIT of them. A value that was dropped because of the limit counts as one that allows anything.

Times are positions in the stream: (number of the event) << TIME_SHIFT | (number of the store in it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from shadowmmu.checker.guest_memory import UNKNOWN, WORDS, GuestMemory
from shadowmmu.checker.guest_paging import (
    DIRECTORY_32,
    GLOBAL,
    LARGE,
    PDPT,
    PRESENT,
    TABLE_32,
    is_table_level,
)
from shadowmmu.protocol.events import Event

__all__ = ["FOREVER", "FORGOTTEN", "TIME_SHIFT", "TableHistory", "Version"]

VALUES_LIMIT: Final = 32
"""Earlier values kept of one word."""
WORTH_TRIMMING: Final = 4
TIME_SHIFT: Final = 16
FOREVER: Final = 1 << 62
FORGOTTEN: Final = UNKNOWN
"""In place of an entry: its value is not known, and might be any."""
FIRST_COLLECTION: Final = 256
"""Tables followed when those that nobody can reach any more are first looked for."""

Version: TypeAlias = tuple[int, int, int]
"""(value, from when, until when): the value could be read at times t with from <= t < until."""


class _Word:
    """A word's earlier values, oldest first."""

    __slots__ = ("event", "forgotten", "forgotten_global", "past", "since")

    def __init__(self) -> None:
        self.past: list[Version] = []
        self.since = 0  # when the present value was stored
        self.event: Event | None = None  # that stored the present value
        self.forgotten = 0  # values until then were dropped because of the limit
        self.forgotten_global = 0  # likewise, of those that might make a global translation


class _Table:
    """A frame that is followed: at which levels, and what is known of it."""

    __slots__ = ("levels", "may_global", "parents")

    def __init__(self) -> None:
        self.levels: set[int] = set()
        self.may_global = False  # a global translation may come through it
        self.parents: set[int] = set()


class TableHistory:
    """The tables that are followed, by guest frame (`tables`), and what their words were.

    `horizon`: what held no longer than until then matters to nobody; `horizon_global`: that could not even make a
    global translation.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.tables: dict[int, _Table] = {}
        self._words: dict[int, dict[int, _Word]] = {}  # by frame, by index
        self.horizon = 0
        self.horizon_global = 0
        self._limit = FIRST_COLLECTION
        self.roots: Callable[[], Iterable[tuple[int, int]]] = tuple
        """Says which (frame, level) are roots of some vCPU, when tables are collected."""

    # --- following ----------------------------------------------------------------------------------------------

    def follow(self, gfn: int, level: int, parent: int | None = None) -> None:
        """A register or an entry of table `parent` names the frame as a table of `level`."""
        stack = [(gfn, level, parent)]
        while stack:
            gfn, level, parent = stack.pop()
            table = self.tables.get(gfn)
            if table is None:
                if not self._memory.is_memory(gfn):
                    continue
                if len(self.tables) >= self._limit:
                    self._collect((gfn, level))
                    if parent is not None and parent not in self.tables:
                        continue
                table = self.tables[gfn] = _Table()
            if parent is not None:
                table.parents.add(parent)
                if table.may_global:
                    self._make_global(parent)
            if level in table.levels:
                continue
            table.levels.add(level)
            words = list(filter(None, self._memory.frame(gfn)))
            if is_table_level(level):
                stack += [(child, below, gfn) for word in words for child, below in _children(level, word)]
            if not table.may_global and any(_is_global(level, word) for word in words):
                self._make_global(gfn)

    def _make_global(self, gfn: int) -> None:
        stack = [gfn]
        while stack:
            table = self.tables.get(stack.pop())
            if table is not None and not table.may_global:
                table.may_global = True
                stack += table.parents

    def stored(self, gpa: int, old: int, new: int, time: int, event: Event) -> None:
        """`event` has changed the word at `gpa`, which is in a frame that is followed."""
        gfn = gpa >> 12
        table = self.tables[gfn]
        index = gpa >> 3 & 511
        words = self._words.setdefault(gfn, {})
        word = words.get(index)
        if word is None:
            word = words[index] = _Word()
        if time > word.since:  # else: two pieces of one store
            word.past.append((old, word.since, time))
            word.since = time
            word.event = event
            if len(word.past) > WORTH_TRIMMING:
                self._trim(word, table)
        if not new:
            return
        for level in tuple(table.levels):
            if not table.may_global and _is_global(level, new):
                self._make_global(gfn)
            if is_table_level(level):
                for child, below in _children(level, new):
                    self.follow(child, below, gfn)

    def _trim(self, word: _Word, table: _Table) -> None:
        """Drop what nobody can have, and beyond the limit the oldest."""
        word.past = [version for version in word.past if self._matters(version, table)]
        beyond = len(word.past) - VALUES_LIMIT
        if beyond > 0:
            word.forgotten = word.past[beyond - 1][2]
            if table.may_global:
                word.forgotten_global = word.forgotten
            del word.past[:beyond]

    def _matters(self, version: Version, table: _Table) -> bool:
        value, _, until = version
        if until > self.horizon or value < 0:
            return True
        if until <= self.horizon_global or not table.may_global:
            return False
        return any(is_table_level(level) or _is_global(level, value) for level in table.levels)

    def replaced(self, gfns: Iterable[int], time: int) -> None:
        """Frames' contents went, came or moved as a whole: nothing is known of what their words were before."""
        for gfn in gfns:
            table = self.tables.pop(gfn, None)
            self._words.pop(gfn, None)
            if table is None or not self._memory.is_memory(gfn):
                continue
            words = self._words.setdefault(gfn, {})
            for index in range(WORDS):
                word = words[index] = _Word()
                word.since = word.forgotten = word.forgotten_global = time
            for level in table.levels:
                self.follow(gfn, level)

    def _collect(self, wanted: tuple[int, int]) -> None:
        """Stop following tables to which no entry leads that some vCPU may have."""
        reached: dict[int, set[int]] = {}
        stack = [wanted, *self.roots()]
        while stack:
            gfn, level = stack.pop()
            table = self.tables.get(gfn)
            levels = reached.setdefault(gfn, set())
            if table is None or level in levels:
                continue
            levels.add(level)
            if not is_table_level(level):
                continue
            for value in self._memory.frame(gfn):
                if value:
                    stack += _children(level, value)
            for word in self._words.get(gfn, {}).values():
                self._trim(word, table)
                for value, _, _ in word.past:
                    stack += _children(level, value)
        for gfn in [gfn for gfn in self.tables if gfn not in reached]:
            del self.tables[gfn]
            self._words.pop(gfn, None)
        for gfn, table in self.tables.items():
            table.levels &= reached[gfn]
            table.parents &= self.tables.keys()
            words = self._words.get(gfn, {})
            oldest = self.horizon_global
            for index in [i for i, w in words.items() if not w.past and max(w.since, w.forgotten) <= oldest]:
                del words[index]
        self._limit = max(FIRST_COLLECTION, 2 * len(self.tables))

    # --- looking ------------------------------------------------------------------------------------------------

    def versions(self, gpa: int, size: int, low: int, high: int, *, only_global: bool) -> list[Version]:
        """What an entry (`size` bytes at `gpa`) held at times from `low` to before `high`, newest first.

        FORGOTTEN stands for values that are not known; with `only_global` not if they cannot have been global.
        """
        gfn = gpa >> 12
        now = self._memory.word(gpa & ~7)
        shift = (gpa & 4) * 8 if size == 4 else 0
        mask = (1 << 8 * size) - 1
        word = self._words.get(gfn, {}).get(gpa >> 3 & 511)
        if word is None:
            return [(FORGOTTEN if now is None else now >> shift & mask, 0, FOREVER)]
        found: list[Version] = []
        if word.since < high:
            found.append((FORGOTTEN if now is None else now >> shift & mask, word.since, FOREVER))
        for value, since, until in reversed(word.past):
            if until <= low:
                break
            if since >= high:
                continue
            entry = FORGOTTEN if value < 0 else value >> shift & mask
            if found and found[-1][0] == entry and found[-1][1] == until:
                found[-1] = entry, since, found[-1][2]  # the other half of the word had changed
            else:
                found.append((entry, since, until))
        forgotten = word.forgotten_global if only_global else word.forgotten
        if forgotten > low:
            found.append((FORGOTTEN, 0, forgotten))
        return found

    def last_change(self, gpa: int) -> tuple[int, Event] | None:
        """When the word was last changed while it was followed, and by what; None if it was not."""
        word = self._words.get(gpa >> 12, {}).get(gpa >> 3 & 511)
        return None if word is None or word.event is None else (word.since, word.event)

    def snapshot(self, rank: Callable[[int], int]) -> object:
        """What there is, canonically; `rank` replaces times."""
        words = []
        for gfn in sorted(self._words):
            for index, word in sorted(self._words[gfn].items()):
                past = [version for version in word.past if self._matters(version, self.tables[gfn])]
                if past or word.forgotten > self.horizon_global:
                    versions = tuple((value, rank(since), rank(until)) for value, since, until in past)
                    forgotten = rank(word.forgotten), rank(word.forgotten_global)
                    words.append((gfn << 9 | index, versions, rank(word.since), forgotten))
        tables = [
            (gfn, tuple(sorted(table.levels)), table.may_global, tuple(sorted(table.parents)))
            for gfn, table in sorted(self.tables.items())
        ]
        return tuple(words), tuple(tables)


def _children(level: int, word: int) -> list[tuple[int, int]]:
    """(frame, level) of each table that the entries in a word of a table of `level` lead to."""
    if level == DIRECTORY_32:
        return [
            ((entry & 0xFFFFF000) >> 12, TABLE_32)
            for entry in (word & 0xFFFFFFFF, word >> 32)
            if entry & PRESENT
        ]
    if not word & PRESENT or (word & LARGE and level in (2, 3)):
        return []
    return [((word & 0xFFFFFFFFFF000) >> 12, 2 if level == PDPT else level - 1)]


def _is_global(level: int, word: int) -> bool:
    """Whether a word of a table of `level` has an entry that makes global translations."""
    entries = (word & 0xFFFFFFFF, word >> 32) if level in (TABLE_32, DIRECTORY_32) else (word,)
    leaf = PRESENT | GLOBAL if level in (1, TABLE_32) else PRESENT | GLOBAL | LARGE
    return any(entry & leaf == leaf for entry in entries)
