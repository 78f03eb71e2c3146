"""Rules 1, 2 and 6 by small streams: what TLB_RULES allows passes, what it does not is found."""

from __future__ import annotations

import pytest

from shadowmmu.checker import Checker, Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    Bypassed,
    EmulatedStore,
    GpteUpdate,
    IncarnationEnded,
    IncarnationStarted,
    Walked,
)
from tests.checker.guest import (
    CR0,
    CR4,
    DIRECT,
    EFER,
    FETCH,
    L1,
    L2,
    NX,
    OTHER_L1,
    OTHER_ROOT,
    PAGE,
    PS,
    TABLE,
    USER,
    WRITE,
    A,
    D,
    G,
    Guest,
    P,
    U,
    W,
    direct,
    entry,
    gva,
    word,
)

OLD, NEW = 0x100, 0x200
X = gva(1)


def check(guest: Guest) -> Violation | None:
    return Checker().feed_all(guest.events)


def broken(guest: Guest) -> Rule | None:
    violation = check(guest)
    return None if violation is None else violation.rule


def mapped(flags: int = PAGE, vcpus: int = 1) -> Guest:
    """X is mapped to OLD."""
    return direct(Guest(vcpus)).device((word(L1, 1), entry(OLD, flags)))


def changed(flags: int = PAGE, vcpus: int = 1) -> Guest:
    """X was mapped to OLD, is mapped to NEW, and nobody has invalidated it."""
    return mapped(flags, vcpus).store(word(L1, 1), entry(NEW, flags))


class TestStaleTranslation:
    def test_the_present_mapping_may_be_used(self) -> None:
        assert broken(mapped().access(X, OLD).access(X + 8, OLD, USER | WRITE, 7)) is None

    def test_a_frame_that_was_never_mapped_there_may_not(self) -> None:
        assert broken(mapped().access(X, NEW)) is Rule.STALE_TRANSLATION

    def test_before_its_own_invalidation_a_vcpu_may_use_old_and_new_in_any_order(self) -> None:
        guest = changed()
        for gfn in (OLD, NEW, OLD, OLD, NEW):
            guest.access(X, gfn)
        assert broken(guest) is None

    @pytest.mark.parametrize("used", [True, False])
    def test_invlpg_ends_the_old_mapping_whether_it_was_used_before_or_not(self, used: bool) -> None:
        guest = changed()
        if used:
            guest.access(X, OLD)
        guest.invlpg(X)
        assert broken(Guest.access(guest, X, NEW)) is None
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_invlpg_of_another_page_does_not(self) -> None:
        assert broken(changed().invlpg(gva(2)).access(X, OLD)) is None

    def test_invlpg_on_another_vcpu_does_not(self) -> None:
        guest = changed(vcpus=2).invlpg(X, vcpu=1)
        assert broken(guest.access(X, OLD, vcpu=0)) is None
        assert broken(guest.access(X, OLD, vcpu=1)) is Rule.STALE_TRANSLATION

    def test_a_value_that_was_there_between_two_changes_counts(self) -> None:
        guest = changed().store(word(L1, 1), 0)
        assert broken(guest.access(X, NEW).access(X, OLD)) is None

    def test_a_value_stored_while_invlpg_is_handled_counts_with_the_one_before(self) -> None:
        guest = mapped(vcpus=2).exit(0, "invlpg", X).store(word(L1, 1), entry(NEW), vcpu=1).enter(0)
        assert broken(guest.access(X, OLD).access(X, NEW)) is None

    def test_cr3_ends_mappings_that_are_not_global(self) -> None:
        assert broken(changed().write_cr3().access(X, OLD)) is Rule.STALE_TRANSLATION
        assert broken(changed(PAGE | G).write_cr3().access(X, OLD)) is None

    def test_a_change_of_cr4_pge_ends_global_ones_too(self) -> None:
        assert broken(changed(PAGE | G).toggle_pge().access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_invlpg_ends_global_ones_too(self) -> None:
        assert broken(changed(PAGE | G).write_cr3().invlpg(X).access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_a_global_page_of_another_root_stays_a_page_that_is_not_global_does_not(self) -> None:
        for flags, expected in ((PAGE | G, None), (PAGE, Rule.STALE_TRANSLATION)):
            guest = mapped(flags).write_cr3(cr3=OTHER_ROOT << 12)
            assert broken(guest.access(X, OLD)) is expected

    def test_what_was_changed_before_the_invalidation_is_gone_although_the_vcpu_never_saw_it(self) -> None:
        guest = (
            mapped(vcpus=2)
            .store(word(L1, 1), 0, vcpu=1)
            .invlpg(X, vcpu=0)
            .store(word(L1, 1), entry(NEW), vcpu=1)
        )
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_a_worker_that_attaches_anew_invalidates_nothing_that_the_guest_knows_of(self) -> None:
        guest = changed().add(IncarnationStarted(0, 2)).enter()
        assert broken(guest.access(X, OLD)) is None

    def test_an_emulated_store_changes_a_table_like_any_other(self) -> None:
        guest = mapped().add(EmulatedStore(0, word(L1, 1), 8, entry(NEW))).invlpg(X)
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_accesses_are_judged_at_their_place_in_an_event(self) -> None:
        guest = mapped()
        store = (WRITE, DIRECT | word(L1, 1), L1, 1, 8, entry(NEW))
        load = (USER, X, NEW, 2, 8, 0)
        assert broken(mapped().add(Accesses(0, 1, [store, load]))) is None
        assert broken(guest.add(Accesses(0, 1, [load, store]))) is Rule.STALE_TRANSLATION

    def test_the_violation_says_what_was_used_what_could_have_been_and_since_when(self) -> None:
        guest = changed().invlpg(X)
        stored, invalidated = len(guest.events) - 3, len(guest.events) - 2
        violation = check(guest.access(X, OLD, USER | WRITE))
        assert violation is not None and violation.access is not None
        assert (violation.access.gva, violation.access.gfn) == (X, OLD)
        assert f"event {invalidated}" in violation.text
        assert "guest frame 0x200 wux dirty" in violation.text
        assert f"from event {stored} until now" in violation.text
        assert {stored, invalidated} <= {related.index for related in violation.related}
        assert f"table at guest frame {L1:#x} is out of sync" in violation.blame


class TestPagingStructureCaches:
    def upper(self) -> Guest:
        """X was mapped through L1, and now is through OTHER_L1, where it leads to NEW."""
        guest = mapped().device((word(OTHER_L1, 1), entry(NEW)))
        return guest.store(word(L2, 0), entry(OTHER_L1, TABLE))

    def test_an_old_upper_entry_may_meet_a_new_lower_one(self) -> None:
        later = 0x300
        guest = self.upper().store(word(L1, 1), entry(later))
        assert broken(guest.access(X, later)) is None

    def test_but_not_after_invlpg_of_whatever_page(self) -> None:
        later = 0x300
        guest = self.upper().invlpg(gva(7)).store(word(L1, 1), entry(later))
        assert broken(guest.access(X, later)) is Rule.STALE_TRANSLATION

    def test_a_tlb_entry_outlives_invlpg_of_another_page(self) -> None:
        assert broken(self.upper().invlpg(gva(7)).access(X, OLD)) is None

    def test_a_new_upper_entry_never_meets_a_lower_one_from_before(self) -> None:
        guest = mapped().device((word(OTHER_L1, 1), entry(0x300)), (word(OTHER_L1, 1), entry(NEW)))
        guest.store(word(L2, 0), entry(OTHER_L1, TABLE))
        assert broken(guest.access(X, 0x300)) is Rule.STALE_TRANSLATION

    def test_rights_are_those_of_all_levels(self) -> None:
        guest = mapped().store(word(L2, 0), entry(L1, P | U | A)).invlpg(X)
        assert broken(guest.access(X, OLD)) is None
        assert broken(guest.access(X, OLD, USER | WRITE)) is Rule.STALE_TRANSLATION

    def test_rights_of_an_old_upper_entry_count_until_invalidated(self) -> None:
        guest = mapped().store(word(L2, 0), entry(L1, P | U | A))
        assert broken(guest.access(X, OLD, USER | WRITE)) is None


class TestRights:
    @pytest.mark.parametrize(
        "flags, kind, allowed",
        [
            (P | U | A | D, USER, True),
            (P | U | A | D, USER | WRITE, False),
            (P | U | A | D, WRITE, False),
            (P | W | A | D, WRITE, True),
            (P | W | A | D, USER, False),
            (PAGE | NX, USER | FETCH, False),
            (PAGE | NX, USER, True),
            (PAGE, USER | FETCH, True),
        ],
    )
    def test_an_access_needs_its_rights(self, flags: int, kind: int, allowed: bool) -> None:
        assert broken(mapped(flags).access(X, OLD, kind)) is (None if allowed else Rule.STALE_TRANSLATION)

    def test_without_wp_the_kernel_may_write_what_is_read_only(self) -> None:
        guest = mapped(P | U | A | D).registers(0, "cr0", cr0=CR0 & ~0x10000)
        assert broken(guest.access(X, OLD, WRITE)) is None
        assert broken(guest.access(X, OLD, WRITE | USER)) is Rule.STALE_TRANSLATION

    def test_with_smep_the_kernel_may_not_fetch_what_users_may_read(self) -> None:
        guest = mapped()
        assert broken(guest.access(X, OLD, FETCH)) is None
        guest = mapped().registers(0, "cr4", cr4=CR4 | 1 << 20)
        assert broken(guest.access(X, OLD, FETCH)) is Rule.STALE_TRANSLATION

    def test_reserved_bits_make_an_entry_useless(self) -> None:
        assert broken(mapped(PAGE | 1 << 40).access(X, OLD)) is Rule.STALE_TRANSLATION
        guest = mapped(PAGE | NX)
        guest.registers(0, "efer", efer=EFER & ~0x800).registers(0, "cr3", efer=EFER & ~0x800)
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_a_narrowed_right_may_be_used_until_it_is_invalidated(self) -> None:
        guest = mapped().store(word(L1, 1), entry(OLD, P | U | A | D))
        assert broken(guest.access(X, OLD, USER | WRITE)) is None
        assert broken(guest.invlpg(X).access(X, OLD, USER | WRITE)) is Rule.STALE_TRANSLATION


class TestAccessedAndDirty:
    def test_a_page_whose_accessed_bit_is_clear_is_not_used(self) -> None:
        assert broken(mapped(P | W | U).access(X, OLD)) is Rule.LOST_ACCESSED_DIRTY

    def test_an_upper_entry_needs_it_too(self) -> None:
        guest = mapped().store(word(L2, 0), entry(L1, P | W | U)).invlpg(X)
        assert broken(guest.access(X, OLD)) is Rule.LOST_ACCESSED_DIRTY

    def test_a_page_whose_dirty_bit_is_clear_is_not_written(self) -> None:
        guest = mapped(P | W | U | A)
        assert broken(guest.access(X, OLD)) is None
        assert broken(guest.access(X, OLD, USER | WRITE)) is Rule.LOST_ACCESSED_DIRTY

    def test_kvm_sets_the_bits_in_the_guests_entry(self) -> None:
        guest = mapped(P | W | U).add(GpteUpdate(0, word(L1, 1), 8, entry(OLD, P | W | U | A | D)))
        assert broken(guest.access(X, OLD, USER | WRITE)) is None

    def test_bits_that_software_clears_need_not_be_set_again_before_it_invalidates(self) -> None:
        guest = mapped().store(word(L1, 1), entry(OLD, P | W | U))
        assert broken(guest.access(X, OLD, USER | WRITE)) is None
        assert broken(guest.invlpg(X).access(X, OLD)) is Rule.LOST_ACCESSED_DIRTY


class TestLargePages:
    def large(self) -> Guest:
        return direct(Guest()).device((word(L2, 0), entry(0x400, PAGE | PS)))

    def test_every_page_of_it_is_mapped(self) -> None:
        assert broken(self.large().access(gva(5), 0x405)) is None
        assert broken(self.large().access(gva(5), 0x406)) is Rule.STALE_TRANSLATION

    def test_large_and_small_translations_may_both_be_used_until_invalidated(self) -> None:
        guest = self.large().device((word(L1, 5), entry(NEW))).store(word(L2, 0), entry(L1, TABLE))
        assert broken(guest.access(gva(5), NEW).access(gva(5), 0x405)) is None
        assert broken(guest.invlpg(gva(5)).access(gva(5), 0x405)) is Rule.STALE_TRANSLATION

    def test_reserved_address_bits_of_a_large_entry(self) -> None:
        guest = direct(Guest()).device((word(L2, 0), entry(0x402, PAGE | PS)))
        assert broken(guest.access(gva(5), 0x405)) is Rule.STALE_TRANSLATION


class TestOtherModes:
    def pae(self, pdptes: tuple[int, int, int, int]) -> Guest:
        guest = Guest().device((word(L2, 0), entry(L1)), (word(L1, 1), entry(OLD)))
        return guest.device((word(0x40, 0), entry(L2, P))).registers(
            0, "", cr3=0x40 << 12, cr4=0x20, efer=0x800, pdptes=pdptes
        )

    def test_pae_walks_from_the_pdptes_that_were_loaded(self) -> None:
        loaded = (entry(L2, P), 0, 0, 0)
        assert broken(self.pae(loaded).access(X, OLD)) is None
        assert broken(self.pae((0, 0, 0, 0)).access(0x4000_1000, OLD)) is Rule.STALE_TRANSLATION

    def test_pdptes_in_memory_have_no_effect_on_those_loaded(self) -> None:
        guest = self.pae((entry(L2, P), 0, 0, 0)).device((word(0x40, 0), 0))
        assert broken(guest.access(X, OLD)) is None

    def two_level(self, directory: int, cr4: int = 0x10) -> Guest:
        """32-bit paging: the directory's entry 1 is `directory`; entry 3 of table L1 maps OLD."""
        guest = Guest().device((word(0x40, 0), directory << 32), (word(L1, 1), entry(OLD) << 32))
        return guest.registers(0, "", cr3=0x40 << 12, cr4=cr4, efer=0)

    def test_two_level_entries_have_four_bytes(self) -> None:
        address = 1 << 22 | 3 << 12
        assert broken(self.two_level(entry(L1)).access(address, OLD)) is None
        assert broken(self.two_level(entry(L1)).access(address, NEW)) is Rule.STALE_TRANSLATION
        assert broken(self.two_level(entry(L1)).access(1 << 22 | 2 << 12, OLD)) is Rule.STALE_TRANSLATION

    def test_a_store_to_one_half_of_a_word_changes_one_entry(self) -> None:
        guest = (
            self.two_level(entry(L1)).device((word(0x41, 0), 0)).add(EmulatedStore(0, word(L1, 1), 4, 0x5000))
        )
        address = 1 << 22 | 3 << 12
        assert broken(guest.invlpg(address).access(address, OLD)) is None
        guest.add(EmulatedStore(0, word(L1, 1) + 4, 4, 0)).invlpg(address)
        assert broken(guest.access(address, OLD)) is Rule.STALE_TRANSLATION

    def test_large_pages_of_four_mebibytes_need_pse(self) -> None:
        address = 1 << 22 | 3 << 12
        assert broken(self.two_level(entry(0x400, PAGE | PS)).access(address, 0x403)) is None
        guest = self.two_level(entry(0x400, PAGE | PS), cr4=0)
        assert broken(guest.access(address, 0x403)) is Rule.STALE_TRANSLATION

    def test_pse_36_gives_a_large_page_four_more_address_bits(self) -> None:
        address = 1 << 22 | 3 << 12
        guest = self.two_level(entry(0x400, PAGE | PS) | 1 << 13)
        assert broken(guest.access(address, (1 << 20) + 0x403)) is None

    def test_a_large_page_that_was_read_as_one_stays_when_pse_is_cleared_without_an_invalidation(
        self,
    ) -> None:
        address = 1 << 22 | 3 << 12
        guest = self.two_level(entry(0x400, PAGE | PS)).registers(0, "cr4", cr3=0x40 << 12, cr4=0, efer=0)
        assert broken(guest.access(address, 0x403)) is None
        guest.registers(0, "cr3", cr3=0x40 << 12, cr4=0, efer=0)
        assert broken(guest.access(address, 0x403)) is Rule.STALE_TRANSLATION

    def test_with_paging_off_addresses_are_frames(self) -> None:
        guest = Guest().registers(0, "", cr0=1, cr3=0, cr4=0, efer=0)
        assert broken(guest.access(0x7000, 7, WRITE)) is None
        assert broken(guest.access(0x7000, 8)) is Rule.STALE_TRANSLATION

    def test_switching_paging_on_and_off_invalidates_everything(self) -> None:
        guest = changed(PAGE | G).registers(0, "cr0", cr0=1, efer=0xC00 - 0x400)
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION
        guest = changed(PAGE | G).registers(0, "cr0", cr0=1).registers(0, "cr0")
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_in_a_second_dimension_the_guests_tables_do_not_matter(self) -> None:
        guest = Guest().registers(0, "", tdp=True)
        assert broken(guest.access(0x7000, 7)) is None

    def test_a_vcpu_whose_registers_are_not_known_is_not_judged(self) -> None:
        guest = Guest()
        assert Checker().feed_all([*guest.events[:2], *Guest().access(X, NEW).events[-1:]]) is None


class TestUnjustifiedFault:
    def test_a_fault_on_an_entry_that_is_not_present(self) -> None:
        assert broken(direct(Guest()).fault(X, USER)) is None

    def test_a_not_present_fault_on_a_present_entry_is_none_of_the_guests(self) -> None:
        violation = check(mapped().fault(X, 4))
        assert violation is not None
        assert violation.rule is Rule.UNJUSTIFIED_FAULT
        assert "guest frame 0x100 wux dirty" in violation.text

    def test_not_present_entries_are_not_cached_so_that_one_of_before_the_exit_does_not_count(self) -> None:
        guest = direct(Guest()).store(word(L1, 1), entry(OLD))
        assert broken(guest.fault(X, 4)) is Rule.UNJUSTIFIED_FAULT

    def test_one_that_was_there_during_the_access_does(self) -> None:
        guest = direct(Guest(2)).exit(0, "page_fault", X, 4).store(word(L1, 1), entry(OLD), vcpu=1)
        injected = Guest().fault(X, 4).events[-2]
        assert broken(guest.add(injected)) is None

    def test_a_right_that_is_missing_now(self) -> None:
        assert broken(mapped(P | U | A | D).fault(X, 7)) is None
        assert broken(mapped().fault(X, 7)) is Rule.UNJUSTIFIED_FAULT

    def test_a_right_that_was_missing_may_have_been_cached(self) -> None:
        guest = mapped(P | U | A | D).store(word(L1, 1), entry(OLD))
        assert broken(guest.fault(X, 7)) is None

    def test_but_only_once_since_the_fault_removed_what_was_cached(self) -> None:
        guest = mapped(P | U | A | D).store(word(L1, 1), entry(OLD)).fault(X, 7)
        assert broken(guest.access(X, OLD, USER | WRITE)) is None
        assert broken(guest.fault(X, 7)) is Rule.UNJUSTIFIED_FAULT

    def test_a_fault_removes_what_the_guest_could_still_use(self) -> None:
        guest = mapped(PAGE).store(word(L1, 1), entry(OLD, P | W | A | D)).fault(X, 7)
        assert broken(guest.access(X, OLD)) is Rule.STALE_TRANSLATION

    def test_a_fault_that_was_never_delivered_removes_nothing(self) -> None:
        guest = mapped(PAGE).store(word(L1, 1), entry(OLD, P | W | A | D))
        guest.exit(0, "page_fault", X, 7).add(
            Guest().fault(X, 7).events[-2], IncarnationEnded(0, 1, "detached")
        )
        assert broken(guest.enter().access(X, OLD)) is None

    def test_reserved_bits(self) -> None:
        assert broken(mapped(PAGE | 1 << 40).fault(X, 0xD)) is None
        assert broken(mapped().fault(X, 0xD)) is Rule.UNJUSTIFIED_FAULT
        assert broken(mapped(PAGE | 1 << 40).fault(X, 4)) is Rule.UNJUSTIFIED_FAULT

    def test_a_table_outside_of_memory_is_not_present(self) -> None:
        guest = mapped().store(word(L2, 0), entry(0x9000, TABLE))
        assert broken(guest.fault(X, 4)) is None

    def test_with_paging_off_there_are_no_page_faults(self) -> None:
        guest = Guest().registers(0, "", cr0=1, cr3=0, cr4=0, efer=0)
        assert broken(guest.fault(X, 4)) is Rule.UNJUSTIFIED_FAULT

    def bypassed(self, guest: Guest) -> Guest:
        return guest.add(Walked(0, 1, X, 4, -1, 0, 4), Bypassed(0, X, 4))

    def test_a_fault_without_an_exit_follows_from_an_entry_of_its_own_walk(self) -> None:
        guest = self.bypassed(direct(Guest()))
        assert broken(guest) is None
        guest.store(word(L1, 1), entry(OLD))
        assert broken(self.bypassed(guest)) is Rule.UNJUSTIFIED_FAULT
