"""The experiment on the simulator's own work: it can be run, and says what its table says."""

from __future__ import annotations

import pytest

from shadowmmu.experiments.analyses.virtual_time_cost import analyse
from shadowmmu.experiments.design import points_of
from shadowmmu.experiments.findings import FindingsError
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("virtual-time-cost")


def run(vcpus: int, iterations: int, *, power: float = 1.0, by_vcpus: float = 0.0) -> dict[str, object]:
    """A run whose steps and seconds grow with these powers of the forks in all, and of the vCPUs."""
    size = (vcpus * iterations) ** power * vcpus**by_vcpus
    return {
        "vcpus": vcpus,
        "iterations": iterations,
        "steps": round(1000 * size),
        "wall_seconds": size / 10,
        "processor_seconds": size / 20,
        "cores": 2,
        "vcpu.instructions": 500 * vcpus * iterations,
    }


DESIGN = ((4, 8), (4, 16), (4, 64), (1, 256), (16, 16), (256, 1))


def test_the_axes_share_a_point_and_their_totals_are_fixed() -> None:
    points = [(int(p.parameters["vcpus"]), int(p.parameters["iterations"])) for p in points_of(SPEC)]
    divided = [vcpus for vcpus, iterations in points if vcpus * iterations == 256]
    assert sorted(divided) == [2**n for n in range(9)]
    assert len([vcpus for vcpus, _ in points if vcpus == 4]) == 5


def test_a_few_runs_are_measured_by_the_clock() -> None:
    table = few_runs(SPEC, [0, 1], iterations=1)
    assert all(seconds > 0.0 for seconds in [*table["wall_seconds"], *table["processor_seconds"]])
    assert table["python"].null_count() == 0


def test_linear_growth_is_said_to_be() -> None:
    said = analyse(table_of([run(*point) for point in DESIGN]))
    assert said.answer.startswith(
        "Yes: neither grows faster than linearly: with the guest's operations steps grow with"
    )
    assert "the power 1.00 and seconds with 1.00" in said.answer
    assert "take 1.00 times the steps and 1.00 times the seconds on 256 vCPUs, as on 1" in said.answer


def test_growth_with_a_square_is_said_to_be() -> None:
    said = analyse(table_of([run(*point, power=2.0) for point in DESIGN]))
    assert said.answer.startswith("**No: something grows with the power 2.00**")
    said = analyse(table_of([run(*point, by_vcpus=1.5) for point in DESIGN]))
    assert said.answer.startswith("**No: something grows with the power 1.50**")


def test_one_axis_alone_is_not_enough() -> None:
    with pytest.raises(FindingsError):
        analyse(table_of([run(4, 8), run(4, 16)]))
