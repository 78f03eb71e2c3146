"""Means and Student's intervals, against the printed table of the t distribution and by their own promise."""

from __future__ import annotations

import random
import statistics

import polars as pl
import pytest

from shadowmmu.experiments.statistics import (
    Interval,
    mean_interval,
    means_by,
    renamed,
    summary,
    values_by,
)


@pytest.mark.parametrize(
    "freedom, two_sided_95, two_sided_99",
    [
        (1, 12.7062047, 63.6567412),
        (2, 4.3026527, 9.9248432),
        (9, 2.2621572, 3.2498355),
        (100, 1.9839715, 2.6258905),
    ],
)
def test_an_interval_is_that_of_the_printed_table_of_students_t(
    freedom: int, two_sided_95: float, two_sided_99: float
) -> None:
    values = [float(value) for value in range(freedom + 1)]
    standard_error = statistics.stdev(values) / len(values) ** 0.5
    for confidence, quantile in ((0.95, two_sided_95), (0.99, two_sided_99)):
        n, mean, low, high = mean_interval(values, confidence)
        assert (n, mean) == (freedom + 1, freedom / 2)
        assert low is not None and mean - low == pytest.approx(quantile * standard_error, rel=1e-7)
        assert high is not None and high - mean == pytest.approx(quantile * standard_error, rel=1e-7)


def test_an_interval_is_of_plain_numbers() -> None:
    assert {type(end) for end in mean_interval([1.0, 2.0])} == {int, float}


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
    _, _, low, high = mean_interval([1.0, 3.0])
    assert (rows[0]["time.low"], rows[0]["time.high"]) == (low, high)
    assert (rows[1]["time.low"], rows[1]["time.high"]) == (None, None)


def test_values_and_means_stand_at_their_combination_in_order() -> None:
    table = pl.DataFrame({"size": [2, 1, 2], "hit": [True, True, True], "time": [1, 7, 3]})
    assert list(values_by(table, ["size", "hit"], "time").items()) == [
        ((2, True), [1.0, 3.0]),
        ((1, True), [7.0]),
    ]
    assert means_by(table, ["size"], "time") == {(2,): 2.0, (1,): 7.0}


def test_a_column_is_renamed_with_the_ends_of_its_interval() -> None:
    means = summary(pl.DataFrame({"size": [2], "time": [1.0]}), ["size"], ["time"])
    names = renamed(means, {"time": "seconds", "size": "pages", "speed": "not there"}).columns
    assert names == ["pages", "runs", "seconds", "seconds.low", "seconds.high"]
