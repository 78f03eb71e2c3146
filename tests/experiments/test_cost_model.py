"""Cost models: what is shipped is complete, and gives LMbench's figures for one process; what is not is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from shadowmmu.cli.costs import costs
from shadowmmu.cpu.loads import WORK
from shadowmmu.experiments.cost_model import (
    CostModelError,
    Label,
    cost_model_names,
    load_cost_model,
    scaled,
)
from shadowmmu.machine.costs import Costs
from tests.experiments.lmbench import LINES, Line, figures, table

MODEL = load_cost_model("cascadelake-2019")
SHIPPED = Path(__file__).parents[2] / "services" / "shadowmmu" / "experiments" / "cost_models"
DOCS = Path(__file__).parents[2] / "docs" / "COST_MODELS.md"
FITTED = 0.08
CHECKED = 0.25


def test_three_models_are_shipped() -> None:
    assert cost_model_names() == ["cascadelake-2019", "nehalem-2011", "p4-2006"]


@pytest.mark.parametrize("name", cost_model_names())
def test_a_shipped_model_prices_everything(name: str) -> None:
    model = load_cost_model(name)
    assert model.name == name
    assert model.costs.guest.keys() == WORK.keys()
    for constant in model.constants.values():
        if constant.label is Label.UNVERIFIED:
            assert constant.high >= 1.5 * constant.low or not constant.cycles, "an estimate has a wide range"


@pytest.mark.parametrize("name", cost_model_names())
def test_a_model_is_read_from_a_file_too(name: str) -> None:
    assert load_cost_model(SHIPPED / f"{name}.toml") == load_cost_model(name)
    assert load_cost_model(str(SHIPPED / f"{name}.toml")) == load_cost_model(name)


# --- the figures that were published --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed() -> dict[str, tuple[float, float]]:
    return figures(MODEL)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.title)
def test_the_model_gives_lmbenchs_figures_for_one_process(
    line: Line, computed: dict[str, tuple[float, float]]
) -> None:
    ept, shadow = computed[line.title]
    assert ept == pytest.approx(line.ept, rel=FITTED if line.ept_for else CHECKED)
    assert shadow == pytest.approx(line.shadow, rel=FITTED if line.shadow_for else CHECKED)


def test_the_documents_table_is_what_the_model_gives(computed: dict[str, tuple[float, float]]) -> None:
    assert table(computed) in DOCS.read_text(), (
        "run python -m tests.experiments.lmbench and put its table there"
    )


def test_round_trips_are_the_published_ones() -> None:
    price = MODEL.costs
    assert MODEL.microseconds(price.exit + price.entry) == pytest.approx(0.46, rel=0.01)
    exception = price.exit + price.entry + price.emulate + price.inject + price.fault_delivery
    assert MODEL.microseconds(exception) == pytest.approx(1.66, rel=0.01)


def test_the_pentiums_faults_are_the_published_ones() -> None:
    price = load_cost_model("p4-2006").costs
    walk = 4 * price.guest_walk_level
    around = price.exit + price.entry + price.page_fault + walk
    assert around + price.inject + price.fault_delivery == pytest.approx(11242, rel=0.01)
    assert around + price.emulate + price.pte_write == pytest.approx(12733, rel=0.01)


# --- factors --------------------------------------------------------------------------------------------------------


def test_a_factor_multiplies_one_constant() -> None:
    costs_now = scaled(MODEL, {"spte_set": 10.0, "guest.fork": 0.1}).costs
    assert costs_now.spte_set == 10 * MODEL.costs.spte_set
    assert costs_now.guest["fork"] == MODEL.costs.guest["fork"] // 10
    back = msgspec.structs.replace(costs_now, spte_set=MODEL.costs.spte_set, guest=MODEL.costs.guest)
    assert back == MODEL.costs


def test_factors_of_factors_are_multiplied() -> None:
    assert scaled(scaled(MODEL, {"exit": 4.0}), {"exit": 0.25}).costs == MODEL.costs


@pytest.mark.parametrize("factor", [-1.0, math.inf, math.nan])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(CostModelError, match="exit cannot be multiplied"):
        scaled(MODEL, {"exit": factor})


@pytest.mark.parametrize("name", ["exits", "guest", "guest.nap", "fork"])
def test_a_factor_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(CostModelError, match=f"no constant '{name}'"):
        scaled(MODEL, {name: 2.0})


# --- what is no cost model ------------------------------------------------------------------------------------------

HEADING: dict[str, object] = {"name": "m", "title": "t", "processor": "p", "ghz": 1.0, "kernel": "k"}
CONSTANT: dict[str, object] = {"cycles": 1, "low": 0, "high": 2, "label": "U", "source": "a test"}
Tables = dict[str, dict[str, dict[str, object]]]


def content() -> Tables:
    """The constants of a whole model."""
    names = [name for name in Costs.__struct_fields__ if name != "guest"]
    return {
        "costs": {name: dict(CONSTANT) for name in names},
        "guest": {name: dict(CONSTANT) for name in WORK},
    }


def write(folder: Path, tables: Tables) -> Path:
    """A model's file."""
    sections = {"model": HEADING}
    for title, constants in tables.items():
        sections |= {f"{title}.{name}": constant for name, constant in constants.items()}
    lines = []
    for title, values in sections.items():
        lines.append(f"[{title}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = folder / "m.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    assert load_cost_model(write(tmp_path, content())).costs.spte_set == 1


@pytest.mark.parametrize("text", ["= 1", f"a = {'[' * 10_000}", f"a = 1{'0' * 5000}", "a = '\udcff'"])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CostModelError, match=r"m\.toml"):
        load_cost_model(tmp_path / "m.toml")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"cycles": 3}, "3 cycles are not in the range 0 to 2"),
        ({"cycles": -1}, "cycles"),
        ({"cycles": 1.5}, "cycles"),
        ({"low": 2}, "not in the range"),
        ({"source": ""}, "source"),
        ({"label": "X"}, "label"),
        ({"label": "D"}, "note"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_bad_constant_is_refused(change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    model = content()
    model["costs"]["exit"].update(change)
    with pytest.raises(CostModelError, match=complaint) as error:
        load_cost_model(write(tmp_path, model))
    assert "m.toml" in str(error.value)


@pytest.mark.parametrize("table_name, name", [("costs", "exit"), ("guest", "fork")])
def test_a_missing_constant_and_one_too_many_are_refused(table_name: str, name: str, tmp_path: Path) -> None:
    model = content()
    constant = model[table_name].pop(name)
    with pytest.raises(CostModelError, match=rf"\[{table_name}\] has no {name}"):
        load_cost_model(write(tmp_path, model))
    model[table_name] |= {name: constant, "nap": constant}
    with pytest.raises(CostModelError, match=rf"\[{table_name}\] knows no nap"):
        load_cost_model(write(tmp_path, model))


@pytest.mark.parametrize("data", [b"", b"[model", b"\xff\xfe", b"model = 1", b"[model]\nname = 'x'"])
def test_a_file_that_is_something_else_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_bytes(data)
    with pytest.raises(CostModelError, match=r"m\.toml"):
        load_cost_model(tmp_path / "m.toml")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CostModelError, match="there are cascadelake-2019, nehalem-2011, p4-2006"):
        load_cost_model("z80")
    with pytest.raises(CostModelError, match=r"cannot read .*none\.toml: No such file"):
        load_cost_model(tmp_path / "none.toml")
    with pytest.raises(CostModelError, match="directory"):
        load_cost_model(tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_lists_models_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    costs(None)
    listed = capsys.readouterr().out
    assert all(name in listed for name in cost_model_names())
    costs("p4-2006")
    figures = capsys.readouterr().out
    assert all(name in figures for name in load_cost_model("p4-2006").constants)


def test_the_command_knows_no_other_model() -> None:
    import typer

    app = typer.Typer()
    app.command()(costs)
    result = CliRunner().invoke(app, ["z80"])
    assert result.exit_code != 0
    assert "no cost model 'z80'" in result.output
