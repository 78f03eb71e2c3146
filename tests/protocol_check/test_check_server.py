"""check-server passes the service, and finds what is wrong with services that are broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowmmu.protocol import REGISTRY
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check import (
    Outcome,
    ServerLimits,
    ServiceUnreachableError,
    check_server,
    server_checks,
)
from shadowmmu.protocol_check.checks import Report
from shadowmmu.protocol_check.lab import Lab
from tests.protocol_check.broken_services import MUTANTS
from tests.protocol_check.conftest import Service

LIMITS = ServerLimits(patience=0.4, budget=1.0)
CONTROL = "server.version.major"
"""A check that passes against all mutants but its own."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A service as a real process."""
    bind = f"ipc://{tmp_path}/mmu"
    command = [sys.executable, "-m", "shadowmmu.cli", "serve", "mmu", "--vcpus", "2", "--bind", bind]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield bind
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)


def run_kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shadowmmu.cli", "protocol", "check-server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.processes
@pytest.mark.slow
def test_the_service_passes_every_check_and_is_usable_afterwards(address: str) -> None:
    done = run_kit("--connect", address, "--format", "tap", "--budget", "1", "--timeout", "10")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[:2] == ["TAP version 14", f"1..{len(server_checks())}"]
    assert not [line for line in lines if line.startswith("not ok")]
    assert sum(line.startswith("ok ") and "# SKIP" not in line for line in lines) == len(server_checks())
    again = check_server(address, LIMITS, only="server.opening.run-full".__eq__)
    assert again.passed


def test_nobody_there_is_status_2(tmp_path: Path) -> None:
    done = run_kit("--connect", f"ipc://{tmp_path}/nobody", "--timeout", "0.3")
    assert done.returncode == 2
    assert "no MMU service" in done.stderr


def test_what_is_no_address_is_a_usage_error() -> None:
    done = run_kit("--connect", "nonsense")
    assert done.returncode == 64
    assert "'nonsense' is no address" in done.stderr


def test_a_service_that_is_in_use_cannot_be_checked(service: Service) -> None:
    lab = Lab(service.address, 5.0, 0, 1.0)
    try:
        for _ in range(2):
            lab.stranger().attach(m.Role.VCPU)
        with pytest.raises(ServiceUnreachableError, match="in use"):
            check_server(service.address, LIMITS)
    finally:
        lab.close()


TRIES = 10
"""A service that waits for a processor may get a message and the new connection at once: then nothing was lost."""


def checked(looked_for: str) -> Report:
    with Service() as service:
        return check_server(service.address, LIMITS, only={looked_for, CONTROL}.__contains__)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_service_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, check = MUTANTS[name]
    looked_for = f"server.{check}"
    mutant(monkeypatch)
    report = checked(looked_for)
    for _ in range(TRIES - 1):
        if not report.passed:
            break
        report = checked(looked_for)
    outcomes = {result.check.id: result for result in report.results}
    assert outcomes[looked_for].outcome is Outcome.FAILED
    assert outcomes[looked_for].text
    if looked_for != CONTROL:
        assert outcomes[CONTROL].outcome is Outcome.PASSED
    assert not report.passed


NOT_FROM_OUTSIDE = {
    "draining", "finished", "run-finished",  # only while a run ends
    "internal",  # a defect
    "duplicate",  # of version 1.0
    "forbidden",  # where keys are in use
    "flooding",  # would take others' time
    "slow-consumer", "unreachable",  # are said to who cannot hear it
    "shutdown",  # would leave a vCPU without registers that nobody knows
}  # fmt: skip


def test_every_code_that_can_be_provoked_is_asked_for() -> None:
    package = Path(__file__).parents[2] / "services/shadowmmu/protocol_check"
    source = "".join(path.read_text() for path in package.glob("server_*.py"))
    unasked = {code.value for code in REGISTRY if f"ErrorCode.{code.name}" not in source}
    assert unasked == NOT_FROM_OUTSIDE
