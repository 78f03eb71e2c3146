"""Means and Student's intervals, against the printed table of the t distribution and by their own promise."""

from __future__ import annotations

import random
import statistics

import polars as pl
import pytest

from shadowmmu.experiments.statistics import Interval, mean_interval, summary, t_quantile


@pytest.mark.parametrize(
    "freedom, two_sided_95, two_sided_99",
    [
        (1, 12.7062047, 63.6567412),
        (2, 4.3026527, 9.9248432),
        (4, 2.7764451, 4.6040949),
        (9, 2.2621572, 3.2498355),
        (29, 2.0452296, 2.7563859),
        (100, 1.9839715, 2.6258905),
        (100_000, 1.9599877, 2.5758785),
    ],
)
def test_quantiles_are_those_of_the_printed_table(
    freedom: int, two_sided_95: float, two_sided_99: float
) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(two_sided_95, abs=1e-6)
    assert t_quantile(0.995, freedom) == pytest.approx(two_sided_99, abs=1e-6)
    assert t_quantile(0.5, freedom) == pytest.approx(0.0, abs=1e-9)


def test_one_value_has_a_mean_and_no_interval() -> None:
    assert mean_interval([4.0]) == Interval(1, 4.0, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval([3.0, 3.0, 3.0]) == Interval(3, 3.0, 3.0, 3.0)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(2000):
        _, _, low, high = mean_interval([draw.gauss(10.0, 2.0) for _ in range(4)], 0.9)
        assert low is not None and high is not None
        covered += low <= 10.0 <= high
    assert 0.88 <= covered / 2000 <= 0.92  # three standard deviations of such a share are 0.02


def test_a_summary_has_a_row_per_combination_in_order() -> None:
    table = pl.DataFrame(
        {"size": [2, 2, 1, 1], "hit": [True, True, False, False], "time": [1.0, 3.0, 7.0, None]}
    )
    rows = summary(table, ["size", "hit"], ["time"]).to_dicts()
    assert [(row["size"], row["hit"], row["runs"], row["time"]) for row in rows] == [
        (2, True, 2, 2.0),
        (1, False, 2, 7.0),
    ]
    half = t_quantile(0.975, 1) * statistics.stdev([1.0, 3.0]) / 2**0.5
    assert rows[0]["time.low"] == pytest.approx(2.0 - half)
    assert rows[0]["time.high"] == pytest.approx(2.0 + half)
    assert rows[1]["time.low"] is None
