"""Lists of shadow entries: the multiset is kept, groups stay small, and the count is the kernel's."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.kvm.constants import PTE_LIST_EXT
from shadowmmu.kvm.pte_list import (
    PteList,
    pte_list_add,
    pte_list_entries,
    pte_list_first,
    pte_list_len,
    pte_list_remove,
)

SPTEPS = st.integers(1, 40).map(lambda n: n * 8)


@given(st.lists(st.tuples(st.booleans(), SPTEPS), max_size=80))
def test_insertions_and_removals_keep_the_multiset(steps: list[tuple[bool, int]]) -> None:
    pte_list: PteList = 0
    expected: Counter[int] = Counter()
    for insert, sptep in steps:
        if insert:
            pte_list, _ = pte_list_add(pte_list, sptep)
            expected[sptep] += 1
        elif expected[sptep]:
            pte_list = pte_list_remove(pte_list, sptep)
            expected[sptep] -= 1
        assert Counter(pte_list_entries(pte_list)) == +expected
        assert pte_list_len(pte_list) == expected.total()
        assert bool(pte_list) == bool(+expected)
        if pte_list:
            assert expected[pte_list_first(pte_list)]
        if isinstance(pte_list, list):
            assert all(1 <= len(group) <= PTE_LIST_EXT for group in pte_list)


def test_the_count_without_holes() -> None:
    pte_list: PteList = 0
    counts = []
    for sptep in range(8, 8 * 14, 8):
        pte_list, count = pte_list_add(pte_list, sptep)
        counts.append(count)
    # The full group behind which a new one is made is not counted.
    assert counts == [0, 1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8]


def test_a_hole_is_filled_first_and_counted_by_its_place() -> None:
    pte_list: PteList = 0
    for sptep in range(8, 8 * 10, 8):
        pte_list, _ = pte_list_add(pte_list, sptep)
    pte_list = pte_list_remove(pte_list, 16)
    pte_list, count = pte_list_add(pte_list, 800)
    assert count == 3


@pytest.mark.parametrize("pte_list", [0, 8, [[8, 16]]])
def test_removing_what_is_not_there_is_refused(pte_list: PteList) -> None:
    with pytest.raises(ValueError, match="not in its list"):
        pte_list_remove(pte_list, 24)
