"""The experiment on VPID: it can be run, and says what its table says."""

from __future__ import annotations

import polars as pl
import pytest

from shadowmmu.experiments.analyses.vpid import analyse
from shadowmmu.experiments.design import points_of
from shadowmmu.experiments.findings import FindingsError
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("vpid")


def row(vpid: bool, load: str, misses: int, **more: object) -> dict[str, object]:
    given: dict[str, object] = {
        "vpid": vpid,
        "load.load": load,
        "load.pages": 0,
        "host.dirty_log": 0,
        "tlb_ways": 4,
        "cost.tlb_miss_level": 1.0,
        "cycles": 1_000_000,
        "timed.exits": 100,
        "vcpu.entries": 100,
        "vcpu.flushes": 10,
        "vcpu.instructions": 10_000,
        "vcpu.tlb_misses": misses,
        "cause.tlb_miss": 50 * misses,
    }
    return given | more


def touch(vpid: bool, misses: int, **more: object) -> dict[str, object]:
    return row(vpid, "touch", misses, **{"load.pages": 64, "host.dirty_log": 1000, **more})


def test_every_run_with_vpid_has_one_without() -> None:
    points = [point.parameters for point in points_of(SPEC)]
    keys = [{name: value for name, value in point.items() if name != "vpid"} for point in points]
    assert all(keys.count(key) == 2 for key in keys)
    assert SPEC.common_random_numbers


def test_getpid_has_nothing_of_vpid_since_every_cr3_write_flushes() -> None:
    said = analyse(few_runs(SPEC, [0, 1], warmup=3, iterations=100))
    assert "saves nothing in any of these loads" in said.answer
    assert "`getpid` (100 % of the entries flush)" in said.answer
    [(_, loads), *_] = said.tables
    assert loads["time saved"].to_list() == [0.0]
    assert loads["misses avoided per exit"].to_list() == [0.0]


def test_the_verdict_is_of_the_load_that_saves_most() -> None:
    little = [row(True, "fork", 0), row(False, "fork", 200)]
    said = analyse(table_of([*little, touch(True, 100), touch(False, 110)]))
    assert said.answer.startswith(
        "VPID saves little where page tables are shadowed: at most 1.0 % of the time (`fork`)"
    )
    much = analyse(table_of([*little, touch(True, 0), touch(False, 6000)]))
    assert much.answer.startswith("VPID saves up to 30.0 % of the time (`touch` of 64 pages, ")


def test_more_misses_than_pages_are_called_impossible() -> None:
    possible = analyse(table_of([touch(True, 0), touch(False, 6400)]))
    assert "It is never more than the pages that are used" in possible.answer
    impossible = analyse(table_of([touch(True, 0), touch(False, 9000)]))
    assert "which cannot be" in impossible.answer


def test_dearer_walks_are_compared_with_the_same_run_at_the_models_price() -> None:
    dear: dict[str, object] = {"cost.tlb_miss_level": 12.5}
    rows = [touch(True, 0), touch(False, 2000), touch(True, 0, **dear), touch(False, 10_000, **dear)]
    assert "`touch` 50.0 % instead of 10.0 % at 12.5 times the price" in analyse(table_of(rows)).answer


def test_a_table_of_another_experiment_is_refused() -> None:
    with pytest.raises(FindingsError, match="no column 'vpid'"):
        analyse(pl.DataFrame({"status": ["ok"]}))
