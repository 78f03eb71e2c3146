"""Each rule by small event sequences."""

from collections.abc import Iterable

import pytest

from shadowmmu.checker import Checker, Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    AccessFlag,
    AuditFailed,
    EmulatedStore,
    Event,
    FlushAnswered,
    FlushRequested,
    FrameBacked,
    FrameRevoked,
    InputConsumed,
    Invalidated,
    InvalidationCause,
    LockReleased,
    LockTaken,
    OperationEnded,
    OperationStarted,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
    TlbsDirtyRaised,
)

LOAD = 0
STORE = int(AccessFlag.WRITE)


def check(events: Iterable[Event]) -> Violation | None:
    return Checker().feed_all(events)


def access(gfn: int, pfn: int, flags: int = LOAD, vcpu: int = 0) -> Accesses:
    return Accesses(vcpu=vcpu, entry=1, items=[(flags, 0x7000, gfn, pfn, 8, 5)])


def store(gfn: int) -> Accesses:
    return access(gfn, gfn + 100, STORE)


def table(sp: int, gfn: int, direct: bool = False, level: int = 1) -> ShadowPageCreated:
    return ShadowPageCreated(sp=sp, gfn=gfn, level=level, direct=direct, role=0)


def unsync(sp: int, gfn: int) -> ShadowPageUnsynced:
    return ShadowPageUnsynced(sp=sp, gfn=gfn)


def sync(sp: int, gfn: int) -> ShadowPageSynced:
    return ShadowPageSynced(sp=sp, gfn=gfn)


def zap(sp: int, gfn: int, in_use: bool = False) -> ShadowPageZapped:
    return ShadowPageZapped(sp=sp, gfn=gfn, in_use=in_use)


LOCK = LockTaken(op=1)
UNLOCK = LockReleased(op=1)


class TestHostFrameUse:
    @pytest.mark.parametrize(
        "flags", [LOAD, STORE, AccessFlag.FETCH, AccessFlag.USED, AccessFlag.LOCKED | AccessFlag.WRITE]
    )
    def test_any_kind_of_access_to_a_revoked_frame_is_a_violation(self, flags: int) -> None:
        violation = check([FrameRevoked(gfn=3, pfn=103), access(3, 103, int(flags))])
        assert violation is not None
        assert violation.rule is Rule.HOST_FRAME_USE_AFTER_REVOKE

    def test_a_frame_that_nobody_revoked_is_fine(self) -> None:
        assert check([FrameRevoked(gfn=3, pfn=103), access(4, 104), access(4, 104)]) is None

    def test_an_access_before_the_revocation_is_fine_and_one_after_it_is_not(self) -> None:
        assert check([access(3, 103), FrameRevoked(gfn=3, pfn=103)]) is None
        assert check([access(3, 103), FrameRevoked(gfn=3, pfn=103), access(3, 103)]) is not None

    def test_a_frame_is_fine_again_once_it_is_backed(self) -> None:
        assert check([FrameRevoked(gfn=3, pfn=103), FrameBacked(gfn=3, pfn=103), access(3, 103)]) is None

    def test_backing_the_guest_frame_by_another_host_frame_does_not_bring_the_old_one_back(self) -> None:
        events: list[Event] = [FrameRevoked(gfn=3, pfn=103), FrameBacked(gfn=3, pfn=200)]
        assert check([*events, access(3, 200)]) is None
        assert check([*events, access(-1, 103)]) is not None

    def test_the_violation_names_the_access_the_revocation_and_the_journal_record(self) -> None:
        violation = check(
            [
                OperationStarted(op=9, vcpu=-1, name="kvm_mmu_notifier_invalidate_page"),
                InputConsumed(record=41),
                FrameRevoked(gfn=3, pfn=103),
                OperationEnded(op=9),
                InputConsumed(record=42),
                Accesses(vcpu=1, entry=6, items=[(0, 0x1000, 4, 104, 8, 0), (1, 0x2008, 3, 103, 4, 7)]),
            ]
        )
        assert violation is not None
        assert violation.journal_record == 42
        assert violation.event_index == 5
        assert violation.vcpu == 1
        assert violation.access is not None
        assert (violation.access.gva, violation.access.entry, violation.access.size) == (0x2008, 6, 4)
        assert [related.index for related in violation.related] == [2]
        assert violation.related[0].event == FrameRevoked(gfn=3, pfn=103)
        assert "kvm_mmu_notifier_invalidate_page" in violation.blame
        assert "host frame use after revoke" in str(violation)
        assert "journal record 42" in str(violation)

    def test_a_revocation_whose_story_was_forgotten_is_still_a_violation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shadowmmu.checker.host_frames.STORIES_LIMIT", 2)
        violation = check([*(FrameRevoked(gfn=n, pfn=n) for n in range(5)), access(0, 0)])
        assert violation is not None
        assert violation.related == ()
        assert "long ago" in violation.text

    def test_forgetting_which_frames_are_fine_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shadowmmu.checker.host_frames.FINE_LIMIT", 1)
        events: list[Event] = [access(n, n) for n in range(5)]
        assert check(events) is None
        assert check([FrameRevoked(gfn=4, pfn=4), *events]) is not None


class TestWriteProtection:
    def test_a_store_to_a_table_in_sync_is_a_violation_once_the_lock_is_released(self) -> None:
        events: list[Event] = [LOCK, table(1, 5), UNLOCK, store(5)]
        violation = check(events)
        assert violation is not None
        assert violation.rule is Rule.WRITE_PROTECTION_BREACH
        assert violation.event_index == 3

    def test_a_load_of_a_table_in_sync_is_fine(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, access(5, 105)]) is None

    def test_an_emulated_store_is_fine(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, EmulatedStore(vcpu=0, gpa=5 << 12, size=8, value=1)]) is None

    def test_a_store_before_the_release_is_fine(self) -> None:
        assert check([LOCK, table(1, 5), store(5), UNLOCK]) is None

    def test_a_store_after_the_release_in_the_middle_of_an_operation_is_not(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, LOCK, store(5)]) is not None

    def test_upper_level_tables_count(self) -> None:
        assert check([LOCK, table(1, 5, level=4), UNLOCK, store(5)]) is not None

    def test_direct_pages_do_not(self) -> None:
        assert check([LOCK, table(1, 5, direct=True), UNLOCK, store(5), zap(1, 5), store(5)]) is None

    def test_a_table_out_of_sync_may_be_stored_to_at_once(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, LOCK, unsync(1, 5), store(5), UNLOCK, store(5)]) is None

    def test_a_zapped_table_may_be_stored_to_at_once(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, LOCK, zap(1, 5), store(5), UNLOCK, store(5)]) is None

    def test_synchronised_again_it_is_protected_from_the_next_release(self) -> None:
        events: list[Event] = [LOCK, table(1, 5), unsync(1, 5), UNLOCK, LOCK, sync(1, 5)]
        assert check([*events, store(5)]) is None
        assert check([*events, UNLOCK, store(5)]) is not None

    def test_synchronised_and_zapped_in_one_region(self) -> None:
        events: list[Event] = [
            LOCK,
            table(1, 5),
            unsync(1, 5),
            UNLOCK,
            LOCK,
            sync(1, 5),
            zap(1, 5),
            UNLOCK,
            store(5),
        ]
        assert check(events) is None

    def test_zapped_while_unsync_the_kernel_reports_it_synced_after_it_is_zapped(self) -> None:
        events: list[Event] = [
            LOCK,
            table(1, 5),
            unsync(1, 5),
            UNLOCK,
            LOCK,
            zap(1, 5),
            sync(1, 5),
            UNLOCK,
            store(5),
        ]
        assert check(events) is None

    def test_unsynced_and_synchronised_again_in_one_region_counts_from_its_release(self) -> None:
        events: list[Event] = [LOCK, table(1, 5), UNLOCK, LOCK, unsync(1, 5), sync(1, 5)]
        assert check([*events, store(5)]) is None
        assert check([*events, UNLOCK, store(5)]) is not None

    def test_any_page_in_sync_protects_the_frame(self) -> None:
        events: list[Event] = [LOCK, table(1, 5), table(2, 5), UNLOCK, LOCK, unsync(1, 5)]
        assert check([*events, store(5)]) is not None
        assert check([*events, unsync(2, 5), store(5)]) is None

    def test_a_second_page_does_not_put_the_protection_off(self) -> None:
        assert check([LOCK, table(1, 5), UNLOCK, LOCK, table(2, 5), store(5)]) is not None
        assert check([LOCK, table(1, 5), UNLOCK, LOCK, table(2, 5), zap(1, 5), store(5)]) is not None

    def test_a_page_made_while_another_is_unsync_protects_from_the_release(self) -> None:
        events: list[Event] = [LOCK, table(1, 5), unsync(1, 5), UNLOCK, LOCK, table(2, 5)]
        assert check([*events, store(5)]) is None
        assert check([*events, UNLOCK, store(5)]) is not None

    def test_a_root_in_use_may_be_zapped_twice(self) -> None:
        events: list[Event] = [
            LOCK,
            table(1, 5, level=4),
            UNLOCK,
            LOCK,
            zap(1, 5, in_use=True),
            table(2, 5, level=4),
            UNLOCK,
        ]
        assert check([*events, LOCK, zap(1, 5), UNLOCK, store(5)]) is not None

    def test_the_violation_says_what_protected_the_table_and_who_should_have_flushed(self) -> None:
        violation = check(
            [
                OperationStarted(op=7, vcpu=2, name="kvm_mmu_load"),
                LockTaken(op=7),
                FlushRequested(op=7, targets=[(0, 1), (1, 8)]),
                Invalidated(vcpu=0, gva=-1, cause=InvalidationCause.ENTRY_FLUSH),
                FlushAnswered(op=7),
                TlbsDirtyRaised(value=3),
                table(1, 5),
                LockReleased(op=7),
                OperationEnded(op=7),
                store(5),
            ]
        )
        assert violation is not None
        assert "operation 7 (kvm_mmu_load, for vCPU 2)" in violation.blame
        assert "tlbs_dirty is 3" in violation.blame
        assert [related.index for related in violation.related] == [2, 3, 4, 6, 7]
        assert isinstance(violation.related[3].event, ShadowPageCreated)
        assert isinstance(violation.related[4].event, LockReleased)


class TestStructure:
    def test_a_failed_audit_is_a_violation(self) -> None:
        violation = check(
            [InputConsumed(record=3), AuditFailed(check="audit_rmap", text="sp 4 has no parent")]
        )
        assert violation is not None
        assert violation.rule is Rule.BROKEN_STRUCTURE
        assert violation.access is None
        assert "audit_rmap: sp 4 has no parent" in str(violation)


class TestChecker:
    def test_it_counts_events_and_stops_at_the_first_violation(self) -> None:
        checker = Checker()
        failed = AuditFailed(check="a", text="")
        assert checker.feed_all([LOCK, UNLOCK, failed, LOCK]) is not None
        assert checker.events == 3

    def test_rules_have_numbers_and_names(self) -> None:
        assert [(rule.value, rule.title) for rule in Rule] == [
            (1, "stale translation"),
            (2, "unjustified fault"),
            (3, "host frame use after revoke"),
            (4, "write-protection breach"),
            (5, "lost dirty page"),
            (6, "lost accessed or dirty bit"),
            (7, "broken structure"),
            (8, "no progress"),
            (9, "lost store"),
        ]
