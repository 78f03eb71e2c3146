"""What a sweep says without an analysis of its own: means, intervals, and the plots that it declares."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from shadowmmu.experiments.findings import Findings, FindingsError, findings_of, general_findings
from shadowmmu.experiments.results import open_sweep
from tests.experiments.conftest import spec_of, stub_sweep

TABLE = pl.DataFrame(
    {
        "point": [0, 0, 1, 1, 2],
        "ops": [1, 1, 2, 2, 3],
        "first": [True, True, False, False, True],
        "status": ["ok", "ok", "ok", "ok", "failed"],
        "time.mean": [1.0, 3.0, 5.0, 5.0, None],
        "digest": ["a", "b", "c", "d", None],
    }
)
POINTS = "replicates = 2\n[[points]]\nops = 1\nfirst = true\n[[points]]\nops = 2\nfirst = false\n[[points]]\nops = 3\nfirst = true\n"


def plot(**fields: object) -> str:
    given = {"title": "Time", "x": "ops", "y": "time.mean"} | fields
    values = {
        name: str(value).lower() if isinstance(value, bool) else f"'{value}'" for name, value in given.items()
    }
    return "[[plots]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


def test_means_and_intervals_per_point_without_what_has_failed() -> None:
    said = general_findings(spec_of(POINTS), TABLE)
    assert "1 of 5 runs have failed" in said.answer
    [(title, table)] = said.tables
    assert title == "Means per point"
    assert table.select("ops", "first", "runs", "time.mean").rows() == [(1, True, 2, 2.0), (2, False, 2, 5.0)]
    assert table["time.mean.low"].to_list() == [pytest.approx(2.0 - 12.7062047), 5.0]
    assert "digest" not in table.columns


def test_declared_plots_are_drawn_with_intervals() -> None:
    text = (
        POINTS + plot(log_x=True, color="first", x_title="Operations") + plot(title="Panels", facet="first")
    )
    lines, panels = (chart for _, chart in general_findings(spec_of(text), TABLE).charts)
    drawn = lines.to_dict()
    points, bars = drawn["layer"]
    assert points["encoding"]["x"]["scale"]["type"] == "log"
    assert points["encoding"]["x"]["title"] == "Operations"
    assert points["encoding"]["y"]["title"] == "time.mean"
    assert bars["encoding"]["y2"]["field"] == "high"
    [data] = drawn["datasets"].values()
    assert [(row["x"], row["y"], row["color"]) for row in data] == [(1, 2.0, "true"), (2, 5.0, "false")]
    assert panels.to_dict()["facet"]["title"] == "first"


def test_a_plot_of_what_was_not_measured_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(FindingsError, match=r"plot 'Time': there is no column 'speed'; there are time\.mean"):
        general_findings(spec_of(POINTS + plot(y="speed")), TABLE)
    with pytest.raises(FindingsError, match="'digest' is no number"):
        general_findings(spec_of(POINTS + plot(y="digest")), TABLE)


def test_nothing_is_said_of_runs_that_all_failed() -> None:
    said = general_findings(spec_of(POINTS + plot()), TABLE.filter(pl.col("status") == "failed"))
    assert said == Findings("No run has succeeded.")


@pytest.mark.processes
def test_a_sweep_is_analysed_by_the_module_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("[fixed]\ntest = 'good'\n")
    stub_sweep(tmp_path, spec)
    assert findings_of(open_sweep(tmp_path)).tables[0][1]["length"].to_list() == [4.0]
    asked: list[str] = []

    def load(name: str) -> ModuleType:
        asked.append(name)
        module = ModuleType(name)
        vars(module)["analyse"] = lambda table: Findings(f"{table.height} runs")
        return module

    monkeypatch.setattr("shadowmmu.experiments.findings.importlib.import_module", load)
    header = (tmp_path / "sweep.json").read_text()
    (tmp_path / "sweep.json").write_text(header.replace('"analysis": null', '"analysis": "fork-scaling"'))
    assert findings_of(open_sweep(tmp_path)).answer == "1 runs"
    assert asked == ["shadowmmu.experiments.analyses.fork_scaling"]
