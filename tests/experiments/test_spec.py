"""An experiment's file is checked before anything runs, and an error names the file and the key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shadowmmu.experiments.design import check_points, points_of
from shadowmmu.experiments.spec import SpecError, SweepSpec, find_spec, load_spec, parse_spec
from tests.experiments.conftest import spec_of

HEAD = 'title = "t"\nkind = "explore"\n'


@pytest.mark.parametrize(
    "text, key, why",
    [
        ("title = ", "", "this is no TOML"),
        ('kind = "explore"', "", "missing required field title"),
        ('title = "t"\nkind = "walk"', "kind", "Invalid enum value 'walk'"),
        (HEAD + "colour = 1", "", "unknown field colour"),
        (HEAD + 'replicates = "two"', "replicates", "Expected int, got str"),
        (HEAD + "replicates = 0", "replicates", "Expected int >= 1"),
        (HEAD + "seed = -1", "seed", "Expected int >= 0"),
        (HEAD + "timeout = 0.0", "timeout", "Expected float > 0.0"),
        (HEAD + "[fixed]", "fixed", "this is empty"),
        (HEAD + "[grid]", "grid", "this is empty"),
        (HEAD + "[fixed]\nops = 1\n[fixed.load]", "fixed.load", "this is empty"),
        (HEAD + "[grid]\nops = [1]\n[grid.run]", "grid.run", "this is empty"),
        (HEAD + "fixed = " + "[" * 10_000, "", "this is no TOML"),
        (HEAD + "seed = " + "1" * 5_000, "", "this is no TOML"),
        (HEAD + "[fixed]\ntest = 'a\\u0000b'".replace("'", '"'), "fixed.test", "a null character"),
        (HEAD + "points = []", "points", "this is empty"),
        (HEAD + "fixed = 3", "fixed", "a table of parameters, not a number"),
        (HEAD + "points = 3", "points", "begun by [[points]], not a number"),
        (HEAD + "[[points]]", "points[0]", "this is empty"),
        (HEAD + "[grid]\nexecutions = []", "grid.executions", "this list is empty"),
        (HEAD + "[grid]\nexecutions = 3", "grid.executions", "a list of values, not a number"),
        (HEAD + "[grid]\nexecutions = [3, 3]", "grid.executions", "a value is there twice"),
        (HEAD + "[grid]\nexecutions = [[3]]", "grid.executions", "a value is a truth value, a number or a text, not a list"),
        (HEAD + "[fixed]\nexecutions = [3]", "fixed.executions", "not a list"),
        (HEAD + "[fixed]\nexecutions = nan", "fixed.executions", "nan is no finite number"),
        (HEAD + "[fixed]\nexecutions = 2026-01-01", "fixed.executions", "not a date"),
        (HEAD + "[fixed]\nexecutions = 0", "fixed.executions", "Expected int >= 1"),
        (HEAD + "[fixed]\nexecutions = 1.5", "fixed.executions", "Expected int, got float"),
        (HEAD + "[fixed]\nstrategy = 'luck'", "fixed.strategy", "Invalid enum value 'luck'"),
        (HEAD + "[fixed]\nspeed = 1", "fixed.speed", "there is no such parameter; there are executions, first"),
        (HEAD + "[fixed]\nload.pages = 1", "fixed.load.pages", "there is no such parameter"),
        (HEAD + "[fixed]\nops = 1\n[grid]\nops = [2]", "grid.ops", "clashes with fixed.ops"),
        (HEAD + "[fixed]\nops = 1\n[[points]]\nops = 2", "points.ops", "clashes with fixed.ops"),
        (HEAD + "[[points]]\nops = 2\n[[points]]\nops = 2", "points[1]", "this is points[0] again"),
        (HEAD + "[grid]\nops = [1]\n[[plots]]\ntitle = 'p'", "plots[0]", "missing required field x"),
        (
            HEAD + "[grid]\nops = [1]\n[[plots]]\ntitle = 'p'\nx = 'ops'\ny = 'f'\ncolor = 'hue'",
            "plots[0].color",
            "'hue' is no parameter of this sweep; there are ops",
        ),
        (HEAD + "[grid]\nops = [1]\n[[plots]]\ntitle = 'p'\nx = 'f'\ny = 'ops'", "plots[0].y", "'ops' is a parameter"),
        (HEAD + "metrics = ['k*']\n[grid]\nops = [1]\n[[plots]]\ntitle = 'p'\nx = 'ops'\ny = 'f'", "plots[0].y", "no pattern of metrics keeps 'f'"),
        (HEAD + "analysis = 'guess'", "analysis", "there is none called 'guess'"),
        (HEAD + "replicates = 100000\n[grid]\nops = [1,2]", "grid", "these would be 200000 runs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_key(text: str, key: str, why: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(text, "some.toml")
    assert str(error.value).startswith(f"some.toml: {key}: " if key else "some.toml: ")
    assert error.value.key == key
    assert why in error.value.text


def test_dots_and_quotes_are_the_same_parameter() -> None:
    with pytest.raises(SpecError, match=r"fixed\.a\.b: this is there twice"):
        parse_spec(HEAD + '[fixed]\na.b = 1\n"a.b" = 2', "some.toml")


def test_points_that_lack_a_parameter_have_its_default() -> None:
    spec = spec_of("[[points]]\nops = 5\n[[points]]\nexecutions = 9\ntest = 'none'\n")
    assert spec.points == [
        {"ops": 5, "executions": 1000, "test": "none"},
        {"ops": 200, "executions": 9, "test": "none"},
    ]


def test_explicit_points_are_combined_with_the_grid() -> None:
    spec = spec_of(
        "[fixed]\nfirst = true\n[[points]]\nops = 1\n[[points]]\nops = 2\n[grid]\nvcpus = [3, 4]\n"
    )
    assert [tuple(point.parameters.values()) for point in points_of(spec)] == [
        (True, 1, 3),
        (True, 1, 4),
        (True, 2, 3),
        (True, 2, 4),
    ]


def test_a_spec_survives_the_way_into_a_file_and_back() -> None:
    spec = spec_of(
        "[fixed]\nfirst = false\n[grid]\nops = [1, 2]\nstrategy = ['pct']\n[[plots]]\ntitle='p'\nx='ops'\ny='f'\n"
    )
    assert msgspec.json.decode(msgspec.json.encode(spec), type=SweepSpec) == spec


@pytest.mark.parametrize(
    "text, why",
    [
        ("[fixed]\nops = 5\n", "test: name a litmus test, or a workload"),
        ("[grid]\ntest = ['cr3-global', 'no-such-test']\n", "no litmus test of that name"),
        ("[fixed]\ntest = 'cr3-global'\nprofile = 'linux-9'\n", "linux-9"),
        ("[fixed]\ntest = 'cr3-global'\nworkload = 'fork'\n", "there is a test already"),
        ("[fixed]\nworkload = 'fork'\nmode = 'pae'\n", "run workload modes only"),
    ],
)
def test_values_that_do_not_go_together_are_found_before_anything_runs(text: str, why: str) -> None:
    with pytest.raises(SpecError, match=r"^some\.toml: ") as error:
        check_points(spec_of(text), "some.toml")
    assert why in str(error.value)


def test_a_folder_called_like_a_shipped_experiment_is_no_file_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shadowmmu sweep vpid --out vpid`, the second time."""
    monkeypatch.chdir(tmp_path)
    shipped = find_spec("vpid")
    (tmp_path / "vpid").mkdir()
    assert find_spec("vpid") == shipped
    (tmp_path / "vpid").rmdir()
    (tmp_path / "vpid").write_text('title = "Mine"\nkind = "explore"\n')
    assert find_spec("vpid").title == "Mine"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Is a directory"):
        load_spec(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="this is no text"):
        load_spec(tmp_path / "binary.toml")
    with pytest.raises(SpecError, match="there is no such file, and no experiment of that name"):
        find_spec("no-such-experiment")
