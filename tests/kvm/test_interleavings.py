"""Many operations at once, at every point: the fixed kernel keeps its promises, a broken one is caught.

What is asked: tables in sync are write-protected in every TLB, revoked frames are in none, the audit is clean. That the
shadow of a table in sync follows from the table, is asked in bugs/test_latent_interleavings.
"""

import pytest

from shadowmmu.kvm import SCHEDULING_POINTS, Kvm, MmuLock, Operation, Point
from tests.kvm.interleaver import Interleaver


def run_seeds(count: int) -> None:
    for seed in range(count):
        Interleaver(seed, "fixed").run(6000)


@pytest.mark.parametrize("seed", range(8))
def test_the_fixed_kernel_protects_tables_and_revoked_frames(seed: int) -> None:
    Interleaver(seed, "fixed").run(6000)


@pytest.mark.parametrize("seed", range(8))
def test_the_fixed_kernel_does_so_while_memory_slots_come_and_go(seed: int) -> None:
    Interleaver(seed, "fixed", memslots=True).run(6000)


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_with_bugs_in_its_memory_slots_goes_on(seed: int) -> None:
    for profile in ("linux-3.1", "linux-3.1-memslot-delete-flush"):
        Interleaver(seed, profile, checks=False, memslots=True).run_unaudited(6000)


def test_points_are_reached() -> None:
    seen: set[str] = set()
    for seed in range(6):
        interleaver = Interleaver(seed, "linux-3.1+gpa-base-change", checks=False, memslots=seed % 2 == 0)
        interleaver.run(8000)
        seen.update(interleaver.seen)
    not_of_this_guest = {
        Point.DIRECT_GFN_TO_PFN,
        Point.DIRECT_BEFORE_LOCK,
        Point.RESET_CONTEXT,
        Point.UNPROTECT_LOCK,
    }
    not_of_this_kernel = {p for p in Point if "(only with bug" in p.value or "(tso)" in p.value}
    missing = {point.name for point in SCHEDULING_POINTS - not_of_this_guest - not_of_this_kernel} - seen
    assert missing <= {
        "DIRTY_LOG_COPY",
        "NOTIFIER_UNLOCKED",
        "NOTIFIER_RANGE_UNLOCKED",
        "NOTIFIER_YOUNG_UNLOCKED",
    }


def test_protection_without_a_flush_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pages", "sync"):
        monkeypatch.setattr(
            f"shadowmmu.kvm.{module}.write_protect_needs_flush", lambda _kvm, _protected: False
        )
    with pytest.raises(AssertionError, match="a table in sync"):
        run_seeds(5)


def test_notifiers_without_a_flush_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlock_only(_kvm: Kvm, _need_flush: bool, _point: Point) -> Operation[None]:
        yield MmuLock.RELEASE

    monkeypatch.setattr("shadowmmu.kvm.notifiers._unlock_and_flush", unlock_only)
    with pytest.raises(AssertionError, match="can be used after it was revoked"):
        run_seeds(10)
