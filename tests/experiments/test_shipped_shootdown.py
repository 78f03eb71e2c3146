"""The experiment on remote flushes: it can be run, and says what its table says."""

from __future__ import annotations

import pytest

from shadowmmu.experiments.analyses.shootdown import analyse
from shadowmmu.experiments.findings import FindingsError
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("shootdown")


def flushes(vcpus: int, us: float, **more: object) -> dict[str, object]:
    """A run with ten flushes of all vCPUs that take `us` each, on a processor of 3.2 GHz."""
    given: dict[str, object] = {
        "vcpus": vcpus,
        "timed.flushes": 10,
        "timed.flush_targets": 10 * vcpus,
        "timed.exits": 10 * vcpus,
        "latency.flush_cycles.mean": 3200.0 * us,
        "latency.flush_cycles.max": 3200.0 * us,
        "cause.exit": 20_000 * vcpus,
        "cause.interrupted": 6_000 * vcpus,
        "cause.tlb_miss": 0,
        "cost.tlb_hit": 4.0,
    }
    return given | more


def test_a_few_runs_give_an_answer() -> None:
    said = analyse(few_runs(SPEC, [0, 1], iterations=8000))
    (_, points), (_, fits) = said.tables
    assert points["kicked by a flush"].to_list() == [1.0, 2.0]
    assert 0.0 < fits["us per target"][0] < fits["us"][0]


def test_the_cost_is_a_line_and_is_held_against_what_was_published() -> None:
    said = analyse(table_of([flushes(vcpus, 2.0 + 0.5 * vcpus) for vcpus in (1, 8, 64)]))
    assert said.answer.startswith(
        "A flush takes 2.0 us and 0.50 us more for each vCPU that it kicks (cascadelake-2019)"
    )
    assert "it grows linearly" in said.answer
    assert (
        "10 us at 16 processors, where LATR has about 6 to 8 on 2 sockets (within a factor of 2)"
        in said.answer
    )
    assert "2,600 to 2,600 cycles" in said.answer


def test_what_is_no_line_and_far_from_published_is_said_to_be() -> None:
    said = analyse(table_of([flushes(vcpus, 1.0 + vcpus * vcpus) for vcpus in (1, 8, 64)]))
    assert "it is not linear" in said.answer
    assert "times more)" in said.answer


def test_one_number_of_vcpus_says_nothing() -> None:
    with pytest.raises(FindingsError):
        analyse(table_of([flushes(4, 2.0)]))
