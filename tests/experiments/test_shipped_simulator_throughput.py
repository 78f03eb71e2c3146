"""The experiment on the simulator's own throughput: it says which computer it is of, and what limits it."""

from __future__ import annotations

from shadowmmu.experiments.analyses.simulator_throughput import analyse
from shadowmmu.experiments.design import points_of
from tests.experiments.shipped import checked, table_of

SPEC = checked("simulator-throughput")


def row(machines: int, vcpus: int, rate: float, cores: int = 2) -> dict[str, object]:
    return {
        "machines": machines,
        "vcpus": vcpus,
        "cores": cores,
        "python": "3.11.2",
        "instructions_per_second": rate,
        "events_per_second": 5 * rate,
        "seconds": 10.0,
    }


def test_it_goes_to_eight_processes_and_four_machines() -> None:
    points = [point.parameters for point in points_of(SPEC)]
    assert {(point["machines"], point["vcpus"]) for point in points} == {
        (machines, vcpus) for machines in (1, 2, 4) for vcpus in (1, 2, 4, 8)
    }


def test_a_machine_that_does_not_get_faster_is_limited_by_its_service() -> None:
    flat = analyse(table_of([row(1, 1, 1000.0), row(1, 8, 1100.0)])).answer
    assert "1.10 times as fast: all exits and walks go through its MMU service" in flat
    steep = analyse(table_of([row(1, 1, 1000.0), row(1, 8, 5000.0)])).answer
    assert "5.00 times as fast." in steep
    assert "MMU service" not in steep


def test_machines_beyond_the_cores_are_said_to_measure_the_scheduler() -> None:
    few = analyse(table_of([row(1, 1, 1000.0), row(4, 1, 1500.0)])).answer
    assert "1.50 times as many with 1 vCPU each" in few
    assert "operating system's scheduler" in few
    many = analyse(table_of([row(1, 1, 1000.0, 16), row(4, 1, 4000.0, 16)])).answer
    assert "operating system's scheduler" not in many


def test_the_computer_is_named_by_cores_and_python() -> None:
    said = analyse(table_of([row(1, 1, 1000.0)]))
    assert "on 2 usable cores with Python 3.11.2" in said.answer
    assert all("2 cores" in title for title, _ in said.charts)
