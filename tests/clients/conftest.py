"""The clients in other languages (clients/), built, and the processes that they talk to.

Where a tool is missing the tests are skipped, except in CI (environment variable CI): there they fail. What to install
is in .ci/install-clients.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import pytest

SHADOWMMU = [sys.executable, "-m", "shadowmmu.cli"]
CLIENTS = Path(__file__).parents[2] / "clients"
NODE_CLIENT = CLIENTS / "node"
C_CLIENT = CLIENTS / "c"
BUILD_SECONDS = 110
END_SECONDS = 60

Command = list[str]
Start = Callable[..., "Service"]


def _demand(condition: bool, missing: str) -> None:
    if condition:
        return
    reason = f"{missing} missing: see .ci/install-clients"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(command: Command, directory: Path) -> None:
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.fixture(scope="session")
def node_client() -> Command:
    """How the Node.js client is started. Installs its libraries if need be."""
    _demand(bool(shutil.which("node") and shutil.which("npm")), "node and npm are")
    installed = NODE_CLIENT / "node_modules" / ".package-lock.json"
    if (
        not installed.exists()
        or installed.stat().st_mtime < (NODE_CLIENT / "package-lock.json").stat().st_mtime
    ):
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], NODE_CLIENT)
    return ["node", str(NODE_CLIENT / "touch.mjs")]


@pytest.fixture(scope="session")
def c_build() -> Path:
    """Where the C client is, built with sanitizers: leaks and undefined behaviour fail every test of it."""
    tools = ("make", "cc", "pkg-config")
    _demand(all(map(shutil.which, tools)), " or ".join(tools) + " is")
    libraries = (
        "pkg-config --exists libzmq && { pkg-config --exists msgpack-c || pkg-config --exists msgpack; }"
    )
    _demand(subprocess.run(["sh", "-c", libraries], check=False).returncode == 0, "libzmq or msgpack-c is")
    _run(["make", "sanitized"], C_CLIENT)
    return C_CLIENT


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Command:
    """How the client of the language that the test is parametrized with is started."""
    if request.param == "node":
        command: Command = request.getfixturevalue("node_client")
        return command
    build: Path = request.getfixturevalue("c_build")
    return [str(build / "touch.sanitized")]


class Service:
    """A `shadowmmu` process whose log says where it listens. To be used in a `with` statement."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [*SHADOWMMU, *arguments, "--log-format", "json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=END_SECONDS)

    def address(self) -> str:
        """Waits until it listens."""
        log = self._process.stderr
        assert log is not None
        address: str = next(line["address"] for line in _records(log) if "address" in line)
        return address

    def logged(self, event: str) -> dict[str, Any]:
        """Waits until it has logged that; what it said."""
        log = self._process.stderr
        assert log is not None
        return next(line for line in _records(log) if line.get("event") == event)

    def status(self) -> int:
        """Waits until it has ended."""
        self._process.communicate(timeout=END_SECONDS)
        return self._process.returncode


def _records(log: IO[str]) -> Iterator[dict[str, Any]]:
    for line in log:
        yield json.loads(line)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `shadowmmu` processes, which are terminated when the test is over."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(Service(*arguments))
