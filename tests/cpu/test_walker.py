"""The hardware walk against the words of conformance/FORMAT.md 2.2, written down once more and naively."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.cpu import Translation, WalkFault, hardware_walk
from shadowmmu.protocol.events import AccessFlag as F

P, W, U, A, D, PS, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
GVA = 0x8080_6040_5000 & 0x7FFF_FFFF_F000 | 0x123


class FlatTables:
    """Tables in a dictionary; a table is its frame number. `meanwhile` is called before each read."""

    def __init__(self, words: dict[tuple[int, int], int]) -> None:
        self.words = words
        self.reads = 0
        self.meanwhile: Callable[[int], None] = lambda _: None

    def read(self, table: int, index: int) -> int:
        self.reads += 1
        return self.words.get((table, index), 0)

    def child(self, table: int, index: int, entry: int) -> int:
        return (entry & ((1 << 40) - 1)) >> 12

    def set_bits(self, table: int, index: int, expected: int, bits: int) -> bool:
        if self.words.get((table, index), 0) != expected:
            return False
        self.words[table, index] = expected | bits
        return True


def walk(
    tables: FlatTables, flags: int, gva: int = GVA, level: int = 4, smep: bool = False
) -> Translation | WalkFault:
    steps = hardware_walk(tables, 100 + level, gva, flags, level, smep=smep)
    while True:
        try:
            next(steps)
            tables.meanwhile(tables.reads)
        except StopIteration as stop:
            result: Translation | WalkFault = stop.value
            return result


def chain(entries: list[int], gva: int = GVA) -> FlatTables:
    """Entries from level 4 down, each leading to the table 100 + (level below)."""
    words = {}
    for level, bits in zip(range(4, 0, -1), entries, strict=False):
        index = gva >> (12 + 9 * (level - 1)) & 511
        leaf = level == 1 or (level < 4 and bits & PS)
        words[100 + level, index] = bits | (0x40000 if leaf else 100 + level - 1) << 12
    return FlatTables(words)


def naive(entries: list[int], flags: int, smep: bool) -> tuple[int, int] | int:
    """(level, rights) or an error code."""
    request = (2 if flags & F.WRITE else 0) | (4 if flags & F.USER else 0) | (16 if flags & F.FETCH else 0)
    writable = user = True
    fetch = True
    for level, entry in zip((4, 3, 2, 1), entries, strict=True):
        if not entry & P:
            return request
        if entry & ((1 << 52) - (1 << 40)):
            return request | 1 | 8
        writable &= bool(entry & W)
        user &= bool(entry & U)
        fetch &= not entry & NX
        if level == 1 or (level < 4 and entry & PS):
            break
    supervisor_fetch = flags & F.FETCH and not flags & F.USER
    denied = (
        (flags & F.WRITE and not writable)
        or (flags & F.USER and not user)
        or (flags & F.FETCH and not fetch)
        or (supervisor_fetch and smep and user)
    )
    if denied:
        return request | 1
    rights = F.MAY_WRITE * writable | F.MAY_USER * user | F.MAY_FETCH * fetch | F.SMEP * (user and smep)
    return level, int(rights)


ENTRY = st.sets(
    st.sampled_from([W, U, A, D, NX, PS, 1 << 45]), max_size=7
).flatmap(lambda bits: st.sampled_from([sum(bits) & ~(1 << 45) | P, sum(bits) | P, sum(bits)]))  # fmt: skip


@given(st.lists(ENTRY, min_size=4, max_size=4), st.integers(0, 7), st.booleans())
def test_translations_faults_and_bits_are_as_the_format_says(
    entries: list[int], flags: int, smep: bool
) -> None:
    tables = chain(entries)
    before = dict(tables.words)
    expected = naive(entries, flags, smep)
    result = walk(tables, flags, smep=smep)
    if isinstance(expected, int):
        assert result == WalkFault(expected)
        assert tables.words == before, "a faulting walk sets nothing"
        return
    level, rights = expected
    assert isinstance(result, Translation)
    assert result.level == level
    leaf = entries[4 - level]
    dirty = bool(flags & F.WRITE or leaf & D)
    assert result.flags == rights | (F.DIRTY if dirty else 0) | (F.LARGE if level > 1 else 0)
    assert result.pfn == 0x40000
    used = list(before)[: 5 - level]
    for place, entry in before.items():
        bits = A if place in used else 0
        if place == used[-1] and flags & F.WRITE:
            bits |= D
        assert tables.words[place] == entry | bits


def test_a_fetch_reports_itself_whatever_the_fault() -> None:
    assert walk(chain([0, 0, 0, 0]), int(F.FETCH)) == WalkFault(16)
    assert walk(chain([P | U] * 3 + [P | U | NX]), int(F.FETCH | F.USER)) == WalkFault(16 | 4 | 1)


@pytest.mark.parametrize("closed", range(4))
def test_with_smep_the_supervisor_may_not_fetch_what_every_level_opens_to_users(closed: int) -> None:
    entries = [P | W | U] * 4
    assert walk(chain(entries), int(F.FETCH), smep=True) == WalkFault(16 | 1)
    assert isinstance(walk(chain(entries), int(F.FETCH | F.USER), smep=True), Translation)
    assert isinstance(walk(chain(entries), 0, smep=True), Translation)
    entries[closed] &= ~U
    assert isinstance(walk(chain(entries), int(F.FETCH), smep=True), Translation)


def test_it_yields_before_each_read_and_sees_what_others_did_in_between() -> None:
    tables = chain([P | W | U] * 4)

    def cut_the_leaf(reads: int) -> None:
        if reads == 3:
            tables.words = {place: word for place, word in tables.words.items() if place[0] != 101}

    tables.meanwhile = cut_the_leaf
    assert walk(tables, 0) == WalkFault(0)
    assert tables.reads == 4


class Fickle(FlatTables):
    """The leaf changes once, just before its bits are to be set."""

    changed = False

    def set_bits(self, table: int, index: int, expected: int, bits: int) -> bool:
        if table == 101 and not self.changed:
            self.changed = True
            self.words[table, index] = 0x50000 << 12 | P | W | U
        return super().set_bits(table, index, expected, bits)


def test_a_walk_whose_entry_changed_starts_again() -> None:
    tables = Fickle(chain([P | W | U] * 4).words)
    result = walk(tables, int(F.WRITE))
    assert isinstance(result, Translation)
    assert result.pfn == 0x50000
    assert tables.reads == 8


@pytest.mark.parametrize("quarter", range(4))
def test_pae_roots_carry_no_permissions_and_are_not_touched(quarter: int) -> None:
    gva = quarter << 30 | 0x20_3000
    words = {
        (103, quarter): 102 << 12 | P,
        (102, 1): 101 << 12 | P | W | U,
        (101, 3): 0x99 << 12 | P | W | U,
    }
    tables = FlatTables(words)
    result = walk(tables, int(F.WRITE | F.USER), gva, level=3)
    assert isinstance(result, Translation)
    assert (result.pfn, result.level) == (0x99, 1)
    assert tables.words[103, quarter] == 102 << 12 | P
    tables.words[103, quarter] = 0
    assert walk(tables, int(F.WRITE | F.USER), gva, level=3) == WalkFault(6)
