"""`shadowmmu check`: a run's journal through a fresh checker."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.machine import JOURNAL_NAME, Header, Machine, run_in_process
from shadowmmu.machine.journal import SCHEMA, JournalWriter
from shadowmmu.protocol.messages import RunConfig


def record(folder: Path, ops: int = 2000) -> None:
    with (folder / JOURNAL_NAME).open("wb") as journal:
        run_in_process(RunConfig(ops=ops, seed=5), 2, journal.write)


def test_a_clean_run(tmp_path: Path) -> None:
    record(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.startswith("no violation: ")
    assert result.stdout.endswith("events, rules 1-9\n")
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--rules", "9,1"])
    assert result.stdout.endswith("events, rules 1, 9\n")


def test_a_run_that_got_stuck_is_so_when_it_is_executed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Machine, "_left_guest", lambda _machine, _lane: None
    )  # nobody's kicks are ever answered
    record(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert "rule 8 (no progress)" in result.stdout
    assert "at KICK" in result.stdout
    assert CliRunner().invoke(app, ["check", str(tmp_path), "--rules", "1,9"]).exit_code == 0


def test_a_journal_that_the_code_does_not_execute_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path)
    monkeypatch.setattr(Machine, "_left_guest", lambda _machine, _lane: None)
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "diverged" in result.stderr


def test_no_journal(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr


@pytest.mark.parametrize("command", ["check", "replay"])
def test_a_journal_of_a_profile_that_is_not_known(tmp_path: Path, command: str) -> None:
    with (tmp_path / JOURNAL_NAME).open("wb") as file:
        journal = JournalWriter(file.write)
        journal.append(Header(SCHEMA, "9.9.9", RunConfig(profile="linux-9")))
        journal.flush()
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be used: unknown profile 'linux-9'" in result.stderr


def test_rules_that_do_not_exist(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--rules", "1,12"])
    assert result.exit_code == 64
    assert "no such rule: 12" in result.stderr
