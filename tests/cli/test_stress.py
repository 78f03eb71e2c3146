"""Whole runs by the command line."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.coordinator import RunReport, decode_report
from shadowmmu.protocol.messages import Role, Verdict
from tests.cli.conftest import Start, is_gone, said, wait_for


def report_in(folder: Path) -> RunReport:
    return decode_report((folder / "report.json").read_bytes())


def pids(folder: Path) -> dict[str, int]:
    """The children of a run, by name, from its log (JSON)."""
    lines = (folder / "run.log").read_text(encoding="utf-8", errors="replace").splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {one["process"]: one["pid"] for one in records if one["event"] == "started" and "process" in one}


class TestInProcess:
    def test_a_run_passes_and_is_repeatable(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            arguments = [
                "stress",
                "--in-process",
                "--vcpus",
                "2",
                "--ops",
                "3000",
                "--out",
                str(tmp_path / name),
            ]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            assert "Verdict: pass" in result.output
        first, second = report_in(tmp_path / "a"), report_in(tmp_path / "b")
        assert first.stream == second.stream
        assert first.stream.events_digest
        assert first.mode == "in-process"
        assert first.counters["vcpu.instructions"] >= 3000
        assert {entry.name for entry in (tmp_path / "a").iterdir()} == {"report.json", "journal", "run.log"}

    def test_json_is_all_there_is_on_stdout(self) -> None:
        result = CliRunner().invoke(app, ["stress", "--in-process", "--ops", "500", "--json"])
        assert decode_report(result.stdout.encode()).verdict is Verdict.PASS

    def test_a_replay_ends_with_the_same_digest(self, tmp_path: Path) -> None:
        arguments = ["stress", "--in-process", "--ops", "2000", "--out", str(tmp_path)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        result = CliRunner().invoke(app, ["replay", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert result.output.count(report_in(tmp_path).stream.events_digest) == 2
        result = CliRunner().invoke(app, ["replay", str(tmp_path), "--until", "20"])
        assert result.exit_code == 0, result.output
        assert "records          20" in result.output


@pytest.mark.processes
class TestProcesses:
    def test_a_run_passes(self, start: Start, tmp_path: Path) -> None:
        run = start("stress", "--vcpus", "2", "--ops", "4000", "--out", str(tmp_path), "--log-format", "json")
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 0, output + errors
        assert "Verdict: pass" in output
        report = report_in(tmp_path)
        assert (report.vcpus, report.start_rule, report.mode) == (2, "expected", "processes")
        assert sorted(member.role.value for member in report.members) == ["host", "mmu", "vcpu", "vcpu"]
        assert all(member.reported for member in report.members)
        assert all(is_gone(pid) for pid in pids(tmp_path).values())

    def test_a_violation_ends_with_one(self, start: Start, tmp_path: Path) -> None:
        arguments = [
            "--vcpus",
            "2",
            "--ops",
            "200000",
            "--mutant",
            "entry-flush-skipped",
            "--out",
            str(tmp_path),
        ]
        run = start("stress", *arguments, "--json")
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 1, output + errors
        report = decode_report(output.encode())
        assert report.violation is not None
        assert report.violation.journal_record > 0
        assert f"shadowmmu replay {tmp_path}" in errors

    def test_without_restarts_a_killed_worker_is_reported(self, start: Start, tmp_path: Path) -> None:
        run = start(
            *("stress", "--vcpus", "2", "--ops", "50000000", "--no-restart"),
            *("--out", str(tmp_path), "--log-format", "json"),
        )
        wait_for(said(tmp_path, '"phase": "running"'), "the start of the run")
        os.kill(pids(tmp_path)["worker-1"], signal.SIGKILL)
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 2, output + errors
        report = report_in(tmp_path)
        assert report.verdict is Verdict.UNKNOWN
        assert any("worker-1" in problem and "SIGKILL" in problem for problem in report.problems)
        assert [(lost.role, lost.name) for lost in report.lost] == [(Role.VCPU, "worker-1")]
        assert all(is_gone(pid) for pid in pids(tmp_path).values())

    def test_without_restarts_a_stopped_worker_is_given_up_and_reported(
        self, start: Start, tmp_path: Path
    ) -> None:
        run = start(
            *("stress", "--vcpus", "2", "--ops", "50000000", "--no-restart"),
            *("--out", str(tmp_path), "--log-format", "json"),
        )
        wait_for(said(tmp_path, '"phase": "running"'), "the start of the run")
        os.kill(pids(tmp_path)["worker-1"], signal.SIGSTOP)
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 2, output + errors
        report = report_in(tmp_path)
        assert report.verdict is Verdict.UNKNOWN
        assert report.violation is None
        assert [(lost.role, lost.name) for lost in report.lost] == [(Role.VCPU, "worker-1")]

    def test_a_killed_worker_is_started_again_and_the_run_passes(self, start: Start, tmp_path: Path) -> None:
        run = start(
            "stress", "--vcpus", "2", "--ops", "40000", "--out", str(tmp_path), "--log-format", "json"
        )
        wait_for(said(tmp_path, '"phase": "running"'), "the start of the run")
        os.kill(pids(tmp_path)["worker-1"], signal.SIGKILL)
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 0, output + errors
        (recovery,) = report_in(tmp_path).recoveries
        assert (recovery.name, recovery.replaced_by) == ("worker-1", "worker-1")
        assert "was replaced after" in output
        assert all(is_gone(pid) for pid in pids(tmp_path).values())

    def test_a_worker_that_was_stopped_for_a_moment_goes_on(self, start: Start, tmp_path: Path) -> None:
        run = start(
            "stress", "--vcpus", "2", "--ops", "30000", "--out", str(tmp_path), "--log-format", "json"
        )
        wait_for(said(tmp_path, '"phase": "running"'), "the start of the run")
        pid = pids(tmp_path)["worker-1"]
        os.kill(pid, signal.SIGSTOP)
        stat = Path(f"/proc/{pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the worker to stop")
        os.kill(pid, signal.SIGCONT)
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 0, output + errors

    def test_ctrl_c_ends_the_run_in_order(self, start: Start, tmp_path: Path) -> None:
        run = start(
            "stress", "--vcpus", "1", "--ops", "50000000", "--out", str(tmp_path), "--log-format", "json"
        )
        wait_for(said(tmp_path, '"phase": "running"'), "the start of the run")
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=90)
        assert run.returncode == 2, output + errors
        report = report_in(tmp_path)
        assert report.text == "interrupted by SIGINT"
        assert all(member.reported for member in report.members)
        assert all(is_gone(pid) for pid in pids(tmp_path).values())

    def test_a_temporary_folder_is_removed_after_a_pass_only(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        run = start("stress", "--in-process", "--vcpus", "1", "--ops", "200")
        run.communicate(timeout=60)
        assert run.returncode == 0
        assert list(tmp_path.iterdir()) == []
        run = start("stress", "--vcpus", "1", "--ops", "200000", "--mutant", "entry-flush-skipped")
        _, errors = run.communicate(timeout=90)
        assert run.returncode == 1
        (kept,) = tmp_path.iterdir()
        assert f"are kept in {kept}" in errors
        assert (kept / "journal").exists()


@pytest.mark.processes
def test_the_processes_of_a_run_by_hand(start: Start, tmp_path: Path) -> None:
    coordinator = start(
        "serve",
        "coordinator",
        "--bind=tcp://127.0.0.1:*",
        "--ops=3000",
        "--vcpus=1",
        "--hosts=1",
        f"--out={tmp_path}",
    )
    wait_for(said(tmp_path, "listening"), "the coordinator")
    found = re.search(r"tcp://127\.0\.0\.1:\d+", (tmp_path / "run.log").read_text())
    assert found is not None
    address = found[0]

    def health(of: str) -> subprocess.CompletedProcess[str]:
        probe = start("health", "--connect", of)
        output, errors = probe.communicate(timeout=30)
        return subprocess.CompletedProcess([], probe.returncode, output, errors)

    answer = health(address)
    assert (answer.returncode, "a coordinator answers" in answer.stdout) == (0, True), answer.stderr
    mmu = start("serve", "mmu", f"--coordinator={address}", "--bind=tcp://127.0.0.1:*", f"--out={tmp_path}")
    host = start("worker", "host", f"--coordinator={address}", "--name=h")
    worker = start("worker", "vcpu", f"--coordinator={address}", "--name=w")
    output, errors = coordinator.communicate(timeout=90)
    assert coordinator.returncode == 0, output + errors
    assert "Verdict: pass" in output
    for process in (mmu, host, worker):
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    assert {member.name for member in report_in(tmp_path).members} == {"mmu", "h", "w"}


@pytest.mark.processes
def test_an_mmu_service_alone_is_well(start: Start) -> None:
    service = start("serve", "mmu", "--bind=tcp://127.0.0.1:*", "--log-format=json")
    assert service.stderr is not None
    line = json.loads(service.stderr.readline())
    probe = start("health", "--connect", line["address"])
    output, errors = probe.communicate(timeout=30)
    assert probe.returncode == 0, errors
    assert "an MMU service answers" in output
