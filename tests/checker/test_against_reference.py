"""The checker against a naive reading of the rules, on random streams."""

from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.checker import Checker, Rule
from shadowmmu.protocol.events import (
    Accesses,
    Event,
    FrameBacked,
    FrameRevoked,
    LockReleased,
    LockTaken,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
)

GFNS = st.integers(0, 2)
SPS = st.integers(0, 5)


def gfn_of(sp: int) -> int:
    return sp % 3


def accesses(items: list[tuple[int, int]]) -> Accesses:
    return Accesses(vcpu=0, entry=1, items=[(flags, 0, gfn, gfn + 10, 8, 0) for flags, gfn in items])


ALL_EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.lists(st.tuples(st.sampled_from([0, 1, 4, 17]), GFNS), min_size=1, max_size=3).map(accesses),
    st.builds(FrameRevoked, GFNS, GFNS.map(lambda gfn: gfn + 10)),
    st.builds(FrameBacked, GFNS, GFNS.map(lambda gfn: gfn + 10)),
    SPS.map(lambda sp: ShadowPageCreated(sp=sp, gfn=gfn_of(sp), level=1, direct=sp == 5, role=0)),
    SPS.map(lambda sp: ShadowPageUnsynced(sp=sp, gfn=gfn_of(sp))),
    SPS.map(lambda sp: ShadowPageSynced(sp=sp, gfn=gfn_of(sp))),
    SPS.map(lambda sp: ShadowPageZapped(sp=sp, gfn=gfn_of(sp), in_use=False)),
    st.just(LockTaken(op=1)),
    st.just(LockReleased(op=1)),
)


def possible(events: list[Event]) -> list[Event]:
    """Leave out what no kernel does: pages made twice or changed before they are made, changes without the lock."""
    kept: list[Event] = []
    locked = False
    made: set[int] = set()
    for event in events:
        match event:
            case LockTaken() | LockReleased():
                if locked == isinstance(event, LockTaken):
                    continue
                locked = not locked
            case ShadowPageCreated(sp=sp):
                if not locked or sp in made:
                    continue
                made.add(sp)
            case ShadowPageUnsynced(sp=sp) | ShadowPageSynced(sp=sp) | ShadowPageZapped(sp=sp):
                if not locked or sp not in made:
                    continue
            case _:
                pass
        kept.append(event)
    return kept


def in_sync_pages(events: list[Event]) -> set[int]:
    pages: set[int] = set()
    gone: set[int] = set()
    for event in events:
        match event:
            case ShadowPageCreated(sp=sp, direct=False):
                pages.add(sp)
            case ShadowPageSynced(sp=sp) if sp != 5 and sp not in gone:
                pages.add(sp)
            case ShadowPageUnsynced(sp=sp):
                pages.discard(sp)
            case ShadowPageZapped(sp=sp):
                pages.discard(sp)
                gone.add(sp)
            case _:
                pass
    return pages


def is_protected(events: list[Event], gfn: int) -> bool:
    """Read backwards: some page in sync at every moment since a release (looking at every prefix anew)."""
    for end in range(len(events), 0, -1):
        if not any(gfn_of(sp) == gfn for sp in in_sync_pages(events[:end])):
            return False
        if isinstance(events[end - 1], LockReleased):
            return True
    return False


def is_revoked(events: list[Event], pfn: int) -> bool:
    for event in reversed(events):
        match event:
            case FrameRevoked(pfn=that) if that == pfn:
                return True
            case FrameBacked(pfn=that) if that == pfn:
                return False
            case _:
                pass
    return False


def reference(events: list[Event]) -> tuple[int, Rule] | None:
    for index, event in enumerate(events):
        if isinstance(event, Accesses):
            before = events[:index]
            for flags, _, gfn, pfn, _, _ in event.items:
                if is_revoked(before, pfn):
                    return index, Rule.HOST_FRAME_USE_AFTER_REVOKE
                if flags & 1 and is_protected(before, gfn):
                    return index, Rule.WRITE_PROTECTION_BREACH
    return None


@given(st.lists(ALL_EVENTS, max_size=40).map(possible))
def test_the_first_violation_is_the_one_that_a_naive_reading_finds(events: list[Event]) -> None:
    violation = Checker({Rule.HOST_FRAME_USE_AFTER_REVOKE, Rule.WRITE_PROTECTION_BREACH}).feed_all(events)
    expected = reference(events)
    found = None if violation is None else (violation.event_index, violation.rule)
    assert found == expected
