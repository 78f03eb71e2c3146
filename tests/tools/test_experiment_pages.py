"""Pages of experiments: all of a finished sweep, the same bytes whenever they are made; none of an unfinished one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import polars as pl
import pytest

from shadowmmu.experiments.design import runs_of
from shadowmmu.experiments.folder import SweepWriter
from shadowmmu.experiments.point import Outcome
from shadowmmu.experiments.results import open_sweep
from shadowmmu.experiments.spec import parse_spec
from shadowmmu.experiments.table import row_of
from tools.experiment_pages.campaign import begin
from tools.experiment_pages.pages import (
    PageError,
    cell_text,
    first_sentence,
    index_of,
    markdown_table,
    write_page,
    write_pages,
)
from tools.experiment_pages.provenance import PROVENANCE_NAME, Provenance, read_provenance

SPEC = """
title = "Forks | and locks"
question = "How long does\\na fork take?"
kind = "virtual"
replicates = 2
seed = 5

[fixed]
load.load = "fork"

[grid]
vcpus = [1, 2]

[[plots]]
title = "Time of a fork"
x = "vcpus"
y = "iteration_us"
"""


def _sweep(folder: Path, *, missing: int = 0, failed: bool = False) -> Path:
    """A sweep as if it had been run: a fork takes 100 microseconds per vCPU, and the second replicate one more."""
    spec = parse_spec(SPEC, "spec")
    runs = runs_of(spec)
    with SweepWriter(folder, spec, "1.2.3") as writer:
        for run in runs[: len(runs) - missing]:
            took = 100.0 * int(run.point.parameters["vcpus"]) + run.replicate
            writer.add(row_of(run, Outcome({"iteration_us": took, "steps": 10})))
        if failed:
            writer.add(row_of(runs[-1], Outcome(None, "no memory", "")))
        writer.compact()
    return folder


def test_a_page_says_what_was_asked_and_run_and_found(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "forks")
    write_page(folder, tmp_path)
    page = (tmp_path / "forks.md").read_text()
    assert page.startswith("# Forks | and locks\n")
    assert "How long does a fork take?" in page
    assert open_sweep(folder).digest() in page
    assert "| seed of the sweep | 5 |" in page
    assert "`cascadelake-2019`" in page
    assert "| steps of the simulator | 40 |" in page
    assert "| 1 | 2 | 100.5 [94.15, 106.9] |" in page
    assert "![Time of a fork](forks.1.svg)" in page
    assert (tmp_path / "forks.1.svg").read_text().startswith("<svg")


def test_the_same_sweep_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "forks")
    write_pages([folder], tmp_path / "a")
    write_pages([folder], tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "forks.1.svg", "forks.md"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_plot_that_is_no_more_takes_its_picture_along(tmp_path: Path) -> None:
    (tmp_path / "forks.7.svg").write_text("old")
    (tmp_path / "forks-too.1.svg").write_text("another page's")
    write_page(_sweep(tmp_path / "forks"), tmp_path)
    assert not (tmp_path / "forks.7.svg").exists()
    assert (tmp_path / "forks-too.1.svg").exists()


def test_an_unfinished_sweep_has_no_page(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "forks", missing=1)
    with pytest.raises(PageError, match="3 of 4 runs"):
        write_page(folder, tmp_path)
    assert not (tmp_path / "forks.md").exists()


def test_a_sweep_with_failures_has_no_page(tmp_path: Path) -> None:
    folder = _sweep(tmp_path / "forks", missing=1, failed=True)
    with pytest.raises(PageError, match="no memory"):
        write_page(folder, tmp_path)


def test_the_index_has_every_page_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# Other\n\n## Question\n\nWhy?\n\n## Answer\n\nBecause of 1.5 us. More.\n\nEnd\n"
    )
    write_pages([_sweep(tmp_path / "forks")], tmp_path)
    index = index_of(tmp_path)
    assert "| [Other](other.md) | Why? | Because of 1.5 us. |" in index
    assert "| [Forks \\| and locks](forks.md) | How long does a fork take? |" in index
    assert index == (tmp_path / "README.md").read_text()


def test_intervals_stand_in_the_cell_of_their_mean() -> None:
    frame = pl.DataFrame({"name": ["a|b", "c"], "m": [1.0, 2.0], "m.low": [0.5, 2.0], "m.high": [1.5, 2.0]})
    assert markdown_table(frame)[2:] == ["| a\\|b | 1 [0.5, 1.5] |", "| c | 2 |"]


@pytest.mark.parametrize(
    "value, text",
    [
        (None, ""),
        (True, "yes"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (0.000123456, "0.0001235"),
        (63.0, "63"),
    ],
)
def test_figures_have_four_digits(value: object, text: str) -> None:
    assert cell_text(value) == text


def test_a_sentence_ends_where_another_begins() -> None:
    assert (
        first_sentence("From 0.5 us to 3.1 (i.e. more). Then nothing.") == "From 0.5 us to 3.1 (i.e. more)."
    )
    assert first_sentence("**No.** It is 3 times.") == "**No.** It is 3 times."


def test_a_sweep_is_not_gone_on_with_by_other_sources(tmp_path: Path) -> None:
    folder = tmp_path / "forks"
    assert begin(folder) == ""
    assert begin(folder) == ""
    now = read_provenance(folder)
    assert now is not None
    other = Provenance(revision="long ago", sources="0" * 16, python=now.python, cores=now.cores)
    (folder / PROVENANCE_NAME).write_bytes(msgspec.json.encode(other))
    assert "was begun with other sources (long ago)" in begin(folder)
    assert read_provenance(folder) == other
