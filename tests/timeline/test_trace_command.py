"""`shadowmmu trace`: files for people, and clear errors for whatever cannot be traced."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shadowmmu.cli.main import app
from shadowmmu.machine import JOURNAL_NAME, Header
from shadowmmu.machine.journal import SCHEMA, JournalWriter
from shadowmmu.protocol.messages import RunConfig
from shadowmmu.timeline import Ending
from tests.timeline.decoded import Decoded
from tests.timeline.ftrace_lines import parser
from tests.timeline.recorded import folder

REPRO = next(iter(sorted((Path(__file__).parents[2] / "docs" / "bugs").glob("*.repro"))))


def trace(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def nothing_but(path: Path, *names: str) -> bool:
    return sorted(entry.name for entry in path.iterdir()) == sorted(names)


def test_a_run_becomes_a_file_for_perfetto(tmp_path: Path) -> None:
    result = trace(folder("fork")[0], "-o", tmp_path / "run.pftrace")
    assert result.exit_code == 0, result.output
    assert {"vCPU 0", "mmu_lock"} <= {
        track.name for track in Decoded((tmp_path / "run.pftrace").read_bytes()).tracks.values()
    }
    assert nothing_but(tmp_path, "run.pftrace")


def test_a_run_becomes_lines_of_ftrace(tmp_path: Path) -> None:
    result = trace(folder("fork")[0], "-o", tmp_path / "run.txt", "--format", "ftrace", "--no-check")
    assert result.exit_code == 0, result.output
    parse = parser().parse
    lines = (tmp_path / "run.txt").read_text().splitlines()
    assert {"kvm_exit", "kvm_mmu_paging_element"} <= {parse(line).event for line in lines[12:]}


def test_a_window_is_smaller(tmp_path: Path) -> None:
    source = folder("fork")[0]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert trace(source, "-o", whole).exit_code == 0
    assert trace(source, "-o", part, "--from", 1000, "--to", 1100).exit_code == 0
    assert 0 < part.stat().st_size < whole.stat().st_size


def test_a_run_in_virtual_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["simulate", "vcpus=2", "run.ops=1000", "--out", str(run)])
    assert done.exit_code == 0, done.output
    result = trace(run, "-o", tmp_path / "run.pftrace")
    assert result.exit_code == 0, result.output
    (process, *_) = Decoded((tmp_path / "run.pftrace").read_bytes()).tracks.values()
    assert process.process.process_labels[0].startswith("virtual time, of processors of ")
    assert trace(run, "-o", tmp_path / "x", "--to", 9).exit_code == 64
    file = run / "simulation.json"
    good = file.read_text()
    for bad in (
        good[: len(good) // 2],
        "[]",
        good.replace('"digest": "', '"digest": "0'),
        good.replace('"ghz": ', '"ghz": -'),
        re.sub(r'"ghz": [0-9.]+', '"ghz": 1e-300', good),
    ):
        file.write_text(bad)
        result = trace(run, "-o", tmp_path / "x")
        assert result.exit_code == 2, bad
        assert "cannot be" in result.output
    assert not (tmp_path / "x").exists()


def test_a_failing_execution_shows_its_failure(tmp_path: Path) -> None:
    result = trace(REPRO, "-o", tmp_path / "bug.pftrace")
    assert result.exit_code == 0, result.output
    marks = Decoded((tmp_path / "bug.pftrace").read_bytes()).marks
    assert [mark.name for mark in marks if mark.category == "finding"] == ["violation"]
    assert trace(REPRO, "-o", tmp_path / "x", "--from", 3).exit_code == 64


def test_a_journal_that_a_killed_writer_left_is_traced_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = (folder("fork")[0] / JOURNAL_NAME).read_bytes()
    (tmp_path / JOURNAL_NAME).write_bytes(whole[: len(whole) // 2])
    result = trace(tmp_path, "-o", tmp_path / "run.pftrace")
    assert result.exit_code == 0, result.output
    assert "torn tail" in result.stderr and "has no end" in result.stderr
    assert any(mark.args.get("unfinished") for mark in Decoded((tmp_path / "run.pftrace").read_bytes()).marks)


def test_a_damaged_journal_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    whole = bytearray((folder("fork")[0] / JOURNAL_NAME).read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    out = tmp_path / "out"
    out.mkdir()
    for data in (bytes(whole), b"", b"no journal at all", whole[:4]):
        (tmp_path / JOURNAL_NAME).write_bytes(data)
        result = trace(tmp_path, "-o", out / "run.pftrace")
        assert result.exit_code == 2
        assert result.stderr.startswith("The run cannot be traced: ")
        assert nothing_but(out)


def test_a_run_that_the_program_executes_otherwise_now_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowmmu.machine import Machine

    monkeypatch.setattr(Machine, "ready", lambda machine: machine._ready[:1])
    result = trace(folder("fork")[0], "-o", tmp_path / "run.pftrace")
    assert result.exit_code == 2
    assert "cannot be executed as it was: at record " in result.stderr
    assert nothing_but(tmp_path)


def test_a_journal_of_a_profile_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with (tmp_path / JOURNAL_NAME).open("wb") as file:
        journal = JournalWriter(file.write)
        journal.append(Header(SCHEMA, "9.9.9", RunConfig(profile="linux-9")))
        journal.flush()
    result = trace(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "the journal's configuration: unknown profile 'linux-9'" in result.stderr
    assert nothing_but(tmp_path, JOURNAL_NAME)


def test_a_dash_is_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder("fork")[0]
    assert trace(source, "-o", tmp_path / "run.txt", "--format", "ftrace").exit_code == 0
    monkeypatch.chdir(tmp_path)
    result = trace(source, "-o", "-", "--format", "ftrace")
    assert result.exit_code == 0
    assert result.stdout == (tmp_path / "run.txt").read_text()
    assert nothing_but(tmp_path, "run.txt")
    (tmp_path / JOURNAL_NAME).write_bytes((source / JOURNAL_NAME).read_bytes()[:4])
    assert trace(tmp_path, "-o", "-").stdout == ""


def test_a_disk_that_is_full_is_named_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.pftrace"
    out.write_text("before")

    def full(*_: object) -> Ending:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shadowmmu.timeline.perfetto.write_perfetto", full)
    result = trace(folder("fork")[0], "-o", out)
    assert result.exit_code == 2
    assert f"No space left on device: '{out}'" in result.stderr.replace("\n", "")
    assert nothing_but(tmp_path, "run.pftrace") and out.read_text() == "before"


def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path) -> None:
    source = folder("fork")[0]
    out = tmp_path / "out"
    wrong: list[tuple[object, ...]] = [
        (source,),
        (tmp_path / "none", "-o", out),
        (source, "-o", out, "--format", "svg"),
        (source, "-o", out, "--from", 10, "--to", 9),
        (source, "-o", out, "--from", 1 << 40),
        (source, "-o", tmp_path),
        (source, "-o", "/dev/null"),
        (source, "-o", tmp_path / "none" / "out"),
        (Path(__file__), "-o", out),
    ]
    for arguments in wrong:
        assert trace(*arguments).exit_code == 64, arguments
    assert nothing_but(tmp_path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    result = trace(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "The run cannot be traced: " in result.stderr
    assert "is no run's folder: it has no journal and no simulation.json" in result.stderr


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("perfetto")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "shadowmmu.timeline.perfetto", raising=False)
    monkeypatch.setitem(sys.modules, "perfetto", None)
    result = trace(folder("fork")[0], "-o", tmp_path / "out")
    assert result.exit_code == 64
    assert "pip install 'shadowmmu[trace]'" in result.stderr
    assert nothing_but(tmp_path)
