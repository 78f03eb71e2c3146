"""Folders to report on, made once by the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app

BUGS = Path(__file__).parents[2] / "docs" / "bugs"

SWEEP = """
title = "Fork by vCPUs"
question = "How does *fork* scale, with <b>vpid</b> & without?"
kind = "virtual"
replicates = 2
[fixed]
load.load = "fork"
load.pages = 16
iterations = 2
cost_model = "nehalem-2011"
[grid]
vpid = [true, false]
vcpus = [1, 2]
[[plots]]
title = "Cycles by vCPUs"
x = "vcpus"
y = "iteration_cycles"
color = "vpid"
log_x = true
[[plots]]
title = "Cycles in panels"
x = "vcpus"
y = "iteration_cycles"
facet = "vpid"
"""


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def edit(folder: Path, **fields: object) -> None:
    """Changes fields of a folder's report.json."""
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def passed(made: Path) -> Path:
    """A run that passed."""
    folder = made / "passed"
    assert command("stress", "--in-process", "--vcpus", "3", "--ops", "4000", "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def pre_patch(made: Path) -> Path:
    """A run of the kernel with bypass_guest_pf."""
    folder = made / "pre-patch"
    options = ["--vcpus", "2", "--ops", "2500", "--profile", "pre-patch+fixed", "--seed", "5", "--no-vpid"]
    assert command("stress", "--in-process", *options, "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def violated(made: Path) -> Path:
    """A run with a violation, and a reproduction of one."""
    folder = made / "violated"
    options = ["--vcpus", "3", "--ops", "20000", "--mutant", "entry-flush-skipped"]
    assert command("stress", "--in-process", *options, "--out", folder)[0] == 1
    shutil.copy(BUGS / "invlpg-prefault-race.repro", folder / "violation.repro")
    return folder


@pytest.fixture(scope="session")
def simulated(made: Path) -> Path:
    """A run in virtual time."""
    return _simulate(made / "simulated", 2)


@pytest.fixture(scope="session")
def simulated_wider(made: Path) -> Path:
    """The same with more vCPUs."""
    return _simulate(made / "simulated-wider", 3)


def _simulate(folder: Path, vcpus: int) -> Path:
    options = ["load.load=fork", "load.pages=16", "iterations=3", "cost_model=nehalem-2011", f"vcpus={vcpus}"]
    assert command("simulate", *options, "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def sweep(made: Path) -> Path:
    """A sweep that is complete."""
    file, folder = made / "sweep.toml", made / "sweep"
    file.write_text(SWEEP)
    status, output = command("sweep", file, "--out", folder)
    assert status == 0, output
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, to be damaged."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy" / folder.name)
