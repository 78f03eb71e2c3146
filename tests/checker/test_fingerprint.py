"""Equal fingerprints where the future is the same, different ones where it is not."""

from __future__ import annotations

import pytest

from shadowmmu.checker import Checker
from shadowmmu.protocol.events import (
    DirtyLogStarted,
    FrameBacked,
    FrameRevoked,
    InputConsumed,
    LockedRead,
    LockReleased,
    LockTaken,
    OperationEnded,
    OperationStarted,
    ShadowPageCreated,
    SlotSettled,
)
from tests.checker.guest import L1, OTHER_ROOT, PAGE, USER, Guest, direct, entry, gva, word

X = gva(1)


def fingerprint(guest: Guest) -> bytes:
    checker = Checker()
    assert checker.feed_all(guest.events) is None
    return checker.fingerprint()


def base() -> Guest:
    return direct(Guest(2)).device((word(L1, 1), entry(0x100)))


def changed() -> Guest:
    return base().store(word(L1, 1), entry(0x200))


def test_positions_in_the_stream_and_numbers_of_operations_do_not_matter() -> None:
    guest = base().add(InputConsumed(7), OperationStarted(3, -1, "host.age"), OperationEnded(3))
    guest.store(word(L1, 1), entry(0x200))
    assert fingerprint(guest) == fingerprint(changed())


def test_serial_numbers_of_shadow_pages_count_by_their_order() -> None:
    def made(*serials: int) -> bytes:
        guest = base().add(LockTaken(1))
        guest.add(*(ShadowPageCreated(sp, gfn, 1, False, 0) for gfn, sp in enumerate(serials, 0x50)))
        return fingerprint(guest.add(LockReleased(1)))

    assert made(1, 2) == made(4, 9)
    assert made(1, 2) != made(1, 2, 3)


def test_the_order_of_independent_stores_before_everybodys_invalidation_does_not_matter() -> None:
    def after(*words: int) -> bytes:
        guest = base()
        for address in words:
            guest.store(address, entry(0x300, PAGE))
        return fingerprint(guest.toggle_pge(0).toggle_pge(1))

    assert after(word(L1, 2), word(L1, 3)) == after(word(L1, 3), word(L1, 2))


@pytest.mark.parametrize(
    "other",
    [
        base(),
        changed().store(word(L1, 1), entry(0x300)),
        changed().invlpg(X),
        changed().invlpg(X, vcpu=1),
        changed().write_cr3(0, OTHER_ROOT << 12),
        changed().exit(0, "page_fault", X, 4),
        changed().access(X, 0x100, USER).add(FrameRevoked(0x500, 0x900)),
        changed().store(0x9000, 5),
        changed().add(LockTaken(1), ShadowPageCreated(1, 0x50, 1, False, 0)),
        changed().add(SlotSettled(0, 0, 1 << 12, True)),
        changed().add(SlotSettled(0, 0, 1 << 12, True), DirtyLogStarted(0)),
        changed().add(LockedRead(0, 0x9000, 8, 0)),
    ],
)
def test_what_future_verdicts_depend_on_does(other: Guest) -> None:
    assert fingerprint(other) != fingerprint(changed())


def test_a_frame_that_came_back_is_as_if_it_had_never_gone() -> None:
    guest = changed().add(FrameRevoked(0x500, 0x900), FrameBacked(0x500, 0x900))
    assert fingerprint(guest) == fingerprint(changed())


def test_asking_changes_nothing() -> None:
    checker = Checker()
    checker.feed_all(changed().events)
    assert checker.fingerprint() == checker.fingerprint()
