"""Experiments on bypass_guest_pf, tlbs_dirty and unsync pages: their files, their runs, and what they answer.

The answers are tried on tables made up here: with an effect, and with its opposite.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import polars as pl
import pytest

from shadowmmu.experiments.analyses import module_name
from shadowmmu.experiments.design import Run, check_points, runs_of
from shadowmmu.experiments.findings import Findings, FindingsError
from shadowmmu.experiments.kinds.virtual import VirtualKind
from shadowmmu.experiments.spec import find_spec
from shadowmmu.experiments.values import Metric, Value
from shadowmmu.reports.charts import to_svg

NAMES = (
    "bypass-guest-pf",
    "bypass-guest-pf-loads",
    "lazy-flush",
    "lazy-flush-loads",
    "unsync",
    "unsync-loads",
    "unsync-workloads",
)
SMALL: dict[str, Value] = {"warmup": 1, "iterations": 2}
CAUSES: dict[str, Metric] = {"cause.guest": 0.0, "cause.kick": 0.0, "cause.kick_wait": 0.0, "cause.idle": 0.0}
Values = Mapping[str, Value]


def rows_of(name: str, metrics: Callable[[Run], Mapping[str, Metric]]) -> pl.DataFrame:
    """A table with a row for each run of the experiment."""
    return pl.DataFrame(
        [
            {
                "point": run.point.number,
                "replicate": run.replicate,
                "seed": run.seed,
                "status": "ok",
                "error": "",
            }
            | run.point.parameters
            | dict(metrics(run))
            for run in runs_of(find_spec(name))
        ],
        infer_schema_length=None,
    )


def analyse(name: str, table: pl.DataFrame) -> Findings:
    analysis = find_spec(name).analysis
    assert analysis is not None
    findings: Findings = importlib.import_module(module_name(analysis)).analyse(table)
    return findings


def small_runs(name: str, chosen: Callable[[Values], bool], **changed: Value) -> pl.DataFrame:
    """The first replicate of those points of the experiment, made smaller."""
    rows = []
    for run in runs_of(find_spec(name)):
        values = run.point.parameters
        if run.replicate == 0 and chosen(values):
            metrics = VirtualKind().run(values | changed, run.seed)
            rows.append({"point": run.point.number, "replicate": 0, "status": "ok"} | values | metrics)
    return pl.DataFrame(rows, infer_schema_length=None)


# --- files and runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_its_file_is_a_design_whose_first_point_runs(name: str) -> None:
    spec = find_spec(name)
    check_points(spec, name)
    values = spec.fixed | runs_of(spec)[0].point.parameters
    small = SMALL if "load.load" in values else {"ops": 200}
    assert VirtualKind().run(values | small, 1)["steps"]


SOME_RUNS: dict[str, tuple[Callable[[Values], bool], dict[str, Value]]] = {
    "bypass-guest-pf": (
        lambda v: (
            v["cost_model"] == "nehalem-2011" and v["load.edits"] == 1 and v["load.table_share"] in (0.0, 1.0)
        ),
        {"iterations": 6},
    ),
    "bypass-guest-pf-loads": (
        lambda v: v["cost_model"] == "nehalem-2011" and v["load.load"] == "fork",
        SMALL,
    ),
    "lazy-flush": (lambda v: v["workload"] == "sloppy" and v["vcpus"] == 2, {"ops": 2000}),
    "lazy-flush-loads": (lambda v: v["load.load"] == "remap" and v["vcpus"] == 2, SMALL),
    "unsync": (
        lambda v: v["cost_model"] == "nehalem-2011" and v["load.pages"] == 8 and v["cost.spte_set"] == 1.0,
        {"iterations": 4},
    ),
    "unsync-loads": (
        lambda v: v["cost_model"] == "p4-2006" and v["load.load"] == "mmap" and v["vcpus"] == 1,
        SMALL,
    ),
    "unsync-workloads": (lambda v: v["workload"] == "mprotect" and v["vcpus"] == 1, {"ops": 2000}),
}


@pytest.mark.parametrize("name", NAMES)
def test_some_runs_are_enough_for_an_answer_with_tables_and_plots(name: str) -> None:
    chosen, changed = SOME_RUNS[name]
    found = analyse(name, small_runs(name, chosen, **changed))
    assert "What the model cannot say" in found.answer
    assert all(table.height for _, table in found.tables)
    for _, chart in found.charts:
        assert to_svg(chart).startswith("<svg")


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(FindingsError, match="another experiment"):
        analyse(name, pl.DataFrame({"status": ["ok"], "speed": [1.0]}))


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_failed_are_left_out_and_counted(name: str) -> None:
    chosen, changed = SOME_RUNS[name]
    table = small_runs(name, chosen, **changed)
    failed = table.head(1).with_columns(
        pl.lit("failed").alias("status"), pl.lit(99).cast(pl.Int64).alias("point")
    )
    both = analyse(name, pl.concat([table, failed]))
    assert f"1 of {table.height + 1} runs have failed" in both.answer
    assert both.tables[0][1].equals(analyse(name, table).tables[0][1])


# --- bypass_guest_pf ----------------------------------------------------------------------------------------------


def bypass_table(bypassed: Callable[[float, int], float], gain: float = 10_000.0) -> pl.DataFrame:
    """Iterations of 100 faults; `bypassed` of them, by share of unsync tables and edits, do not exit."""

    def metrics(run: Run) -> dict[str, Metric]:
        values = run.point.parameters
        share = bypassed(float(values["load.table_share"]), int(values["load.edits"])) * bool(
            values["bypass_guest_pf"]
        )
        scans = 50_000.0 if float(values["cost.page_unsynced"]) > 1.0 else 0.0
        return {
            "iteration_cycles": 2_000_000.0 - 100 * share * gain + scans,
            "guest.iterations": 1,
            "kvm.pf_guest": round(100 * (1.0 - share)),
            "vcpu.bypassed": round(100 * share),
            "timed.exits": round(300 - 100 * share),
            "kvm.notrap.converted": 0,
            "kvm.notrap.on_sync": 0,
        }

    return rows_of("bypass-guest-pf", metrics)


def test_bypassing_that_decays_with_unsync_tables_bears_the_message_out() -> None:
    found = analyse("bypass-guest-pf", bypass_table(lambda share, edits: (1.0 - share) / edits))
    assert found.answer.startswith("True: with one fault per table the parameter keeps 100.0 %")
    assert "with 8 faults per table 12.0 % are left" in found.answer
    assert (
        "nehalem-2011: 50.0 % (10,000 cycles a fault) at share 0, less than 1 % from a share of 0.98 on"
        in found.answer
    )
    assert "cost more than it saves from 0.95 on" in found.answer
    assert "is as fast as the tree before" in found.answer


def test_bypassing_that_does_not_decay_does_not() -> None:
    found = analyse("bypass-guest-pf", bypass_table(lambda _share, _edits: 0.9))
    assert found.answer.startswith("Not borne out: with one fault per table the parameter keeps 90.0 %")
    assert "The number of faults per table hardly matters" in found.answer
    assert "never less" in found.answer
    assert "never cost more" in found.answer


def loads_table(now: float, then: float) -> pl.DataFrame:
    """The parameter saves these shares of the time, with unsync pages and without."""

    def metrics(run: Run) -> dict[str, Metric]:
        values = run.point.parameters
        saved = (now if values["oos_shadow"] else then) * bool(values["bypass_guest_pf"])
        return {
            "iteration_cycles": 1000.0 * (1.0 - saved),
            "guest.iterations": 10,
            "kvm.pf_guest": round(1000 * (1.0 - saved)),
            "vcpu.bypassed": round(1000 * saved),
            "timed.exits": round(5000 * (1.0 - saved)),
        }

    return rows_of("bypass-guest-pf-loads", metrics)


@pytest.mark.parametrize(
    "now, then, said",
    [
        (
            0.01,
            0.4,
            "It used to be effective and no longer is in page-fault (1 at once), page-fault (16 at once)",
        ),
        (0.4, 0.4, "It is still effective: in page-fault (1 at once)"),
        (0.01, 0.01, "It was not effective before unsync pages either"),
    ],
)
def test_what_the_parameter_saves_in_loads_with_unsync_pages_and_without(
    now: float, then: float, said: str
) -> None:
    assert analyse("bypass-guest-pf-loads", loads_table(now, then)).answer.startswith(said)


# --- tlbs_dirty ---------------------------------------------------------------------------------------------------


def flush_table(at_once: float, fixed: float, flushes: int) -> pl.DataFrame:
    """Cycles of a kernel that flushes at once, and of one with bug A1 fixed, as shares of Linux 3.1's."""

    def metrics(run: Run) -> dict[str, Metric]:
        now = str(run.point.parameters["profile"]).endswith("sync-flush-now")
        mended = str(run.point.parameters["profile"]).endswith("missed-wp")
        cycles = (1e6 + run.replicate) * (at_once if now else fixed if mended else 1.0)
        return CAUSES | {
            "cause.guest": cycles,
            "vcpu.instructions": 1000,
            "kvm.remote_tlb_flush": 100 + flushes * now,
            "kicks.sent": 200 + flushes * now,
            "tlbs_dirty.raised": 0 if now else 50,
        }

    return rows_of("lazy-flush", metrics)


def test_a_deferral_that_saves_nothing_is_said_to_save_nothing_and_why() -> None:
    answer = analyse("lazy-flush", flush_table(1.001, 1.0, flushes=1)).answer
    assert answer.startswith("Putting the flush off saves next to nothing: at none of 24 points")
    assert "Few flushes are saved because" in answer


def test_a_deferral_that_pays_is_said_to_pay_also_when_its_fix_takes_it_away() -> None:
    answer = analyse("lazy-flush", flush_table(1.25, 1.25, flushes=400)).answer
    assert answer.startswith(
        "Putting the flush off saves 2 % or more of the cycles per instruction at 24 of 24 points"
    )
    assert "fork at 2 vCPUs (20.0 %)" in answer
    assert "With the deferral mended (bug A1) it saves 2 % or more nowhere for certain" in answer
    assert "Few flushes" not in answer


def test_a_deferral_that_costs_is_said_to_cost() -> None:
    answer = analyse("lazy-flush", flush_table(0.8, 1.0, flushes=1)).answer
    assert "at 0 of 24 points" in answer
    assert "It costs as much at fork at 2 vCPUs (-25.0 %)" in answer


# --- unsync pages -------------------------------------------------------------------------------------------------


def unsync_table(cycles: Callable[[Values], float]) -> pl.DataFrame:
    """`cycles` of an iteration of a run."""
    return rows_of(
        "unsync",
        lambda run: {
            "iteration_cycles": cycles(run.point.parameters),
            "guest.iterations": 10,
            "timed.exits": 100,
            "kvm.mmu_flooded": 0 if run.point.parameters["oos_shadow"] else 10,
        },
    )


def test_full_tables_turn_the_balance_if_an_entry_costs_enough() -> None:
    def cycles(values: Values) -> float:
        if not values["oos_shadow"]:
            return 10_000.0 * int(values["load.edits"])
        return 5_000.0 * int(values["load.edits"]) + 100.0 * int(values["load.pages"]) * float(
            values["cost.spte_set"]
        )

    answer = analyse("unsync", unsync_table(cycles)).answer
    assert answer.startswith("It depends on how full the table is: by cascadelake-2019")
    assert "from the first edit on in a table of 8 pages" in answer
    assert (
        "from 10.8 edits on in a table of 512 pages" in answer
    )  # 10.24, but for the lines between the points
    assert "It depends on the price of an entry" in answer
    assert "From 1 edit on a write-protected page is taken for flooded" in answer


@pytest.mark.parametrize(
    "unsync, said",
    [
        (0.5, "Unsync pages are cheaper everywhere: they take 50 % to 50 %"),
        (2.0, "Unsync pages are nowhere cheaper"),
    ],
)
def test_unsync_pages_may_win_or_lose_everywhere(unsync: float, said: str) -> None:
    found = analyse("unsync", unsync_table(lambda values: 1000.0 * (unsync if values["oos_shadow"] else 1.0)))
    assert found.answer.startswith(said)
    assert "That does not depend on the price of an entry" in found.answer


@pytest.mark.parametrize(
    "ratio, said",
    [
        (2.0, "faster at 24 of 24 points"),
        (0.5, "slower at 24"),
        (1.0, "faster at 0 of 24 points and slower at 0"),
    ],
)
def test_programs_are_faster_or_slower_with_unsync_pages(ratio: float, said: str) -> None:
    table = rows_of(
        "unsync-loads",
        lambda run: (
            CAUSES
            | {
                "cause.guest": 1000.0,
                "vcpu.instructions": 100,
                "lock_held": 10,
                "iteration_cycles": (1000.0 + run.replicate)
                * (1.0 if run.point.parameters["oos_shadow"] else ratio),
            }
        ),
    )
    assert said in analyse("unsync-loads", table).answer
