"""The catalogue keeps every run that is entered, also when many are at once, and is nobody else's database."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from shadowmmu.experiments.catalogue import Catalogue, CatalogueError, Entry, default_catalogue, enter

WRITER = """
import sys
from pathlib import Path
from tests.experiments.test_catalogue import an_entry
from shadowmmu.experiments.catalogue import enter
for number in range(25):
    enter(Path(sys.argv[1]), an_entry(text=f"{sys.argv[2]}.{number}"))
"""


def an_entry(folder: Path | None = None, text: str = "all is well") -> Entry:
    return Entry(
        kind="stress",
        folder=folder,
        started="2026-01-01T00:00:00+00:00",
        code="0.1.0",
        verdict="pass",
        text=text,
        configuration={"vcpus": 4, "tdp": None},
        metrics={"rate": 0.5, "count": 1 << 40, "digest": "ab", "none": None, "found": True},
    )


def test_what_is_entered_is_there_in_order(tmp_path: Path) -> None:
    place = tmp_path / "new" / "catalogue.sqlite"
    assert enter(place, an_entry()) == 1
    assert enter(place, an_entry(tmp_path, "second")) == 2
    with Catalogue(place) as catalogue:
        assert [run.number for run in catalogue.runs()] == [1, 2]
        assert catalogue.find("1").entry == an_entry()
        assert catalogue.find(str(tmp_path)).entry == an_entry(tmp_path, "second")
        catalogue.remove([1, 77])
        assert [run.number for run in catalogue.runs()] == [2]
        with pytest.raises(CatalogueError, match="there is no run '1'"):
            catalogue.find("1")
    assert enter(place, an_entry()) == 3  # numbers are not used again


@pytest.mark.processes
def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """Nor do they when none of them finds a catalogue there."""
    place = tmp_path / "catalogue.sqlite"
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(place), str(number)], cwd=root)
        for number in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    with Catalogue(place) as catalogue:
        texts = [run.entry.text for run in catalogue.runs()]
    assert sorted(texts) == sorted(f"{writer}.{number}" for writer in range(4) for number in range(25))


def test_files_that_are_no_catalogue_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and more than a few of them" * 100)
    other = tmp_path / "other.sqlite"
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE mine (a)")
    database.commit()
    database.close()
    newer = tmp_path / "newer.sqlite"
    enter(newer, an_entry())
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version = 2")
    database.close()
    for path, why in ((text, "not a database"), (other, "of another program"), (newer, "is of version 2")):
        before = path.read_bytes()
        with pytest.raises(CatalogueError, match=why):
            enter(path, an_entry())
        assert path.read_bytes() == before
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(CatalogueError, match="is no catalogue of runs"):
        Catalogue(empty)
    assert empty.stat().st_size == 0
    with pytest.raises(CatalogueError, match="there is no catalogue"):
        Catalogue(tmp_path / "nowhere.sqlite")
    with pytest.raises(CatalogueError, match=str(text)):
        enter(text / "catalogue.sqlite", an_entry())
    with pytest.raises(CatalogueError, match="File name too long"):
        Catalogue(tmp_path / ("a" * 300))


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    place = tmp_path / "catalogue.sqlite"
    enter(place, an_entry())
    database = sqlite3.connect(place)
    for damage in ("metrics = '{'", f"metrics = '{'[' * 10_000}'", "metrics = '{}', entered = 'yesterday'"):
        database.execute(f"UPDATE runs SET {damage}")
        database.commit()
        with Catalogue(place) as catalogue, pytest.raises(CatalogueError, match="entry 1 is damaged"):
            catalogue.runs()
    database.close()


def test_the_usual_place_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_catalogue({"XDG_STATE_HOME": "/state"}) == Path("/state/shadowmmu/catalogue.sqlite")
    monkeypatch.setenv("HOME", "/home/somebody")
    for environment in ({}, {"XDG_STATE_HOME": "relative"}):
        assert default_catalogue(environment) == Path(
            "/home/somebody/.local/state/shadowmmu/catalogue.sqlite"
        )


def test_a_user_without_a_home_has_no_usual_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CatalogueError, match="Could not determine home directory"):
        default_catalogue({})
