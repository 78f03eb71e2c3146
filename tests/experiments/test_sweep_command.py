"""`shadowmmu sweep` itself: killed in the middle, on a Dask cluster, and told nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shadowmmu.experiments.results import open_sweep

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "shadowmmu.cli"]
OK, INCOMPLETE, USAGE = 0, 2, 64

TWO_HUNDRED = """
title = "Two hundred runs"
kind = "explore"
replicates = 10
seed = 3
[fixed]
test = "dirty-bit-lost"
[grid]
strategy = ["pct", "random", "bounded", "portfolio", "exhaustive"]
executions = [1, 2]
first = [true, false]
"""


def sweep(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "sweep", *map(str, arguments)], capture_output=True, text=True, timeout=280, check=False
    )


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits for a condition, as long as a process lives."""
    while not condition():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)


@contextmanager
def running(*command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a process group, which is killed at the end."""
    process = subprocess.Popen([*map(str, command)], process_group=0, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "two-hundred.toml"
    path.write_text(TWO_HUNDRED)
    return path


@pytest.fixture(scope="module")
def digest(experiment: Path) -> str:
    """Of the table of the sweep that nobody disturbed."""
    done = sweep(experiment, "--out", experiment.parent / "whole", "--jobs", 2)
    assert done.returncode == OK, done.stderr
    assert "200 of 200 runs have ended, 0 of them failed; 200 were made now" in done.stdout
    digest = (experiment.parent / "whole" / "results.digest").read_text().strip()
    assert f"digest {digest}" in done.stdout
    return digest


def test_a_sweep_that_is_killed_in_the_middle_ends_with_the_same_table(
    experiment: Path, digest: str, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    with running(*COMMAND, "sweep", experiment, "--out", out, "--jobs", 2) as process:
        until(lambda: any((out / "parts").glob("part-*.parquet")), process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    known = open_sweep(out).table().height
    assert 0 < known < 200
    done = sweep(experiment, "--out", out, "--jobs", 2)
    assert done.returncode == OK, done.stderr
    assert f"{200 - known} were made now" in done.stdout
    assert (out / "results.digest").read_text().strip() == digest
    assert open_sweep(out).table().equals(open_sweep(experiment.parent / "whole").table())


def test_the_same_sweep_on_a_dask_cluster_of_two_workers_has_the_same_table(
    experiment: Path, digest: str, tmp_path: Path
) -> None:
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    worker = [
        *dask,
        "worker",
        "--scheduler-file",
        file,
        *local,
        "--nthreads",
        1,
        "--local-directory",
        tmp_path,
    ]
    with (
        running(*dask, "scheduler", *local, "--port", 0, "--scheduler-file", file) as scheduler,
        running(*worker),
        running(*worker),
    ):
        until(file.exists, scheduler)
        address = json.loads(file.read_text())["address"]
        done = sweep(experiment, "--out", tmp_path / "out", "--scheduler", address)
    assert done.returncode == OK, done.stderr
    assert (tmp_path / "out" / "results.digest").read_text().strip() == digest


@pytest.mark.parametrize("address", ["nonsense://127.0.0.1:1", "somewhere"])
def test_a_cluster_that_is_not_there_is_said(experiment: Path, tmp_path: Path, address: str) -> None:
    done = sweep(experiment, "--out", tmp_path / "out", "--scheduler", address)
    assert done.returncode == INCOMPLETE
    assert f"there is no Dask scheduler at {address}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_ctrl_c_ends_a_sweep_with_what_is_known(experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*COMMAND, "sweep", experiment, "--out", out, "--jobs", 1) as process:
        until(lambda: any((out / "parts").glob("part-*.parquet")), process)
        process.send_signal(signal.SIGINT)
        assert process.wait() == INCOMPLETE
    known = open_sweep(out).table().height
    assert 0 < known < 200
    assert (out / "results.parquet").exists()
    assert not (out / "results.digest").exists()


def test_a_point_that_fails_is_shown_and_decides_the_status(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(
        'title = "Too little time"\nkind = "explore"\ntimeout = 0.001\n[fixed]\ntest = "cr3-global"\n'
        'executions = 100_000\nstrategy = "random"\n'
    )
    done = sweep(file, "--out", tmp_path / "out", "--jobs", 1)
    assert done.returncode == INCOMPLETE
    assert "no result within 0.001 seconds" in done.stdout
    assert "1 of 1 runs have ended, 1 of them failed" in done.stdout


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["no-such-experiment"], "there is no such file, and no experiment of that name"),
        (["{bad}"], "bad.toml: grid.speed: there is no such parameter"),
        (["{good}", "--jobs", 2, "--scheduler", "tcp://127.0.0.1:1"], "with --scheduler the cluster decides"),
        (["{stress}", "--jobs", 2], "runs of kind stress are measured by the clock: one at a time"),
        (["{good}", "--out", "{good}"], "Not a directory"),
    ],
)
def test_nonsense_is_a_usage_error(tmp_path: Path, arguments: list[object], text: str) -> None:
    names = {name: tmp_path / f"{name}.toml" for name in ("good", "bad", "stress")}
    names["good"].write_text(TWO_HUNDRED)
    names["bad"].write_text(TWO_HUNDRED + "speed = [1]\n")
    names["stress"].write_text('title = "t"\nkind = "stress"\n')
    given = [str(argument).format(**names) for argument in arguments]
    done = sweep(*([] if "--out" in given else ["--out", tmp_path / "out"]), *given)
    assert done.returncode == USAGE, done.stderr
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
