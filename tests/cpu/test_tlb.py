"""The TLB against a dictionary that never forgets unless it is told to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shadowmmu.cpu import Tag, Tlb, checked_rights, needed_rights
from shadowmmu.protocol.events import AccessFlag

F = AccessFlag
ALL = int(F.MAY_WRITE | F.MAY_USER | F.MAY_FETCH | F.DIRTY)
GVAS = st.integers(0, 1 << 23)


class TlbMachine(RuleBasedStateMachine):
    """Whatever the TLB holds is what was inserted last and not invalidated since."""

    def __init__(self) -> None:
        super().__init__()
        self.tlb = Tlb(4, 2)
        self.small: dict[int, tuple[int, int]] = {}
        self.large: dict[int, tuple[int, int]] = {}

    @rule(gva=GVAS, pfn=st.integers(0, 1 << 20), flags=st.sampled_from([0x100, 0x700, ALL]))
    def insert_small(self, gva: int, pfn: int, flags: int) -> None:
        entry = self.tlb.insert(gva, pfn, 1, flags)
        self.small[gva >> 12] = pfn, flags
        self.large.pop(gva >> 21, None)
        assert self.tlb.lookup(gva) is entry

    @rule(gva=GVAS, block=st.integers(0, 1 << 10), flags=st.sampled_from([0x100, ALL]))
    def insert_large(self, gva: int, block: int, flags: int) -> None:
        entry = self.tlb.insert(gva, block << 9, 2, flags)
        self.large[gva >> 21] = block << 9, flags
        self.small.pop(gva >> 12, None)
        assert self.tlb.lookup(gva) is entry

    @rule(gva=GVAS)
    def invalidate(self, gva: int) -> None:
        self.tlb.invalidate(gva)
        self.small.pop(gva >> 12, None)
        self.large.pop(gva >> 21, None)
        assert self.tlb.lookup(gva) is None

    @rule()
    def flush(self) -> None:
        held = len(self.tlb) > 0
        assert self.tlb.flush() == held
        self.small.clear()
        self.large.clear()
        assert len(self.tlb) == 0

    @rule(gva=GVAS)
    def lookup(self, gva: int) -> None:
        entry = self.tlb.lookup(gva)
        if entry is None:
            return
        if entry.flags & F.LARGE:
            pfn, flags = self.large[gva >> 21]
            assert entry.frame(gva) == pfn + (gva >> 12 & 511)
        else:
            pfn, flags = self.small[gva >> 12]
            assert entry.frame(gva) == pfn
        assert entry.flags & ALL == flags & ALL

    @invariant()
    def within_its_size(self) -> None:
        assert len(self.tlb.small) <= 4 * 2
        assert len(self.tlb.large) <= 1 * 2


test_tlb_machine = TlbMachine.TestCase


def test_the_least_recently_used_way_of_a_set_is_replaced() -> None:
    tlb = Tlb(sets=2, ways=2)
    tlb.insert(0x0000, 10, 1, ALL)
    tlb.insert(0x2000, 12, 1, ALL)
    tlb.insert(0x1000, 11, 1, ALL)  # the other set
    assert tlb.lookup(0x0000) is not None
    tlb.insert(0x4000, 14, 1, ALL)
    assert tlb.lookup(0x2000) is None
    assert all(tlb.lookup(gva) for gva in (0x0000, 0x1000, 0x4000))


def test_invlpg_removes_both_sizes() -> None:
    tlb = Tlb(16, 4)
    tlb.insert(0x20_0000, 512, 2, ALL)
    tlb.insert(0x20_5000, 7, 1, ALL)
    # The insert removed the large entry; another address brings it back, so that both hold 0x205000.
    tlb.insert(0x20_0000, 512, 2, ALL)
    assert len(tlb) == 2
    assert tlb.invalidate(0x20_5FFF)
    assert len(tlb) == 0


def test_what_was_walked_last_is_found_although_the_other_size_is_held_too() -> None:
    tlb = Tlb(16, 4)
    tlb.insert(0x20_5000, 7, 1, 0)
    tlb.insert(0x20_5000, 512, 2, ALL)
    entry = tlb.lookup(0x20_5123)
    assert entry is not None
    assert entry.frame(0x20_5123) == 517


def test_a_gigabyte_leaf_is_held_by_2_mib_pieces() -> None:
    tlb = Tlb(16, 4)
    entry = tlb.insert(0x4000_0000 + 0x60_3000, 0x40000, 3, ALL)
    assert entry.frame(0x4000_0000 + 0x60_3000) == 0x40000 + 0x603
    assert tlb.lookup(0x4000_0000) is None


def test_translations_are_found_under_their_own_tag_only() -> None:
    tlb = Tlb(16, 4)
    tlb.insert(0x1000, 1, 1, ALL)
    old = tlb.tag
    tlb.select(Tag(processor=1, vpid=1))
    assert tlb.lookup(0x1000) is None
    tlb.insert(0x1000, 2, 1, ALL)
    tlb.flush()
    tlb.select(old)
    entry = tlb.lookup(0x1000)
    assert entry is not None
    assert entry.pfn == 1


@pytest.mark.parametrize("vpid", [True, False])
def test_entries_survive_a_world_switch_with_a_vpid_only(vpid: bool) -> None:
    tlb = Tlb(16, 4, vpid)
    tlb.insert(0x1000, 1, 1, ALL)
    assert tlb.world_switch() is not vpid
    assert (tlb.lookup(0x1000) is not None) is vpid


@given(st.integers(0, 31))
def test_a_write_needs_the_dirty_bit_in_the_cached_entry(flags: int) -> None:
    need = needed_rights[flags]
    assert bool(need & F.DIRTY) == bool(need & F.MAY_WRITE) == bool(flags & F.WRITE)
    assert bool(need & F.MAY_USER) == bool(flags & F.USER)
    assert bool(need & F.MAY_FETCH) == bool(flags & F.FETCH)


@given(st.integers(0, 31), st.booleans())
def test_only_a_supervisor_fetch_does_not_take_a_user_translation_that_was_made_under_smep(
    flags: int, smep: bool
) -> None:
    rights = ALL | (F.SMEP if smep else 0)
    taken = rights & checked_rights[flags] == needed_rights[flags]
    assert taken is not (smep and flags & (F.FETCH | F.USER) == F.FETCH)
