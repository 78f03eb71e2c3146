"""A trail names where actors stood, so that it can be followed where a schedule's counts mean something else."""

import msgspec
import pytest

from shadowmmu.explorer.actors import parse_schedule
from shadowmmu.explorer.shrink import switches
from shadowmmu.explorer.trail import (
    Place,
    follow_schedule,
    follow_trail,
    format_trail,
    parse_trail,
    trail_schedule,
)
from tests.explorer.failing import failing


def test_an_execution_follows_its_own_trail_step_for_step() -> None:
    scenario, profile, failure, schedule = failing()
    first = follow_schedule(scenario, profile, schedule)
    again = follow_trail(scenario, profile, first.trail)
    assert again.ending == first.ending
    assert again.ending.failure == failure
    assert again.divergence is None
    assert again.skipped == 0
    assert trail_schedule(again.trail) == schedule


def test_a_trail_survives_being_written_and_read() -> None:
    scenario, profile, _, schedule = failing()
    trail = follow_schedule(scenario, profile, schedule).trail
    assert parse_trail(format_trail(trail)) == trail


def test_places_in_interrupt_handlers_are_written_apart() -> None:
    lines = ["v1 i0: guest walk*2", "k1 0: kick", "v1 2: guest BEFORE_LOCK"]
    trail = parse_trail(lines)
    assert [place.in_handler for place in trail] == [True, True, True, False, False, False]
    assert format_trail(trail) == lines
    assert str(trail[2]) == "v1 in its handler's instruction 1 at walk (time 2)"


@pytest.mark.parametrize("line", ["v0: guest", "q0 1: guest", "v0 x: guest", ""])
def test_what_is_no_trail_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        parse_trail([line])


def test_a_trail_still_leads_to_the_failure_where_operations_take_fewer_steps() -> None:
    """Without its set-up vCPU 1 walks first, so the counts of the schedule are wrong, but the places are not."""
    scenario, profile, failure, _ = failing()
    schedule = parse_schedule("v0*110 v1")
    trail = follow_schedule(scenario, profile, schedule).trail
    shorter = msgspec.structs.replace(scenario, setup=(scenario.setup[0],))
    followed = follow_trail(shorter, profile, trail)
    assert failure.same_kind(followed.ending.failure)
    assert followed.divergence is not None
    assert switches(followed.ending.schedule) == 1


def test_a_fix_that_changes_the_way_is_told_as_a_divergence() -> None:
    scenario, profile, _, schedule = failing()
    trail = follow_schedule(scenario, profile, schedule).trail
    followed = follow_trail(scenario, "fixed", trail)
    assert followed.ending.failure is None
    assert followed.divergence is not None
    assert followed.divergence.expected == trail[followed.divergence.step]
    assert "recorded was v0" in str(followed.divergence)


def test_an_actor_that_is_past_its_place_waits() -> None:
    scenario, profile, _, schedule = failing()
    trail = follow_schedule(scenario, profile, schedule).trail
    behind = (trail[1], trail[0], *trail[2:])
    followed = follow_trail(scenario, profile, behind)
    assert followed.skipped == 1
    assert followed.trail == trail


def test_the_place_of_a_step_names_the_kernels_point() -> None:
    scenario, profile, _, schedule = failing()
    trail = follow_schedule(scenario, profile, schedule).trail
    assert Place(0, 1, "BEFORE_LOCK", 0) in trail
