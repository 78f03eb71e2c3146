"""Rules 5, 8 and 9 by small streams."""

from __future__ import annotations

import pytest

from shadowmmu.checker import Checker, Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    DeviceStored,
    DirtyLogRead,
    DirtyLogStarted,
    EmulatedLoad,
    EmulatedStore,
    Entered,
    Event,
    Exited,
    FrameBacked,
    FrameRevoked,
    GpteUpdate,
    InputConsumed,
    LockedRead,
    MmioAccess,
    NoProgress,
    OperationEnded,
    OperationStarted,
    ShadowPageZapped,
    SlotSettled,
    SlotsPublished,
)

LOAD, STORE, LOCKED = 0, 1, 17
SLOTS = SlotsPublished([(0, 0, 64, False), (1, 100, 8, False)])


def check(*events: Event) -> Violation | None:
    return Checker().feed_all(events)


def broken(*events: Event) -> Rule | None:
    violation = check(*events)
    return None if violation is None else violation.rule


def item(kind: int, gpa: int, value: int, size: int = 8) -> tuple[int, int, int, int, int, int]:
    return kind, 0x7000_0000 | gpa, gpa >> 12, (gpa >> 12) + 0x100000, size, value


def load(gpa: int, value: int, size: int = 8, vcpu: int = 0) -> Accesses:
    return Accesses(vcpu, 1, [item(LOAD, gpa, value, size)])


def store(gpa: int, value: int = 1, size: int = 8, vcpu: int = 0) -> Accesses:
    return Accesses(vcpu, 1, [item(STORE, gpa, value, size)])


class TestLostStore:
    def test_memory_begins_with_zeros(self) -> None:
        assert broken(SLOTS, load(0x2000, 0)) is None
        assert broken(SLOTS, load(0x2000, 5)) is Rule.LOST_STORE

    def test_outside_of_the_slots_that_are_known_the_first_load_says_what_is_there(self) -> None:
        assert broken(load(0x2000, 5), load(0x2000, 5)) is None
        assert broken(load(0x2000, 5), load(0x2000, 6)) is Rule.LOST_STORE

    def test_a_load_returns_the_last_store_whoever_made_it(self) -> None:
        for last in (
            store(0x2000, 7, vcpu=1),
            EmulatedStore(1, 0x2000, 8, 7),
            DeviceStored([(0x1FF8, 1), (0x2000, 7)]),
        ):
            assert broken(SLOTS, store(0x2000, 5), last, load(0x2000, 7)) is None
            assert broken(SLOTS, store(0x2000, 5), last, load(0x2000, 5)) is Rule.LOST_STORE

    def test_within_an_event_too(self) -> None:
        items = [item(STORE, 0x2000, 5), item(LOAD, 0x2000, 5), item(STORE, 0x2000, 6), item(LOAD, 0x2000, 5)]
        assert broken(SLOTS, Accesses(0, 1, items[:3])) is None
        violation = check(SLOTS, Accesses(0, 1, items))
        assert violation is not None
        assert "returned 0x5, but memory holds 0x6" in violation.text

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_small_stores_change_their_bytes_only(self, size: int) -> None:
        mask = (1 << 8 * size) - 1
        after = 0x1122334455667788 & ~(mask << 8 * size) | (0xAABBCCDD & mask) << 8 * size
        events: list[Event] = [
            SLOTS,
            store(0x2000, 0x1122334455667788),
            store(0x2000 + size, 0xAABBCCDD & mask, size),
        ]
        assert broken(*events, load(0x2000, after), load(0x2000 + size, 0xAABBCCDD & mask, size)) is None
        assert broken(*events, load(0x2000, 0x1122334455667788)) is Rule.LOST_STORE

    def test_an_access_may_cross_a_word(self) -> None:
        events: list[Event] = [SLOTS, store(0x2004, 0x1122334455667788)]
        assert (
            broken(
                *events, load(0x2000, 0x55667788 << 32), load(0x2008, 0x11223344), load(0x2006, 0x33445566, 4)
            )
            is None
        )
        assert broken(*events, load(0x2006, 0x33445567, 4)) is Rule.LOST_STORE

    def test_contents_stay_when_the_host_takes_the_frame_and_gives_another(self) -> None:
        events: list[Event] = [SLOTS, store(0x2000, 5), FrameRevoked(2, 0x100002), FrameBacked(2, 0x400000)]
        again = (LOAD, 0x2000, 2, 0x400000, 8)
        assert broken(*events, Accesses(0, 1, [(*again, 5)])) is None
        assert broken(*events, Accesses(0, 1, [(*again, 0)])) is Rule.LOST_STORE

    def test_contents_go_with_a_slot_that_moves_and_end_with_one_that_goes(self) -> None:
        events: list[Event] = [SLOTS, store(0x64000, 5)]
        moved = SlotsPublished([(0, 0, 64, False), (1, 200, 8, False)])
        assert broken(*events, moved, load(0xC8000, 5)) is None
        assert broken(*events, moved, load(0xC8000, 0)) is Rule.LOST_STORE
        gone = SlotsPublished([(0, 0, 64, False)])
        assert broken(*events, gone, SLOTS, load(0x64000, 0)) is None
        assert broken(*events, gone, SLOTS, load(0x64000, 5)) is Rule.LOST_STORE

    def test_an_emulated_load_counts(self) -> None:
        assert broken(SLOTS, store(0x2000, 5), EmulatedLoad(0, 0x2000, 4, 5)) is None
        assert broken(SLOTS, store(0x2000, 5), EmulatedLoad(0, 0x2000, 4, 0)) is Rule.LOST_STORE

    def test_a_locked_operation_reads_what_is_there(self) -> None:
        assert broken(SLOTS, store(0x2000, 5), LockedRead(0, 0x2000, 8, 5)) is None
        assert broken(SLOTS, store(0x2000, 5), LockedRead(0, 0x2000, 8, 4)) is Rule.LOST_STORE

    def test_nothing_comes_between_the_halves_of_a_locked_operation(self) -> None:
        locked = Accesses(0, 1, [item(LOCKED, 0x2000, 1)])
        for second in (locked, EmulatedStore(0, 0x2000, 8, 1)):
            assert broken(SLOTS, LockedRead(0, 0x2000, 8, 0), second) is None
            assert (
                broken(SLOTS, LockedRead(0, 0x2000, 8, 0), store(0x2000, 9, vcpu=1), second)
                is Rule.LOST_STORE
            )
            assert broken(SLOTS, LockedRead(0, 0x2000, 8, 0), store(0x3000, 9, vcpu=1), second) is None

    def test_setting_accessed_and_dirty_changes_nothing_else(self) -> None:
        events: list[Event] = [SLOTS, store(0x2000, 0x5007)]
        assert broken(*events, GpteUpdate(0, 0x2000, 8, 0x5027)) is None
        assert (
            broken(*events, store(0x2000, 0x6007, vcpu=1), GpteUpdate(0, 0x2000, 8, 0x5027))
            is Rule.LOST_STORE
        )

    def exit(self) -> list[Event]:
        return [Entered(0, 1, False, 1), Exited(0, 1, "page_fault", 0, 0)]

    def test_an_access_to_memory_is_none_to_a_device(self) -> None:
        assert broken(SLOTS, *self.exit(), MmioAccess(0, 0x50000, 8, True)) is None
        violation = check(SLOTS, *self.exit(), MmioAccess(0, 0x2000, 8, True))
        assert violation is not None
        assert violation.rule is Rule.LOST_STORE
        assert "a store of vCPU 0" in violation.text

    def test_memory_that_comes_is_there_once_the_call_has_returned(self) -> None:
        first = SlotsPublished([(0, 0, 64, False)])
        settled = SlotSettled(1, 100, 8, False)
        access = MmioAccess(0, 0x64000, 8, False)
        assert broken(first, SLOTS, *self.exit(), access) is None
        assert broken(first, SLOTS, *self.exit(), settled, access) is None
        assert broken(first, SLOTS, settled, *self.exit(), access) is Rule.LOST_STORE
        assert broken(first, SLOTS, settled, *self.exit(), first, access) is None


class TestLostDirtyPage:
    ON: tuple[Event, Event] = (SLOTS, SlotSettled(0, 0, 64, True))

    def test_what_is_stored_between_two_calls_is_in_the_answer_of_the_second(self) -> None:
        for stored in (store(0x2000), EmulatedStore(0, 0x2000, 8, 1), GpteUpdate(0, 0x2000, 8, 0x20)):
            assert broken(*self.ON, stored, DirtyLogStarted(0), DirtyLogRead(0, [2, 7])) is None
            assert broken(*self.ON, stored, DirtyLogStarted(0), DirtyLogRead(0, [7])) is Rule.LOST_DIRTY_PAGE

    def test_what_a_device_stores_is_not(self) -> None:
        assert broken(*self.ON, DeviceStored([(0x2000, 1)]), DirtyLogStarted(0), DirtyLogRead(0, [])) is None

    def test_a_store_before_logging_was_switched_on_is_not(self) -> None:
        assert broken(SLOTS, store(0x2000), self.ON[1], DirtyLogStarted(0), DirtyLogRead(0, [])) is None

    def test_a_store_during_a_call_is_in_its_answer_or_in_the_next(self) -> None:
        call: list[Event] = [*self.ON, DirtyLogStarted(0), store(0x2000)]
        assert broken(*call, DirtyLogRead(0, [2]), DirtyLogStarted(0), DirtyLogRead(0, [])) is None
        assert broken(*call, DirtyLogRead(0, []), DirtyLogStarted(0), DirtyLogRead(0, [2])) is None
        violation = check(*call, DirtyLogRead(0, []), DirtyLogStarted(0), DirtyLogRead(0, []))
        assert violation is not None
        assert violation.rule is Rule.LOST_DIRTY_PAGE
        assert "lacks guest frames 0x2," in violation.text

    def test_other_slots_are_not_asked_about(self) -> None:
        assert broken(*self.ON, store(0x64000), DirtyLogStarted(0), DirtyLogRead(0, [])) is None

    @pytest.mark.parametrize(
        "between",
        [
            [SlotSettled(0, 0, 64, False), SlotSettled(0, 0, 64, True)],
            [SlotsPublished([(0, 0, 64, True), (1, 100, 8, False)]), SLOTS, SlotSettled(0, 0, 64, True)],
            [SlotsPublished([(0, 8, 64, False)]), SlotSettled(0, 8, 64, True)],
        ],
    )
    def test_a_slot_that_is_logged_no_more_goes_or_moves_is_forgotten(self, between: list[Event]) -> None:
        assert broken(*self.ON, store(0x2000), *between, DirtyLogStarted(0), DirtyLogRead(0, [])) is None

    def test_switching_logging_on_again_forgets_nothing(self) -> None:
        events: list[Event] = [*self.ON, store(0x2000), self.ON[1], DirtyLogStarted(0), DirtyLogRead(0, [])]
        assert broken(*events) is Rule.LOST_DIRTY_PAGE


FAULT = Exited(0, 1, "page_fault", 0x5000, 4)


class TestNoProgress:
    def test_a_run_that_is_stuck(self) -> None:
        violation = check(NoProgress(["operation 7 (host.unmap, the host) at HOST_PAGE_LOCK"]))
        assert violation is not None
        assert violation.rule is Rule.NO_PROGRESS
        assert "operation 7" in violation.text

    def test_an_access_that_faults_for_ever_while_nothing_happens(self) -> None:
        assert broken(*[FAULT] * 16) is None
        assert broken(*[FAULT] * 17) is Rule.NO_PROGRESS

    def test_interrupts_and_entries_are_no_progress(self) -> None:
        again: list[Event] = [
            FAULT,
            InputConsumed(1),
            Entered(0, 2, False, 1),
            Exited(0, 2, "external_interrupt", -1, 0),
        ]
        assert broken(*again * 17) is Rule.NO_PROGRESS

    @pytest.mark.parametrize(
        "between",
        [
            store(0x2000, vcpu=1),
            EmulatedStore(1, 0x2000, 8, 1),
            DeviceStored([(0x2000, 1)]),
            ShadowPageZapped(1, 2, False),
            FrameRevoked(2, 3),
            OperationStarted(5, -1, "host.unmap"),
            Exited(0, 2, "page_fault", 0x6000, 4),
            Exited(0, 2, "page_fault", 0x5000, 6),
            load(0x2000, 1),
            Exited(0, 2, "invlpg", 0x5000, 0),
        ],
        ids=lambda event: type(event).__name__,
    )
    def test_what_may_explain_it_or_gets_the_vcpu_further(self, between: Event) -> None:
        assert broken(*[*[FAULT] * 10, between] * 4) is None

    def test_while_the_host_is_at_work_faults_are_to_be_tried_again(self) -> None:
        begun: list[Event] = [FAULT, OperationStarted(5, -1, "host.unmap_range")]
        assert broken(*begun, *[FAULT] * 200) is None
        assert broken(*begun, *[FAULT] * 200, OperationEnded(5), *[FAULT] * 16) is None
        assert broken(*begun, *[FAULT] * 200, OperationEnded(5), *[FAULT] * 17) is Rule.NO_PROGRESS

    def test_the_work_of_others_explains_only_so_much(self) -> None:
        again: list[Event] = [FAULT, store(0x2000, vcpu=1)]
        assert broken(*again * 1000) is None
        assert broken(*again * 1001) is Rule.NO_PROGRESS
