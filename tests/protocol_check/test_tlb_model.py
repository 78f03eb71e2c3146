"""The largest TLB that a client may have."""

from __future__ import annotations

import pytest

from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol_check.tlb_model import Dropped, TlbModel

WRITE, FETCH, USER = int(AccessFlag.WRITE), int(AccessFlag.FETCH), int(AccessFlag.USER)
ALL = int(AccessFlag.MAY_WRITE | AccessFlag.MAY_USER | AccessFlag.MAY_FETCH | AccessFlag.DIRTY)
GVA = 0xFFFF_8000_0040_3000


@pytest.fixture
def tlb() -> TlbModel:
    tlb = TlbModel()
    tlb.grant(GVA, 7, 1, ALL)
    return tlb


def dropped(tlb: TlbModel, gva: int = GVA, pfn: int = 7) -> Dropped | None:
    misuse = tlb.misuse(ALL, gva, pfn)
    assert misuse is not None
    return misuse.dropped


def test_a_translation_that_was_granted_may_be_used(tlb: TlbModel) -> None:
    for kind in (0, WRITE, FETCH, USER):
        assert tlb.misuse(kind | ALL, GVA + 8, 7) is None


def test_another_frame_page_or_right_was_never_granted(tlb: TlbModel) -> None:
    assert dropped(tlb, pfn=8) is None
    assert dropped(tlb, gva=GVA + 0x1000) is None
    misuse = tlb.misuse(ALL & ~int(AccessFlag.DIRTY), GVA, 7)
    assert misuse is not None and not misuse.rights


@pytest.mark.parametrize(
    "rights, access",
    [
        (AccessFlag.DIRTY, WRITE),
        (AccessFlag.MAY_WRITE, WRITE),
        (AccessFlag.MAY_WRITE, USER),
        (AccessFlag.MAY_USER, FETCH),
        (AccessFlag.MAY_FETCH | AccessFlag.SMEP, FETCH),
    ],
)
def test_a_right_that_the_translation_lacks(rights: AccessFlag, access: int) -> None:
    tlb = TlbModel()
    tlb.grant(GVA, 7, 1, int(rights))
    assert tlb.misuse(int(rights), GVA, 7) is None
    misuse = tlb.misuse(int(rights) | access, GVA, 7)
    assert misuse is not None and misuse.rights


@pytest.mark.parametrize("level, pages", [(2, 512), (3, 512 * 512)])
def test_a_large_page_covers_all_of_its_pieces(level: int, pages: int) -> None:
    tlb = TlbModel()
    tlb.grant(0x7FC0_0000_0000, 0x10_0000, level, ALL | AccessFlag.LARGE)
    for piece in (0, 1, pages - 1):
        assert tlb.misuse(ALL, 0x7FC0_0000_0000 + 0x1000 * piece, 0x10_0000 + piece) is None
    assert dropped(tlb, 0x7FC0_0000_0000 + 0x1000 * pages, 0x10_0000 + pages) is None
    assert tlb.drop(0x7FC0_0000_0000 + 0x1000 * (pages - 1), Dropped.INVLPG)
    assert dropped(tlb, 0x7FC0_0000_0000, 0x10_0000) is Dropped.INVLPG


def test_what_was_dropped_is_known_by_its_reason(tlb: TlbModel) -> None:
    assert not tlb.drop(GVA + 0x1000, Dropped.INVLPG)
    assert tlb.clear(Dropped.FLUSH)
    assert dropped(tlb) is Dropped.FLUSH
    tlb.grant(GVA, 7, 1, ALL)
    assert tlb.misuse(ALL, GVA, 7) is None


def test_each_processor_has_its_own(tlb: TlbModel) -> None:
    assert tlb.select(1)
    assert dropped(tlb) is Dropped.PROCESSOR
    tlb.clear(Dropped.FLUSH)
    tlb.select(0)
    assert tlb.misuse(ALL, GVA, 7) is None
    tlb.select(1)
    tlb.clear_all(Dropped.INCARNATION)
    assert dropped(tlb) is Dropped.INCARNATION
