"""The guest of a guest: gva_to_gpa_nested against a two-dimensional walk written here from the manuals.

L1's nested tables (64-bit format) map L2's 64 physical frames to frames of L1, each with rights of its own; L2's tables,
in each paging mode, lie in the first of L2's frames.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.cpu.x86 import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_NX_MASK,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_PAE,
)
from shadowmmu.kvm.nested import NestedGuest, gva_to_gpa_nested
from shadowmmu.kvm.walker import GuestWalker
from tests.kvm.kit import PAGE, TABLE, A, D, P, U, W, World, drive

NPT_LEAVES = 19
"""L1's frame with the 512 entries that map L2's first frames."""
FIRST = 64
"""L1's frame behind L2's frame f is FIRST + (f ^ 5)."""
L2_FRAMES = 64
ROOT = 8 << 12


class Mode(NamedTuple):
    """A paging mode of L2: registers, and (shift, entry size) of its tables, top down; PDPTEs are no table."""

    cr0: int
    cr4: int
    efer: int
    levels: tuple[tuple[int, int], ...]


PAGING = X86_CR0_PG | X86_CR0_PE | X86_CR0_WP
MODES = {
    "paging64": Mode(
        PAGING, X86_CR4_PAE, EFER_LME | EFER_LMA | EFER_NX, ((39, 8), (30, 8), (21, 8), (12, 8))
    ),
    "pae": Mode(PAGING, X86_CR4_PAE, EFER_NX, ((21, 8), (12, 8))),
    "paging32": Mode(PAGING, 0, 0, ((22, 4), (12, 4))),
    "nonpaging": Mode(X86_CR0_PE, 0, 0, ()),
}

RIGHTS = st.sampled_from(
    (PAGE, PAGE, PAGE, PAGE, PAGE, PAGE, P | U | A, P | W | A | D, 0, PAGE | PT64_NX_MASK)
)
FRAME = st.integers(8, 17)
WEAK_NESTED_RIGHTS = st.sampled_from((P | U | A | D, P | W | A | D, PAGE | PT64_NX_MASK, 0))


class Case(NamedTuple):
    """L2's entries on the way, top down, as (next frame, rights); the access; and where L1's rights are weak.

    `weak` is (which frame on the way, 0 for the root, -1 for the page itself; L1's rights to it), or None.
    """

    path: list[tuple[int, int]]
    weak: tuple[int, int] | None
    indices: tuple[int, ...]
    access: int


CASES = st.builds(
    Case,
    st.lists(st.tuples(FRAME, RIGHTS), min_size=4, max_size=4),
    st.none() | st.tuples(st.integers(-1, 3), WEAK_NESTED_RIGHTS),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from((0, PFERR_WRITE_MASK, PFERR_FETCH_MASK)).flatmap(
        lambda kind: st.sampled_from((kind, kind | PFERR_USER_MASK))
    ),
)


class Nested:
    """L1, its nested tables, and L2 in one mode."""

    def __init__(self, mode: Mode, case: Case) -> None:
        self.mode = mode
        self.world = world = World(1, npages=256)
        for table in (16, 17, 18):
            world.set_gpte(table, 0, table + 1, TABLE)
        for frame in range(L2_FRAMES):
            world.set_gpte(NPT_LEAVES, frame, self.behind(frame), PAGE)
        world.boot()
        self.is_pae = mode is MODES["pae"]
        if self.is_pae:  # four PDPTEs, which carry no rights
            for index in range(4):
                world.kvm.memory.write((self.behind(8) << 12) + 0xFE0 + 8 * index, 8, 9 + index << 12 | P)
        cr3 = ROOT | 0xFE0 if self.is_pae else ROOT
        table = 9 + case.indices[3] if self.is_pae else 8
        way = [table] if mode.levels else [self.address(case.indices) >> 12]
        for (_, size), index, (frame, rights) in zip(mode.levels, case.indices, case.path, strict=False):
            value = (frame << 12 | rights) & ((1 << 8 * size) - 1) if rights else 0
            world.kvm.memory.write((self.behind(table) << 12) + index * size, size, value)
            table = frame
            way.append(frame)
        if case.weak is not None:
            position, rights = case.weak
            frame = way[position % len(way) if position >= 0 else -1]
            world.set_gpte(NPT_LEAVES, frame, self.behind(frame), rights)
        self.guest = NestedGuest(world.vcpus[0], mode.cr0, cr3, mode.cr4, mode.efer)

    @staticmethod
    def behind(frame: int) -> int:
        """L1's frame that L2's is mapped to, whatever the rights."""
        return FIRST + (frame ^ 5)

    def allows(self, frame: int, access: int) -> bool:
        """Whether L1's tables let a user access through."""
        if frame >= L2_FRAMES:
            return False
        entry = self.world.gpte(NPT_LEAVES, frame)
        return (
            entry & P != 0
            and entry & U != 0
            and (entry & W != 0 or not access & PFERR_WRITE_MASK)
            and not (entry & PT64_NX_MASK and access & PFERR_FETCH_MASK)
        )

    def address(self, indices: tuple[int, ...]) -> int:
        if not self.mode.levels:
            return indices[0] << 12 | indices[1] << 16 | 0x123
        address = indices[3] << 30 if self.is_pae else 0
        return (
            sum(
                (index << shift for index, (shift, _) in zip(indices, self.mode.levels, strict=False)),
                address,
            )
            + 0x123
        )

    def expected(self, gva: int, access: int) -> tuple[str, int]:
        """("gpa", address), ("fault", error code), ("table", L2 address) or ("page", L2 address)."""
        request = access if self.mode.efer & EFER_NX else access & ~PFERR_FETCH_MASK
        read = self.world.kvm.memory.read
        denied = False
        frame = gva >> 12
        if self.mode.levels:
            frame = 9 + (gva >> 30) if self.is_pae else 8
        for shift, size in self.mode.levels:
            if not self.allows(frame, PFERR_WRITE_MASK):
                return "table", frame << 12
            index = gva >> shift & (511 if size == 8 else 1023)
            entry = read((self.behind(frame) << 12) + index * size, size)
            if not entry & P:
                return "fault", request
            denied |= bool(access & PFERR_WRITE_MASK and not entry & W)
            denied |= bool(access & PFERR_USER_MASK and not entry & U)
            denied |= bool(access & PFERR_FETCH_MASK and entry & PT64_NX_MASK)
            frame = (entry & (1 << 52) - 1) >> 12
        if denied:
            return "fault", request | PFERR_PRESENT_MASK
        if not self.allows(frame, access):
            return "page", frame << 12
        return "gpa", self.behind(frame) << 12 | gva & 0xFFF


def outcome(walker: GuestWalker) -> tuple[str, int]:
    if walker.nested_fault is not None:
        return "page" if walker.fault is None else "table", walker.nested_fault[0] & ~0xFFF
    return ("gpa", walker.gpa) if walker.fault is None else ("fault", walker.fault)


@pytest.mark.parametrize("name", MODES)
@given(case=CASES)
def test_an_address_of_the_inner_guest_is_translated_by_both_sets_of_tables(name: str, case: Case) -> None:
    nested = Nested(MODES[name], case)
    if not drive(nested.guest.load()):
        assert nested.is_pae
        assert not nested.allows(8, PFERR_WRITE_MASK)
        return
    gva = nested.address(case.indices)
    expected = nested.expected(gva, case.access)
    assert outcome(drive(gva_to_gpa_nested(nested.guest, gva, case.access))) == expected
    if expected[0] == "gpa" and nested.mode.levels:
        assert drive(gva_to_gpa_nested(nested.guest, gva, case.access)).ptes[0] & A


def test_a_nested_fault_names_the_inner_address_and_the_outer_error_code() -> None:
    case = Case([(9, PAGE)] * 4, (1, P | U | A | D), (0, 0, 0, 0), 0)
    nested = Nested(MODES["paging64"], case)
    walker = drive(gva_to_gpa_nested(nested.guest, 0, 0))
    error_code = PFERR_PRESENT_MASK | PFERR_WRITE_MASK | PFERR_USER_MASK
    assert walker.nested_fault == (9 << 12, error_code)
    assert walker.gpa == -1
