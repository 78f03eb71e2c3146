"""The command line: usage errors end with 64 and say what was wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.coordinator import decode_report
from shadowmmu.protocol.messages import Workload

COMMANDS = [
    [],
    ["stress"],
    ["replay"],
    ["check"],
    ["conform"],
    ["serve"],
    ["serve", "mmu"],
    ["serve", "coordinator"],
    ["worker"],
    ["worker", "vcpu"],
    ["worker", "host"],
    ["profiles"],
    ["bugs"],
    ["keys"],
    ["health"],
]


CONFIGURING = [
    "SHADOWMMU_VCPUS",
    "SHADOWMMU_WORKLOAD",
    "SHADOWMMU_MODE",
    "SHADOWMMU_TDP",
    "SHADOWMMU_BYPASS_GUEST_PF",
    "SHADOWMMU_MEMORY_MODEL",
]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    for name in CONFIGURING:
        monkeypatch.delenv(name, raising=False)
    return CliRunner()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(runner: CliRunner, command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["bogus"], "No such command 'bogus'"),
        (["stress", "--bogus"], "No such option"),
        (["stress", "surplus"], "surplus"),
        (["stress", "--vcpus", "0"], "--vcpus"),
        (["stress", "--vcpus", "257"], "--vcpus"),
        (["stress", "--vcpus", "many"], "--vcpus"),
        (["stress", "--vcpus", "100"], "1 to 62 vCPUs, not 100"),
        (["stress", "--vcpus", "40", "--memory-pages", "1024"], "1024 pages of memory"),
        (["serve", "mmu", "--vcpus", "100"], "1 to 62 vCPUs, not 100"),
        (["serve", "coordinator", "--vcpus", "100"], "1 to 62 vCPUs, not 100"),
        (["stress", "--ops", "0"], "--ops"),
        (["stress", "--ops", str(1 << 60)], "--ops"),
        (["stress", "--seed", "-1"], "--seed"),
        (["stress", "--seed", str(1 << 64)], "--seed"),
        (["stress", "--workload", "nothing"], "--workload"),
        (["stress", "--audit", "perhaps"], "--audit"),
        (["stress", "--mutant", "wolverine"], "--mutant"),
        (["stress", "--profile", "linux-9"], "unknown profile 'linux-9'"),
        (["stress", "--profile", "fixed+nothing"], "nothing"),
        (["stress", "--profile", "x" * 100], "--profile"),
        (["stress", "--mode", "real"], "--mode"),
        (["stress", "--mode", "pae", "--workload", "anon"], "anon is a program of 64-bit paging"),
        (["stress", "--mode", "mixed", "--workload", "mixed"], "--mode mixed runs workload modes only"),
        (["stress", "--tdp", "shadow"], "--tdp"),
        (["stress", "--tdp", "ept", "--mode", "pae"], "nonpaging, not pae"),
        (["stress", "--tdp", "npt", "--workload", "huge"], "--tdp npt runs workload modes only"),
        (["stress", "--bypass-guest-pf"], "profile fixed has none"),
        (["stress", "--bypass-guest-pf", "--profile", "linux-3.1"], "profile linux-3.1 has none"),
        (["stress", "--bypass-guest-pf", "--profile", "pre-patch", "--tdp", "ept"], "none with --tdp"),
        (["serve", "mmu", "--mode", "pae", "--workload", "anon"], "64-bit paging"),
        (["serve", "coordinator", "--tdp", "ept", "--mode", "pae"], "nonpaging, not pae"),
        (["serve", "coordinator", "--bypass-guest-pf"], "profile fixed has none"),
        (["stress", "--park-rate", "1.5"], "--park-rate"),
        (["stress", "--host-rate", "-1"], "--host-rate"),
        (["stress", "--memory-pages", "12"], "--memory-pages"),
        (["stress", "--mmu-pages", "63"], "--mmu-pages"),
        (["stress", "--log-format", "xml"], "--log-format"),
        (["serve", "mmu", "--bind", "nowhere"], "'nowhere' is no address"),
        (["serve", "mmu", "--bind", "tcp://127.0.0.1"], "has no port"),
        (["serve", "mmu", "--bind", "tcp://127.0.0.1:*", "--coordinator", "x"], "--coordinator"),
        (["serve", "coordinator", "--bind", "udp://127.0.0.1:1"], "--bind"),
        (
            ["serve", "coordinator", "--bind", "tcp://192.0.2.1:5700", "--insecure"],
            "cannot listen at tcp://192.0.2.1:5700",
        ),
        (["worker", "vcpu"], "--coordinator"),
        (["worker", "host", "--coordinator", "tcp://x:99999"], "--coordinator"),
        (["health"], "--connect"),
        (["replay"], "DIR"),
        (["conform"], "FILE"),
        (["conform", "/nonexistent.jsonl.gz"], "/nonexistent.jsonl.gz"),
    ],
)
def test_usage_errors(runner: CliRunner, arguments: list[str], words: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 64, result.output
    assert words in result.output


def test_a_folder_that_cannot_be_made(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["stress", "--out", str(tmp_path / "file" / "folder")])
    assert result.exit_code == 64
    assert "--out" in result.output


def test_an_empty_number_of_vcpus_in_the_environment_is_none(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWMMU_VCPUS", "")
    result = runner.invoke(app, ["serve", "coordinator", "--bind", "nowhere"])
    assert "'nowhere' is no address" in result.output
    monkeypatch.setenv("SHADOWMMU_VCPUS", "zero")
    result = runner.invoke(app, ["serve", "coordinator", "--bind", "nowhere"])
    assert "SHADOWMMU_VCPUS" in result.output
    assert result.exit_code == 64


def test_empty_settings_in_the_environment_are_none(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CONFIGURING:
        monkeypatch.setenv(name, "")
    result = runner.invoke(app, ["serve", "coordinator", "--bind", "nowhere"])
    assert "'nowhere' is no address" in result.output
    result = runner.invoke(app, ["stress", "--in-process", "--ops=200", "--json"])
    assert decode_report(result.stdout.encode()).config.workload is Workload.MIXED


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("SHADOWMMU_WORKLOAD", "nothing", "SHADOWMMU_WORKLOAD"),
        ("SHADOWMMU_MODE", "real", "SHADOWMMU_MODE"),
        ("SHADOWMMU_TDP", "shadow", "SHADOWMMU_TDP"),
        ("SHADOWMMU_BYPASS_GUEST_PF", "1", "profile fixed has none"),
        ("SHADOWMMU_MEMORY_MODEL", "weak", "SHADOWMMU_MEMORY_MODEL"),
    ],
)
def test_settings_in_the_environment_are_checked_as_options_are(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    result = runner.invoke(app, ["serve", "coordinator", "--bind", "tcp://127.0.0.1:*"])
    assert result.exit_code == 64, result.output
    assert words in result.output


def test_profiles_lists_profiles_and_fixes(runner: CliRunner) -> None:
    result = runner.invoke(app, ["profiles"])
    assert result.exit_code == 0
    for words in ("linux-3.1", "fixed", "tlbs-dirty-missed-wp", "A10"):
        assert words in result.output


def test_conform_says_what_it_found(runner: CliRunner, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.jsonl.gz"
    rubbish.write_bytes(b"no recording")
    result = runner.invoke(app, ["conform", str(rubbish)])
    assert result.exit_code == 2
    assert "0 of 1 recordings pass" in result.output


def test_a_journal_that_is_not_there(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(app, ["replay", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be used" in result.output


def test_a_service_that_is_not_there(runner: CliRunner) -> None:
    result = runner.invoke(app, ["health", "--connect", "tcp://127.0.0.1:9", "--timeout", "0.1"])
    assert result.exit_code == 2
    assert "does not answer" in result.output


def test_a_defect_of_ours_is_no_verdict_violated(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def defect(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("shadowmmu.coordinator.inprocess.run_in_this_process", defect)
    result = runner.invoke(app, ["stress", "--in-process", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "ZeroDivisionError" in result.output


@pytest.mark.processes
def test_help_needs_no_heavy_imports() -> None:
    program = (
        "import sys; from shadowmmu.cli.main import app\n"
        "try: app(['stress', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'zmq', 'hdrh', 'structlog', 'shadowmmu.kvm', 'shadowmmu.machine', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.processes
def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shadowmmu.cli", "stress", "--vcpus", "none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert "shadowmmu stress: Invalid value for '--vcpus'" in done.stderr
    assert "'shadowmmu stress --help' says what there is." in done.stderr
