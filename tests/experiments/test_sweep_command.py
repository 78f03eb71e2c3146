"""`shadowmmu sweep` itself: killed in the middle, on a Dask cluster, and told nonsense."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from shadowmmu.cli.main import app
from shadowmmu.cli.sweep import _show as show
from shadowmmu.experiments.engine import SweepResult
from shadowmmu.experiments.engine import _reach as reach
from shadowmmu.experiments.folder import SweepWriter
from shadowmmu.experiments.point import Outcome
from shadowmmu.experiments.results import open_sweep
from shadowmmu.experiments.spec import parse_spec
from shadowmmu.experiments.table import row_of

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


def sweep_here(*arguments: object) -> Result:
    """The same in this process; what is not an exit status is raised."""
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


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


def address_in(file: Path) -> str | None:
    """The scheduler's address, once it has written all of its file."""
    try:
        address: str = json.loads(file.read_text())["address"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return address


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
    with running(*dask, "scheduler", *local, "--port", 0, "--scheduler-file", file) as scheduler:
        until(lambda: address_in(file) is not None, scheduler)
        address = address_in(file)
        worker = [
            *dask,
            "worker",
            address,
            *local,
            "--no-nanny",
            "--nthreads",
            1,
            "--local-directory",
            tmp_path,
        ]
        with running(*worker), running(*worker):
            done = sweep(experiment, "--out", tmp_path / "out", "--scheduler", address)
    assert done.returncode == OK, done.stderr
    assert (tmp_path / "out" / "results.digest").read_text().strip() == digest


@pytest.mark.parametrize("address", ["nonsense://127.0.0.1:1", "somewhere", "tls://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_said(experiment: Path, tmp_path: Path, address: str) -> None:
    done = sweep_here(experiment, "--out", tmp_path / "out", "--scheduler", address)
    assert done.exit_code == INCOMPLETE
    assert f"there is no Dask scheduler at {address}" in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_scheduler_that_takes_only_tls_is_reached_by_the_certificates_of_dasks_configuration(
    tmp_path: Path,
) -> None:
    import dask
    from distributed.comm.core import listen
    from distributed.security import Security

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=me",
    ]
    subprocess.run(
        ["openssl", *new, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )  # fmt: skip
    tls = {"ca-file": str(certificate)}
    tls |= {f"{role}.key": str(key) for role in ("scheduler", "client")}
    tls |= {f"{role}.cert": str(certificate) for role in ("scheduler", "client")}

    async def ignore(_comm: object) -> None:
        pass

    async def scheduler() -> None:
        security: Any = Security()  # type: ignore[no-untyped-call]
        there: Any = listen("tls://127.0.0.1", ignore, **security.get_listen_args("scheduler"))  # type: ignore[no-untyped-call]
        async with there as listener:
            await reach(listener.contact_address, security)

    with dask.config.set({f"distributed.comm.tls.{name}": value for name, value in tls.items()}):
        asyncio.run(scheduler())


def test_a_disk_that_is_full_ends_a_sweep_in_order(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        done = sweep_here(experiment, "--out", tmp_path / "out", "--jobs", 1)
    assert done.exit_code == INCOMPLETE
    assert "sweep.json: No space left on device" in done.stderr
    assert "the same command goes on" in done.stderr


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
    done = sweep_here(file, "--out", tmp_path / "out", "--jobs", 1)
    assert done.exit_code == INCOMPLETE
    assert "no result within 0.001 seconds" in done.stdout
    assert "1 of 1 runs have ended, 1 of them failed" in done.stdout


def test_brackets_in_errors_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = parse_spec('title = "t"\nkind = "explore"\n[grid]\ntest = ["cr3-global"]\n', "e.toml")
    with SweepWriter(tmp_path, spec, "0.1.0") as writer:
        [run] = writer.pending()
        writer.add(row_of(run, Outcome(error="KeyError: '[/x]'")))
        show(writer, SweepResult(1, 1, 0, writer.compact()), interrupted=False)
    assert "KeyError: '[/x]'" in capsys.readouterr().out


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
    done = sweep_here(*([] if "--out" in given else ["--out", tmp_path / "out"]), *given)
    assert done.exit_code == USAGE, done.stderr
    assert text in " ".join(done.stderr.split())
