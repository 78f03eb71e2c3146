"""The experiment on dirty logging: it can be run, and says where the guest has time left."""

from __future__ import annotations

import pytest

from shadowmmu.experiments.analyses.dirty_logging import CAUSES, analyse
from shadowmmu.experiments.design import points_of
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("dirty-logging")
FAULT = 10_000  # cycles


def row(
    interval: int, cycles: float, faults: int = 0, *, readings: int = 0, vcpus: int = 1, wait: int = 0
) -> dict[str, object]:
    causes = {f"cause.{name}": 0 for name in CAUSES} | {"cause.guest": 1_000_000}
    return {
        "vcpus": vcpus,
        "load.pages": 100,
        "load.write_share": 0.3,
        "host.dirty_log": interval,
        "cost.page_fault": 1.0,
        "cost.rmap_entry": 1.0,
        "cost.lock_transfer": 1.0,
        "iteration_cycles": cycles,
        "iteration_us": cycles / 1000,
        "cycles": 10_000_000,
        "lock_held": 1_000_000,
        "timed.exits": faults,
        "exits.page_fault": faults,
        "timed.host.get_dirty_log": readings,
        **causes,
        "cause.handler": faults * FAULT,
        "cause.lock_wait": wait,
    }


def quiet(vcpus: int = 1) -> dict[str, object]:
    return row(0, 100.0, vcpus=vcpus)


def test_logging_is_compared_with_none_for_all_vcpus_pages_and_shares() -> None:
    keys = ("vcpus", "load.pages", "load.write_share")
    points = [point.parameters for point in points_of(SPEC)]
    without = {tuple(point[key] for key in keys) for point in points if point["host.dirty_log"] == 0}
    assert {tuple(point[key] for key in keys) for point in points} == without


def test_the_guest_faults_once_a_round_for_every_page_that_it_writes_to() -> None:
    points = points_of(SPEC)
    wanted = [p.number for p in points if p.parameters["load.pages"] == 64 and p.parameters["vcpus"] == 1]
    short = [n for n in wanted if points[n].parameters["host.dirty_log"] in (0, 500_000)]
    said = analyse(few_runs(SPEC, short, warmup=1739, iterations=2500))
    [(_, one), *_] = said.tables
    [logged] = one.to_dicts()
    assert logged["write faults per round"] == pytest.approx(64, rel=0.15)
    assert logged["slowdown"] > 1.5


def test_an_edge_between_long_rounds_and_short_ones_is_found() -> None:
    long = row(
        4_000_000, 115.0, faults=1000, readings=18
    )  # rounds of 8,000,000 cycles, 1,000,000 of them faults
    said = analyse(table_of([quiet(), long, row(100_000, 30_000.0, faults=1000, readings=18)]))
    assert (
        "logging slows the guest down at most 1.15 times; where it is shorter, 300 to 300 times"
        in said.answer
    )
    assert "explains the slow-down to within" in said.answer


def test_no_edge_is_said_to_be_none() -> None:
    long = row(4_000_000, 150.0, faults=1000, readings=18)
    said = analyse(table_of([quiet(), long, row(100_000, 200.0, faults=1000, readings=18)]))
    assert said.answer.startswith("There is no edge")
    assert "misses the slow-down by up to" in said.answer


@pytest.mark.parametrize(
    "cycles, wait, words",
    [(400.0, 30_000_000, "their faults take turns at mmu_lock"), (116.0, 0, "does not matter yet")],
)
def test_more_vcpus_wait_for_mmu_lock_or_do_not(cycles: float, wait: int, words: str) -> None:
    one = row(4_000_000, 115.0, faults=1000, readings=18)
    many = row(4_000_000, cycles, faults=16_000, readings=18, vcpus=16, wait=wait)
    assert words in analyse(table_of([quiet(), quiet(vcpus=16), one, many])).answer
