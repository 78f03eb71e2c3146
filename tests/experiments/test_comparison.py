"""What comparisons of runs have in common: pairs, crossings, words. And no analysis takes a table that is not its own."""

from __future__ import annotations

import importlib

import polars as pl
import pytest

from shadowmmu.experiments.analyses import analysis_names, module_name
from shadowmmu.experiments.charts import declared_charts, in_percent
from shadowmmu.experiments.comparison import (
    beside,
    crossing,
    failures_said,
    in_words,
    join_words,
    largest_change,
    paragraphs,
    percent,
    ratio,
    saved,
    succeeded,
)
from shadowmmu.experiments.findings import FindingsError
from shadowmmu.experiments.programs import program_runs
from shadowmmu.experiments.spec import Plot


def runs(**columns: list[object]) -> pl.DataFrame:
    height = len(next(iter(columns.values())))
    return pl.DataFrame({"status": ["ok"] * height, "replicate": [0] * height} | columns)


@pytest.mark.parametrize("name", analysis_names())
def test_an_analysis_refuses_a_table_of_something_else(name: str) -> None:
    analyse = importlib.import_module(module_name(name)).analyse
    with pytest.raises(FindingsError, match="another experiment"):
        analyse(runs(speed=[1.0]))


def test_runs_that_failed_are_left_out_and_said() -> None:
    table = runs(size=[1, 2]).with_columns(status=pl.Series(["ok", "failed"]))
    assert succeeded(table, ["size"])["size"].to_list() == [1]
    assert failures_said(table) == "1 of 2 runs have failed and are left out."
    assert failures_said(table.head(1)) == ""
    with pytest.raises(FindingsError, match="no run has succeeded"):
        succeeded(table.tail(1), ["size"])


def test_a_counter_that_no_run_or_not_every_run_has_is_0() -> None:
    table = succeeded(runs(size=[1, 2], exits=[5, None]), ["size"], ["exits", "flushes"])
    assert (table["exits"].to_list(), table["flushes"].to_list()) == ([5, 0], [0, 0])


def test_a_run_stands_beside_the_one_of_the_same_replicate_and_keys() -> None:
    base = runs(size=[1, 2], time=[10.0, 20.0])
    pairs = beside(runs(size=[2, 3, 2], time=[5.0, 1.0, 30.0]), base, ["size"], ["time"])
    assert pairs["time.base"].to_list() == [20.0, 20.0]
    assert pairs.select(ratio("time")).to_series().to_list() == [0.25, 1.5]
    assert pairs.select(saved("time")).to_series().to_list() == [0.75, -0.5]
    assert largest_change(pairs, "time") == 0.75


def test_a_crossing_is_where_a_line_falls_to_the_level() -> None:
    assert crossing([(0.0, 3.0), (1.0, -1.0)]) == pytest.approx(0.75)
    assert crossing([(1.0, 0.5), (0.0, 3.0)], 1.0) == pytest.approx(0.8)
    assert crossing([(2.0, -1.0), (3.0, 1.0)]) == 2.0
    assert crossing([(0.0, 3.0), (1.0, 2.0)]) is None


def test_words() -> None:
    assert (percent(0.125), percent(-0.0001), percent(0.7, 0)) == ("12.5 %", "0.0 %", "70 %")
    assert (in_words([0.5]), in_words([0.5, 0.5])) == ("50.0 %", "50.0 %")
    assert in_words([0.4, 0.6]) == "50.0 % (-77.1 % to 177.1 %)"
    assert [join_words(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert paragraphs("one", "", " two ") == "one\n\ntwo"


def test_a_program_is_a_load_or_a_workload_and_spends_what_is_not_idle() -> None:
    measured: dict[str, list[object]] = {"vcpus": [1], "vcpu.instructions": [9]}
    causes: dict[str, list[object]] = {"cause.guest": [3], "cause.exit": [None], "cause.idle": [5]}
    table = runs(**measured, **causes)
    for name in ("workload", "load.load"):
        of = program_runs(table.with_columns(pl.lit("fork").alias(name)), [], ["kicks"])
        assert of.select("program", "spent", "kicks").row(0) == ("fork", 3, 0)


def test_a_plot_without_runs_is_left_out() -> None:
    table, plot = runs(x=[1, 2], share=[0.1, 0.25]), Plot(title="Shares", x="x", y="share")
    assert in_percent(table, "share")["share"].to_list() == [10.0, 25.0]
    assert [title for title, _ in declared_charts([(plot, table), (plot, table.clear())])] == ["Shares"]
