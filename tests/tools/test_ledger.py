"""A campaign's ledger loses at most the result that was being written when it was killed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ledger import Ledger, LedgerError, run_all


class Found(msgspec.Struct, frozen=True):
    cell: str
    seconds: float


RESULTS = [Found("ä", 1.0), Found("b\n", 2.0), Found("c", 3.5)]


def _square(number: int) -> Found:
    return Found(str(number), float(number * number))


def test_what_was_noted_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results.jsonl", Found)
    for result in RESULTS:
        ledger.add(result)
    assert Ledger(tmp_path / "results.jsonl", Found).results == RESULTS
    assert Ledger(tmp_path / "results.jsonl", Found, fresh=True).results == []


@given(kept=st.integers(0, 1000))
def test_a_line_cut_off_at_any_byte_costs_that_result_alone(
    tmp_path_factory: pytest.TempPathFactory, kept: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "results.jsonl"
    ledger = Ledger(path, Found)
    for result in RESULTS:
        ledger.add(result)
    data = path.read_bytes()[:kept]
    path.write_bytes(data)
    whole = data.count(b"\n")
    again = Ledger(path, Found)
    assert again.results == RESULTS[:whole]
    again.add(RESULTS[0])
    assert Ledger(path, Found).results == [*RESULTS[:whole], RESULTS[0]]


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"cell": "a", "seconds": 1.0}\n{"seed": 3}\n')
    with pytest.raises(LedgerError, match="line 2, is no result"):
        Ledger(path, Found)
    assert path.read_text().count("\n") == 2


def test_work_that_is_done_in_processes_is_noted_once_each(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run_all(range(5), _square, 2, Ledger(path, Found), lambda result: result.cell)
    assert sorted(Ledger(path, Found).results, key=lambda result: result.seconds) == [
        _square(n) for n in range(5)
    ]
