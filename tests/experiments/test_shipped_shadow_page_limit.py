"""The experiment on the limit on shadow pages: it can be run, and tells a cliff from a slope."""

from __future__ import annotations

from shadowmmu.experiments.analyses.shadow_page_limit import analyse
from shadowmmu.experiments.design import points_of
from tests.experiments.shipped import checked, few_runs, table_of

SPEC = checked("shadow-page-limit")


def row(limit: int, cycles: float, recycled: int, load: str = "context-switch") -> dict[str, object]:
    return {
        "load.load": load,
        "load.processes": 10,
        "mmu_pages": limit,
        "iteration_cycles": cycles,
        "iteration_us": cycles / 3200,
        "kvm.mmu_cache_miss": 100 + recycled,
        "kvm.mmu_shadow_zapped": recycled,
        "kvm.mmu_recycled": recycled,
        "guest.iterations": 10,
        "exits.page_fault": 50 + recycled,
    }


def test_the_limits_of_a_load_begin_at_one_where_nothing_is_recycled() -> None:
    highest = {
        load: max(p.parameters["mmu_pages"] for p in points_of(SPEC) if p.parameters["load.load"] == load)
        for load in ("context-switch", "remap", "touch", "fork")
    }
    assert highest == {"context-switch": 512, "remap": 512, "touch": 256, "fork": 1024}


def test_processes_that_do_not_fit_lose_all_their_tables_at_each_turn() -> None:
    points = [point.number for point in points_of(SPEC) if point.parameters["load.load"] == "context-switch"]
    said = analyse(few_runs(SPEC, [points[0], points[3], points[5]], iterations=32))
    assert said.answer.startswith("The limit is a cliff for `context-switch` (")
    assert "pages are recycled below that limit, and none are from it on" in said.answer
    [(_, edges), _] = said.tables
    [edge] = edges.to_dicts()
    assert edge["working set"] + 5 == edge["no harm down to"] == 184
    assert edge["slow-down there"] > 5


def test_a_slow_down_that_grows_with_the_distance_is_a_slope() -> None:
    said = analyse(table_of([row(200, 1000, 0), row(104, 1100, 10), row(80, 2000, 50), row(64, 5000, 90)]))
    assert said.answer.startswith("The limit is a slope for `context-switch` (5.0 times).")


def test_no_slow_down_is_said_to_be_none() -> None:
    said = analyse(table_of([row(200, 1000, 0), row(64, 1010, 90)]))
    assert said.answer.startswith("No limit of this sweep makes any load slower.")


def test_recycling_where_the_rule_does_not_want_it_is_named() -> None:
    said = analyse(table_of([row(200, 1000, 0), row(150, 1000, 7), row(64, 9000, 90)]))
    assert "but it is otherwise for context-switch at 150" in said.answer
