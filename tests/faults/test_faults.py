"""What real processes survive: one test per row of the table in docs/RELIABILITY.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shadowmmu.coordinator import decode_report
from shadowmmu.coordinator.chaos import Fault, FaultKind
from shadowmmu.coordinator.chaos_run import ChaosResult
from shadowmmu.coordinator.proxy import Proxy
from shadowmmu.protocol.messages import Verdict
from tests.faults.between import Between
from tests.faults.conftest import OPS, Faulty, assert_whole, recovery_of, run_through

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

EARLY = OPS // 10
FOR_EVER = 3600.0


def restarted(result: ChaosResult) -> list[str]:
    return [restart.name for restart in result.restarts]


async def test_a_killed_mmu_service_recovers_from_its_journal(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.KILL, "mmu"))
    assert restarted(result) == ["mmu"]
    assert recovery_of(result, "mmu").replaced_by == "mmu"


async def test_the_program_of_a_killed_worker_goes_on_in_another_process(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.KILL, "worker-1"))
    assert restarted(result) == ["worker-1"]
    assert recovery_of(result, "worker-1").replaced_by == "worker-1"


async def test_a_killed_host_agent_is_replaced(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.KILL, "host-0"))
    assert restarted(result) == ["host-0"]
    assert recovery_of(result, "host-0").replaced_by == "host-0"


async def test_a_killed_coordinator_goes_on_from_what_it_has_stored(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.KILL, "coordinator"))
    assert restarted(result) == ["coordinator"]
    for name in ("mmu", "worker-0", "worker-1", "host-0"):
        assert recovery_of(result, name).replaced_by is None


async def test_everybody_killed_one_after_another(faulty: Faulty) -> None:
    names = ["mmu", "worker-0", "coordinator", "host-0", "worker-1", "mmu"]
    result = await faulty(
        *(Fault(EARLY + number * OPS // 20, FaultKind.KILL, name) for number, name in enumerate(names))
    )
    assert sorted(restarted(result)) == sorted(names)


async def test_a_worker_that_was_stopped_for_some_seconds_goes_on_itself(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.STOP, "worker-0", 7.0))
    assert restarted(result) == []
    assert recovery_of(result, "worker-0").replaced_by is None


async def test_a_worker_that_hangs_is_killed_and_replaced(faulty: Faulty) -> None:
    result = await faulty(Fault(EARLY, FaultKind.STOP, "worker-0", FOR_EVER))
    assert restarted(result) == ["worker-0"]
    assert "SIGKILL" in result.restarts[0].how


@pytest.mark.parametrize("target", ["worker-0", "mmu", "coordinator"])
async def test_half_open_connections_are_made_anew(faulty: Faulty, target: str) -> None:
    result = await faulty(Fault(EARLY, FaultKind.HALF_OPEN, target))
    assert restarted(result) == []


@pytest.mark.parametrize("target", ["worker-0", "host-0", "mmu", "coordinator"])
async def test_cut_connections_are_made_anew(faulty: Faulty, target: str) -> None:
    result = await faulty(Fault(EARLY, FaultKind.CUT, target))
    assert restarted(result) == []


async def test_messages_that_come_twice_take_effect_once(tmp_path: Path) -> None:
    async with Between(twice=7) as coordinator, Between(twice=7) as mmu:
        report, ended = await run_through(tmp_path, coordinator.before, mmu.before)
        assert coordinator.repeated
        assert mmu.repeated
    assert ended == []
    assert_whole(report, tmp_path)


async def test_messages_that_come_late_change_nothing(tmp_path: Path) -> None:
    async with Between(delay=0.01) as coordinator, Between(delay=0.002) as mmu:
        report, ended = await run_through(tmp_path, coordinator.before, mmu.before)
    assert ended == []
    assert_whole(report, tmp_path)
    assert report.recoveries == []


async def test_slow_bytes_change_nothing(tmp_path: Path) -> None:
    async with Proxy(0) as proxy:
        proxy.delay = 0.002

        def slow(address: str) -> str:
            proxy.target = int(address.rpartition(":")[2])
            return f"tcp://127.0.0.1:{proxy.port}"

        report, ended = await run_through(tmp_path, lambda address: address, slow)
    assert ended == []
    assert_whole(report, tmp_path)


def test_a_full_disk_for_the_journal_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "journal").symlink_to("/dev/full")
    done = subprocess.run(
        [sys.executable, "-m", "shadowmmu.cli", "stress", "--vcpus=1", "--ops=2000", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2, done.stderr
    report = decode_report((tmp_path / "report.json").read_bytes())
    assert report.verdict is Verdict.UNKNOWN
    assert "No space left on device" in report.text
