"""Every paging mode and table format through the machine: where a vCPU's tables begin, what the walk finds in them."""

from __future__ import annotations

import pytest

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag, Bypassed
from tests.machine.guest import FIRST_PFN, TABLES, WRITE, Driven

MODES = [m.GuestMode.PAGING64, m.GuestMode.PAE, m.GuestMode.PAGING32, m.GuestMode.NONPAGING]


@pytest.mark.parametrize("mode", MODES)
def test_a_page_fault_maps_the_page_and_the_walk_then_succeeds(mode: m.GuestMode) -> None:
    driven = Driven(1, mode=mode)
    driven.enter(0)
    walked = driven.map_page(0, 7, WRITE)
    assert (walked.pfn, walked.level) == (FIRST_PFN + 7, 1)
    driven.send(0, driven.log(0, 7, 42))
    assert driven.word(7) == 42


@pytest.mark.parametrize("mode", MODES)
def test_a_revoked_page_faults_again(mode: m.GuestMode) -> None:
    driven = Driven(1, mode=mode)
    driven.enter(0)
    driven.map_page(0, 7, WRITE)
    driven.host(m.Unmap(7))
    driven.take(0)
    driven.send(0, m.Exit(driven.entry(0), m.ExternalInterruptExit()))
    walk = m.Walk(driven.entry(0), 1, 7 << 12, 0)
    assert driven.send(0, walk) == [m.WalkFault(driven.entry(0), 1, 0)]


def test_an_absent_pae_root_is_a_fault_of_a_page_that_is_not_present() -> None:
    driven = Driven(1, mode=m.GuestMode.PAE)
    driven.enter(0)
    walk = m.Walk(driven.entry(0), 1, 3 << 30, WRITE)
    assert driven.send(0, walk) == [m.WalkFault(driven.entry(0), 1, 2)]


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(
    "body",
    [
        m.Walk(1, 1, 1 << 32, 0),
        m.Load(1, (0, 1 << 32, FIRST_PFN, 8, 0)),
        m.Exit(1, m.InvlpgExit(1 << 32)),
        m.Exit(1, m.PageFaultExit(1 << 32, 0, m.Instruction(0))),
    ],
)
def test_outside_of_long_mode_an_address_has_32_bits(mode: m.GuestMode, body: m.VcpuMessage) -> None:
    refusal = Driven(1, mode=mode).runner.machine.refusal(0, body)
    assert refusal is not None and "0x100000000" in refusal[1]


# --- two-dimensional paging ---------------------------------------------------------------------------------------


def two_dimensional(tdp: m.Tdp) -> Driven:
    driven = Driven(1, mode=m.GuestMode.NONPAGING, tdp=tdp)
    driven.enter(0)
    return driven


@pytest.mark.parametrize("tdp", m.Tdp)
def test_with_two_dimensional_paging_a_violation_maps_the_page(tdp: m.Tdp) -> None:
    driven = two_dimensional(tdp)
    walked = driven.map_page(0, 7, WRITE)
    assert (walked.pfn, walked.level) == (FIRST_PFN + 7, 1)
    driven.send(0, driven.log(0, 7, 42))
    assert driven.word(7) == 42


@pytest.mark.parametrize(
    "tdp, flags, error_code",
    [
        (m.Tdp.EPT, 0, 1),
        (m.Tdp.EPT, WRITE, 2),
        (m.Tdp.EPT, AccessFlag.FETCH, 0),
        (m.Tdp.NPT, 0, 4),
        (m.Tdp.NPT, WRITE, 6),
        (m.Tdp.NPT, AccessFlag.FETCH, 20),
    ],
)
def test_each_format_has_its_error_codes(tdp: m.Tdp, flags: int, error_code: int) -> None:
    driven = two_dimensional(tdp)
    assert driven.send(0, m.Walk(1, 1, 7 << 12, int(flags))) == [m.WalkFault(1, 1, error_code)]


def test_an_ept_translation_needs_no_dirty_bit() -> None:
    driven = two_dimensional(m.Tdp.EPT)
    walked = driven.map_page(0, 7)
    assert walked.flags & AccessFlag.DIRTY and walked.flags & AccessFlag.MAY_WRITE


def test_an_access_to_a_frame_without_memory_is_a_misconfiguration_from_the_second_time_on() -> None:
    driven = two_dimensional(m.Tdp.EPT)
    gpa = 0x8000 << 12
    instruction = m.Instruction(0)
    assert driven.send(0, m.Walk(1, 1, gpa, 0)) == [m.WalkFault(1, 1, 1)]
    (first,) = driven.send(0, m.Exit(1, m.PageFaultExit(gpa, 1, instruction)))
    assert isinstance(first, m.Entered) and first.completed == m.Completed(0, mmio=True)
    assert driven.send(0, m.Walk(2, 2, gpa, 0)) == [m.WalkFault(2, 2, 0, misconfig=True)]
    (second,) = driven.send(0, m.Exit(2, m.EptMisconfigExit(gpa, instruction)))
    assert isinstance(second, m.Entered) and second.completed == m.Completed(0, mmio=True)
    assert driven.runner.machine.counters["exits.ept_misconfig"] == 1


@pytest.mark.parametrize("tdp", [None, m.Tdp.NPT])
def test_without_ept_there_is_no_misconfiguration(tdp: m.Tdp | None) -> None:
    driven = Driven(1, mode=m.GuestMode.NONPAGING, tdp=tdp)
    refusal = driven.runner.machine.refusal(0, m.Exit(1, m.EptMisconfigExit(0, m.Instruction(0))))
    assert refusal is not None and "EPT" in refusal[1]


# --- bypass_guest_pf ----------------------------------------------------------------------------------------------


def walk_after_the_shadow_page_is_there(driven: Driven, page: int) -> m.MmuMessage:
    """Maps another page of the same table, then walks to the page."""
    driven.enter(0)
    driven.map_page(0, 7)
    (answer,) = driven.send(0, m.Walk(driven.entry(0), 9, page << 12, WRITE))
    return answer


def pre_patch(*, bypass: bool) -> Driven:
    driven = Driven(1, profile="pre-patch", bypass_guest_pf=bypass)
    driven.host(m.WritePhys([((TABLES + 3) * 4096 + 8 * 9, 0)]))
    return driven


def test_a_fault_on_what_the_guest_does_not_map_is_bypassed() -> None:
    driven = pre_patch(bypass=True)
    assert walk_after_the_shadow_page_is_there(driven, 9) == m.WalkFault(driven.entry(0), 9, 2)
    assert [event for event in driven.events if isinstance(event, Bypassed)] == [Bypassed(0, 9 << 12, 2)]


def test_a_fault_on_what_the_guest_maps_exits_by_its_reserved_bits() -> None:
    driven = pre_patch(bypass=True)
    assert walk_after_the_shadow_page_is_there(driven, 40) == m.WalkFault(driven.entry(0), 9, 1 | 2 | 8)
    assert not any(isinstance(event, Bypassed) for event in driven.events)
    driven.map_page(0, 40, WRITE)


def test_with_bypass_guest_pf_off_nothing_is_bypassed() -> None:
    driven = pre_patch(bypass=False)
    assert walk_after_the_shadow_page_is_there(driven, 9) == m.WalkFault(driven.entry(0), 9, 2)
    assert not any(isinstance(event, Bypassed) for event in driven.events)


def test_the_counters_say_how_entries_came_to_be_notrap() -> None:
    counters = pre_patch(bypass=True).runner.machine.all_counters()
    assert counters["kvm.notrap.prefetched"] == 0
    driven = pre_patch(bypass=True)
    walk_after_the_shadow_page_is_there(driven, 9)
    assert driven.runner.machine.all_counters()["kvm.notrap.prefetched"] > 0
    assert not any(name.startswith("kvm.notrap") for name in Driven(1).runner.machine.all_counters())
