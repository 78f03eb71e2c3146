"""The walk in extended page tables against the words of conformance/FORMAT.md section 5, written down naively."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.cpu import (
    EptMisconfig,
    PendingWalk,
    Translation,
    WalkFault,
    WalkResult,
    ept_walk,
    needed_rights,
)
from shadowmmu.protocol.events import AccessFlag as F
from tests.cpu.test_walker import FlatTables, chain

R, W, X, PS, RESERVED = 1, 2, 4, 1 << 7, 1 << 45
GPA = 0x8060_4000_5123
MMIO = 0xFF << 49 | W | X


def finish(steps: PendingWalk) -> WalkResult:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: WalkResult = stop.value
            return result


def walk(tables: FlatTables, flags: int) -> WalkResult:
    return finish(ept_walk(tables, 104, GPA, flags))


def naive(entries: list[int], flags: int) -> tuple[int, int] | int | None:
    """(level, rights), an error code, or None for a misconfiguration."""
    error_code = 2 if flags & F.WRITE else 0 if flags & F.FETCH else 1
    rights = R | W | X
    for level, entry in zip((4, 3, 2, 1), entries, strict=True):
        if entry & (R | W | X) == 0:
            return error_code
        if not entry & R or entry & RESERVED:
            return None
        rights &= entry
        if level == 1 or (level < 4 and entry & PS):
            break
    needed = W if flags & F.WRITE else X if flags & F.FETCH else R
    return (level, rights) if rights & needed else error_code


ENTRY = st.sets(st.sampled_from([R, R, W, X, PS, RESERVED])).map(sum) | st.sampled_from([R, R | W, R | W | X])


@given(
    st.lists(ENTRY, min_size=4, max_size=4),
    st.sampled_from([0, F.WRITE, F.FETCH, F.USER, F.USER | F.WRITE]).map(int),
)
def test_translations_violations_and_misconfigurations_are_as_the_format_says(
    entries: list[int], flags: int
) -> None:
    tables = chain(entries, GPA)
    before = dict(tables.words)
    expected = naive(entries, flags)
    result = walk(tables, flags)
    assert tables.words == before, "there are no accessed and dirty bits"
    match expected:
        case None:
            assert result == EptMisconfig()
        case int():
            assert result == WalkFault(expected)
        case level, rights:
            assert isinstance(result, Translation)
            assert (result.level, result.pfn) == (level, 0x40000)
            wanted = F.MAY_USER | F.LARGE * (level > 1) | F.MAY_FETCH * bool(rights & X)
            assert result.flags == wanted | (F.MAY_WRITE | F.DIRTY) * bool(rights & W)


@pytest.mark.parametrize("flags", range(8))
def test_a_translation_with_all_rights_is_good_for_every_access(flags: int) -> None:
    result = walk(chain([R | W | X] * 4, GPA), 0)
    assert isinstance(result, Translation)
    assert result.flags & needed_rights[flags] == needed_rights[flags]


def test_the_entry_of_a_frame_without_memory_is_misconfigured() -> None:
    assert walk(chain([R | W | X] * 3 + [MMIO], GPA), 0) == EptMisconfig()


def test_it_yields_before_each_read() -> None:
    tables = chain([R | W | X] * 4, GPA)
    steps = ept_walk(tables, 104, GPA, 0)
    for reads in range(4):
        next(steps)
        assert tables.reads == reads
    with pytest.raises(StopIteration):
        next(steps)
