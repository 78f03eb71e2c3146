"""Lists of addresses of shadow entries: reverse maps and lists of parents (pte_list_* of mmu.c).

A list is 0 (empty), one address, or a chain of groups of up to four. The order within a group does not matter; which
group has a hole does, because the count that an insertion returns depends on it, and KVM drops a whole reverse map
when that count passes a limit. Values are replaced, not objects: `add` and `remove` return the new list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from shadowmmu.kvm.constants import PTE_LIST_EXT

__all__ = ["PteList", "pte_list_add", "pte_list_entries", "pte_list_first", "pte_list_len", "pte_list_remove"]

PteList: TypeAlias = int | list[list[int]]


def pte_list_add(pte_list: PteList, sptep: int) -> tuple[PteList, int]:
    """Insert `sptep`; returns the list and the kernel's count of entries before it.

    The count is that of the groups passed over, four each, and of the place in the group; the full group behind which
    a new one had to be made is not counted (a quirk of pte_list_add).
    """
    if not pte_list:
        return sptep, 0
    if isinstance(pte_list, int):
        return [[pte_list, sptep]], 1
    count = 0
    last = len(pte_list) - 1
    for number, group in enumerate(pte_list):
        if len(group) < PTE_LIST_EXT:
            group.append(sptep)
            return pte_list, count + len(group) - 1
        if number != last:
            count += PTE_LIST_EXT
    pte_list.append([sptep])
    return pte_list, count


def pte_list_remove(pte_list: PteList, sptep: int) -> PteList:
    """Take `sptep` out; the last entry of its group fills the hole, a group that becomes empty goes.

    Raises ValueError if it is not there (the kernel would stop with BUG).
    """
    if isinstance(pte_list, int):
        if pte_list != sptep or not sptep:
            raise ValueError(f"shadow entry {sptep:#x} is not in its list")
        return 0
    for number, group in enumerate(pte_list):
        if sptep in group:
            last = group.pop()
            if last != sptep:
                group[group.index(sptep)] = last
            if not group:
                del pte_list[number]
                if not pte_list:
                    return 0
            return pte_list
    raise ValueError(f"shadow entry {sptep:#x} is not in its list")


def pte_list_entries(pte_list: PteList) -> Iterator[int]:
    """The addresses in it, in the kernel's order; take a copy before changing the list."""
    if isinstance(pte_list, int):
        if pte_list:
            yield pte_list
    else:
        for group in pte_list:
            yield from group


def pte_list_first(pte_list: PteList) -> int:
    """The first address, 0 if there is none."""
    return pte_list if isinstance(pte_list, int) else pte_list[0][0]


def pte_list_len(pte_list: PteList) -> int:
    """How many addresses there are."""
    if isinstance(pte_list, int):
        return 1 if pte_list else 0
    return sum(map(len, pte_list))
