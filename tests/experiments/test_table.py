"""The table of a sweep depends on the rows alone, not on how they came."""

from __future__ import annotations

import polars as pl
from hypothesis import assume, given
from hypothesis import strategies as st

from shadowmmu.experiments.design import Point, Run
from shadowmmu.experiments.point import Outcome
from shadowmmu.experiments.table import Row, row_of, table_digest, table_of
from shadowmmu.experiments.values import Metric

metrics: st.SearchStrategy[Metric] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 40), 1 << 40),
    st.floats(allow_nan=False),
    st.text("ab", max_size=3),
)


def ended(point: int, replicate: int, metrics: dict[str, Metric]) -> Row:
    return row_of(Run(Point(point, {"ops": point * 10}), replicate, 5), Outcome(metrics))


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    keys = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), unique=True, min_size=1, max_size=12)
    )
    names = st.sampled_from(["count", "rate", "found"])
    return [ended(*key, draw(st.dictionaries(names, metrics))) for key in keys]


@given(rows(), st.randoms(use_true_random=False))
def test_the_table_is_the_same_in_whatever_order_rows_come(rows: list[Row], shuffle: object) -> None:
    table = table_of(rows, ["ops"])
    mixed = rows.copy()
    shuffle.shuffle(mixed)  # type: ignore[attr-defined]
    other = table_of(mixed, ["ops"])
    assert table.equals(other) and table.schema == other.schema
    assert table_digest(table) == table_digest(other)
    keys = list(zip(table["point"], table["replicate"], strict=True))
    assert keys == sorted(keys)


@given(rows(), st.integers(0, 12))
def test_batches_that_were_written_and_read_make_the_same_table(rows: list[Row], cut: int) -> None:
    # What is not of one kind becomes text, in which it cannot be seen any more which batch had it how.
    kinds = [{type(row.get(name)) for row in rows} - {type(None)} for name in ("count", "rate", "found")]
    assume(all(len(kind) <= 1 or kind == {int, float} for kind in kinds))
    batches = [table_of(part, ["ops"]).to_dicts() for part in (rows[:cut], rows[cut:]) if part]
    again = table_of([row for batch in batches for row in batch], ["ops"])
    assert table_digest(again) == table_digest(table_of(rows, ["ops"]))


def test_integers_next_to_numbers_become_numbers() -> None:
    table = table_of([ended(0, 0, {"rate": 1}), ended(1, 0, {"rate": 0.5})], ["ops"])
    assert table.schema["rate"] == pl.Float64


def test_columns_stand_in_a_fixed_order() -> None:
    table = table_of([ended(0, 0, {"b": 1, "a": 2})], ["ops"])
    assert table.columns == ["point", "replicate", "seed", "ops", "status", "error", "traceback", "a", "b"]


def test_of_several_attempts_the_last_counts() -> None:
    failed = row_of(Run(Point(0, {"ops": 0}), 0, 5), Outcome(error="no", traceback="t"))
    table = table_of([failed, ended(0, 0, {"count": 3})], ["ops"])
    assert table.select("status", "error", "count").rows() == [("ok", None, 3)]
    back = table_of([ended(0, 0, {"count": 3}), failed], ["ops"])
    assert back.select("status", "error").rows() == [("failed", "no")]
    assert "count" not in back.columns


def test_the_digest_sees_values_types_and_names_but_no_tracebacks() -> None:
    one = table_of([ended(0, 0, {"count": 1})], ["ops"])
    for other in (
        ended(0, 0, {"count": 2}),
        ended(0, 0, {"count": 1.0}),
        ended(0, 0, {"counts": 1}),
        ended(0, 1, {"count": 1}),
    ):
        assert table_digest(table_of([other], ["ops"])) != table_digest(one)
    failures = [
        row_of(Run(Point(0, {}), 0, 5), Outcome(error="no", traceback=text)) for text in ("one", "two")
    ]
    assert len({table_digest(table_of([row], [])) for row in failures}) == 1


def test_a_metric_of_a_taken_name_is_a_failure() -> None:
    for name in ("ops", "seed", "status"):
        assert ended(0, 0, {name: 1})["error"] == f"a metric is called {name!r}, as another column is"
