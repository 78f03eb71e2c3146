"""`shadowmmu runs`, and what the other commands enter."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.cli.runs import compared
from shadowmmu.experiments.catalogue import Catalogue, enter
from tests.experiments.test_catalogue import an_entry

USAGE = 64
Invoke = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.sqlite"


@pytest.fixture
def runs(place: Path) -> Invoke:
    """`shadowmmu runs ARGUMENTS` with the catalogue of the test."""

    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["runs", *map(str, arguments), "--catalogue", str(place)])

    return invoke


def numbers(place: Path) -> list[int]:
    with Catalogue(place) as catalogue:
        return [run.number for run in catalogue.runs()]


def a_folder(path: Path) -> Path:
    path.mkdir()
    (path / "report.json").write_text("{}")
    return path


def test_stress_is_entered_when_a_catalogue_is_asked_for(tmp_path: Path, place: Path, runs: Invoke) -> None:
    stress = ["stress", "--in-process", "--vcpus", "2", "--ops", "2000", "--seed", "5"]
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "SHADOWMMU_CATALOGUE": None, "XDG_STATE_HOME": None}
    assert CliRunner().invoke(app, stress, env=environment).exit_code == 0
    assert list(home.iterdir()) == []
    out = ["--out", str(tmp_path / "run")]
    assert CliRunner().invoke(app, [*stress, *out, "--catalogue", str(place)], env=environment).exit_code == 0
    assert (
        CliRunner().invoke(app, stress, env=environment | {"SHADOWMMU_CATALOGUE": str(place)}).exit_code == 0
    )
    assert CliRunner().invoke(app, [*stress, "--catalogue", "default"], env=environment).exit_code == 0
    assert (home / ".local/state/shadowmmu/catalogue.sqlite").exists()
    kept, lost = reversed(json.loads(runs("list", "--json").stdout))
    assert kept["folder"] == str(tmp_path / "run") and lost["folder"] is None
    assert kept["kind"] == "stress" and kept["verdict"] == "pass"
    assert kept["configuration"]["vcpus"] == 2 and kept["configuration"]["seed"] == 5
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert kept["started"] == report["started"]
    assert kept["metrics"]["vcpu.instructions"] == report["counters"]["vcpu.instructions"]


def test_a_sweep_is_entered(tmp_path: Path, place: Path, runs: Invoke) -> None:
    file = tmp_path / "e.toml"
    file.write_text('title = "One"\nkind = "explore"\n[fixed]\ntest = "cr3-global"\nexecutions = 1\n')
    arguments = ["sweep", str(file), "--out", str(tmp_path / "out"), "--catalogue", str(place), "--jobs", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    shown = json.loads(runs("show", tmp_path / "out", "--json").stdout)
    assert (shown["kind"], shown["verdict"]) == ("sweep", "pass")
    assert shown["text"] == "One: 1 of 1 runs have ended, 0 of them failed"
    assert shown["metrics"]["digest"] == (tmp_path / "out" / "results.digest").read_text().strip()


def test_list_and_show_say_what_is_known(tmp_path: Path, place: Path, runs: Invoke) -> None:
    enter(place, an_entry(tmp_path / "gone", "first [bold]"))
    enter(place, an_entry(None, "second"))
    listed = runs("list").stdout
    assert listed.index("second") < listed.index("first [bold]")
    assert "(gone)" in listed.replace("\n", "")
    assert "second" not in runs("list", "--verdict", "violated").stdout
    assert "second" not in runs("list", "--kind", "sweep").stdout
    shown = runs("show", 2).stdout
    assert "Folder: not kept" in shown and "Verdict: pass: second" in shown
    assert ["rate", "0.5"] in [line.split() for line in shown.splitlines()]


def test_compare_puts_counters_side_by_side(place: Path, runs: Invoke) -> None:
    def metrics(**values: Any) -> int:
        values["vcpu.instructions"] = values.pop("instructions")
        entry = an_entry()
        return enter(
            place,
            type(entry)(**{f: getattr(entry, f) for f in entry.__struct_fields__} | {"metrics": values}),
        )

    metrics(instructions=1000, faults=10, rate=2.0, only=1, digest="a", zero=0)
    metrics(instructions=2000, faults=40, rate=3.0, digest="b", zero=5)
    compared = json.loads(runs("compare", 1, 2, "--json").stdout)
    assert compared["configuration"] == {}
    assert compared["metrics"] == {
        "faults": [10, 40, 4.0, 2.0],
        "rate": [2.0, 3.0, 1.5, None],
        "only": [1, None, None, None],
        "digest": ["a", "b", None, None],
        "zero": [0, 5, None, None],
        "vcpu.instructions": [1000, 2000, 2.0, 1.0],
    }
    text = runs("compare", 1, 2).stdout
    assert ["faults", "10", "40", "4", "2"] in [line.split() for line in text.splitlines()]


def test_without_instructions_nothing_is_per_instruction() -> None:
    assert compared({"a": 1, "b": True}, {"a": 2, "b": False}) == [
        ("a", 1, 2, 2.0, None),
        ("b", True, False, None, None),
    ]


def test_prune_takes_out_entries_without_a_folder(tmp_path: Path, place: Path, runs: Invoke) -> None:
    enter(place, an_entry(tmp_path / "gone"))
    enter(place, an_entry(a_folder(tmp_path / "there")))
    enter(place, an_entry(None))
    assert "1 of 3 entries would be removed" in runs("prune", "--dry-run").stdout
    assert numbers(place) == [1, 2, 3]
    assert "1 of 3 entries removed" in runs("prune").stdout
    assert numbers(place) == [2, 3]


def test_prune_takes_out_what_is_too_much_or_too_old(place: Path, runs: Invoke) -> None:
    for _ in range(5):
        enter(place, an_entry())
    database = sqlite3.connect(place)
    database.execute("UPDATE runs SET entered = '2020-01-01T00:00:00+00:00' WHERE id = 4")
    database.commit()
    database.close()
    assert runs("prune", "--older-than", 365).exit_code == 0
    assert numbers(place) == [1, 2, 3, 5]
    assert runs("prune", "--keep", 2).exit_code == 0
    assert numbers(place) == [3, 5]
    assert runs("prune", "--keep", 9).exit_code == 0
    assert numbers(place) == [3, 5]
    assert runs("prune", "--keep", 0).exit_code == 0
    assert numbers(place) == []


def test_folders_are_deleted_only_when_asked_and_only_those_of_runs(
    tmp_path: Path, place: Path, runs: Invoke
) -> None:
    run, shared, other = a_folder(tmp_path / "run"), a_folder(tmp_path / "shared"), tmp_path / "other"
    other.mkdir()
    for folder in (run, shared, other, shared):
        enter(place, an_entry(folder))
    runs("prune", "--keep", 1, "--folders", "--dry-run")
    assert run.exists()
    done = runs("prune", "--keep", 1, "--folders")
    assert f"{run} deleted" in done.stdout.replace("\n", "")
    assert (
        "another entry has it, or a folder in it" in done.stdout
        and "it has none of report.json" in done.stdout
    )
    assert (run.exists(), shared.exists(), other.exists()) == (False, True, True)
    runs("prune", "--keep", 0)
    assert shared.exists()


def test_a_folder_in_which_a_run_stays_is_not_deleted_whatever_it_is_called(
    tmp_path: Path, place: Path, runs: Invoke
) -> None:
    outer = a_folder(tmp_path / "outer")
    inner = a_folder(outer / "inner")
    (tmp_path / "link").symlink_to(outer)
    for folder in (outer, inner, tmp_path / "link" / "inner"):
        enter(place, an_entry(folder))
    done = runs("prune", "--keep", 1, "--folders")
    assert done.stdout.replace("\n", "").count("another entry has it, or a folder in it") == 2
    assert inner.exists()
    assert json.loads(runs("show", inner, "--json").stdout)["run"] == 3


def test_a_run_whose_folder_cannot_be_deleted_stays(
    tmp_path: Path, place: Path, runs: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(place, an_entry(a_folder(tmp_path / "run")))
    enter(place, an_entry())

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    done = runs("prune", "--keep", 0, "--folders")
    assert "Permission denied" in done.stderr
    assert "1 of 2 entries removed" in done.stdout
    assert numbers(place) == [1]


def test_a_folder_that_one_may_not_look_for_is_not_gone(
    tmp_path: Path, place: Path, runs: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(place, an_entry(tmp_path / "private" / "run"))
    exists = Path.exists

    def refuse(path: Path) -> bool:
        if "private" in path.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    listed = runs("list")
    assert listed.exit_code == 0 and "(gone)" not in listed.stdout.replace("\n", "")
    assert "0 of 1 entries removed" in runs("prune").stdout


@pytest.mark.parametrize("days", ["1e300", "inf"])
def test_nothing_is_older_than_any_number_of_days(place: Path, runs: Invoke, days: str) -> None:
    enter(place, an_entry())
    assert "0 of 1 entries removed" in runs("prune", "--older-than", days).stdout


@pytest.mark.parametrize("arguments", [["list"], ["show", "1"], ["compare", "1", "2"], ["prune"]])
def test_a_catalogue_that_is_not_there_is_a_usage_error(runs: Invoke, arguments: list[str]) -> None:
    done = runs(*arguments)
    assert done.exit_code == USAGE
    assert "there is no catalogue" in " ".join(done.stderr.split())


def test_a_run_that_is_not_there_is_a_usage_error(place: Path, runs: Invoke) -> None:
    enter(place, an_entry())
    assert runs("show", 2).exit_code == USAGE
    assert runs("show", "1" * 5000).exit_code == USAGE
    assert runs("compare", 1, "/nowhere").exit_code == USAGE


def test_a_catalogue_that_cannot_be_written_does_not_spoil_the_run(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no database " * 100)
    stress = ["stress", "--in-process", "--vcpus", "1", "--ops", "100", "--catalogue", str(notes)]
    done = CliRunner().invoke(app, stress)
    assert done.exit_code == 0
    assert "The run is not in the catalogue" in done.stderr
