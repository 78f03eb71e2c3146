"""A sweep records what fails, goes on where it was, and its folder is of one sweep and one program at a time."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from shadowmmu.experiments.engine import local_workplace, run_sweep
from shadowmmu.experiments.folder import SweepWriteError, SweepWriter
from shadowmmu.experiments.results import SweepFolder, SweepFolderError, open_sweep
from tests.experiments.conftest import STUB, spec_of, stub_sweep

pytestmark = pytest.mark.processes

FIVE = "[grid]\ntest = ['good', 'raise', 'better', 'die', 'clash']\n"


def test_failures_are_recorded_and_the_rest_is_done(tmp_path: Path) -> None:
    result = stub_sweep(tmp_path, spec_of(FIVE), jobs=2)
    assert (result.ran, result.failed, result.left) == (5, 3, 0)
    sweep = open_sweep(tmp_path)
    assert sweep.complete()
    assert sweep.table().select("point", "test", "status", "length").rows() == [
        (0, "good", "ok", 4),
        (1, "raise", "failed", None),
        (2, "better", "ok", 6),
        (3, "die", "failed", None),
        (4, "clash", "failed", None),
    ]
    failures = sweep.failures()
    assert failures.select("point", "test", "error").rows() == [
        (1, "raise", "ValueError: this point is no good"),
        (3, "die", "the process was killed by SIGKILL"),
        (4, "clash", "a metric is called 'test', as another column is"),
    ]
    assert "this point is no good" in failures["traceback"][0]


def test_failed_runs_are_made_again_only_when_asked(tmp_path: Path) -> None:
    spec = spec_of(f"[fixed]\ntest = 'flaky'\nprofile = '{tmp_path}/there'\n[grid]\nops = [1, 2, 3]\n")
    first = stub_sweep(tmp_path / "out", spec)
    assert (first.ran, first.failed) == (3, 1)
    again = stub_sweep(tmp_path / "out", spec)
    assert (again.ran, again.failed, again.digest) == (0, 1, first.digest)
    retried = stub_sweep(tmp_path / "out", spec, retry_failed=True)
    assert (retried.ran, retried.failed, retried.left) == (1, 0, 0)
    # Nothing is left of the attempt that failed.
    assert stub_sweep(tmp_path / "other", spec).digest == retried.digest


def test_a_sweep_in_pieces_ends_with_the_same_table(tmp_path: Path) -> None:
    spec = spec_of("replicates = 3\n[fixed]\ntest = 'good'\n[grid]\nops = [1, 2, 3, 4]\n")
    whole = stub_sweep(tmp_path / "whole", spec, jobs=2)
    pieces = [stub_sweep(tmp_path / "pieces", spec, limit=4) for _ in range(3)]
    assert [(piece.ran, piece.left) for piece in pieces] == [(4, 8), (4, 4), (4, 0)]
    assert pieces[-1].digest == whole.digest
    assert open_sweep(tmp_path / "pieces").table().equals(open_sweep(tmp_path / "whole").table())
    digests = [(tmp_path / name / "results.digest").read_text() for name in ("whole", "pieces")]
    assert digests == [f"{whole.digest}\n"] * 2


def test_only_the_metrics_that_are_wanted_are_kept(tmp_path: Path) -> None:
    stub_sweep(tmp_path, spec_of("metrics = ['len*', 'nothing']\n[fixed]\ntest = 'good'\n"))
    assert open_sweep(tmp_path).table().columns == [
        "point",
        "replicate",
        "seed",
        "test",
        "status",
        "error",
        "length",
    ]


def test_a_sweep_that_is_stopped_keeps_what_is_known(tmp_path: Path) -> None:
    spec = spec_of("[fixed]\ntest = 'good'\n[grid]\nops = [1, 2, 3, 4, 5, 6, 7, 8]\n")
    looks = iter([False, True])
    stopped = stub_sweep(tmp_path, spec, stopped=lambda: next(looks))
    assert stopped.ran + stopped.left == 8 and stopped.left >= 6
    assert not open_sweep(tmp_path).complete()
    assert not (tmp_path / "results.digest").exists()
    assert open_sweep(tmp_path).table().height == stopped.ran
    assert stub_sweep(tmp_path, spec).ran == stopped.left


def test_a_run_that_hangs_does_not_outlive_a_sweep_that_is_stopped(tmp_path: Path) -> None:
    spec = spec_of("[grid]\ntest = ['hang']\n")
    looks = iter([False, True])
    with SweepWriter(tmp_path, spec, "0.1.0") as writer, local_workplace(1, STUB) as place:
        assert run_sweep(writer, place, stopped=lambda: next(looks)).left == 1


def test_another_sweep_in_the_same_folder_is_refused_with_what_differs(tmp_path: Path) -> None:
    text = "seed = 1\n[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n"
    stub_sweep(tmp_path, spec_of(text), limit=1)
    other = text.replace("seed = 1", "seed = 2").replace("[1, 2]", "[1, 3]")
    with pytest.raises(
        SweepFolderError, match=r"seed: 1 there, 2 now; grid\.ops: \[1,2\] there, \[1,3\] now$"
    ):
        stub_sweep(tmp_path, spec_of(other))
    with (
        pytest.raises(SweepFolderError, match=r"version of the program: 0\.1\.0 there, 9\.9\.9 now"),
        SweepWriter(tmp_path, spec_of(text), "9.9.9"),
    ):
        pass


def test_how_a_sweep_is_shown_may_change(tmp_path: Path) -> None:
    text = "[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n"
    stub_sweep(tmp_path, spec_of(text), limit=1)
    stub_sweep(tmp_path, spec_of(f"question = 'Why?'\ntimeout = 9.0\n{text}"))
    assert open_sweep(tmp_path).spec.question == "Why?"


def test_one_program_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    spec = spec_of("[fixed]\ntest = 'good'\n")
    with (
        SweepWriter(tmp_path, spec, "0.1.0"),
        pytest.raises(SweepFolderError, match="another program is running this sweep"),
        SweepWriter(tmp_path, spec, "0.1.0"),
    ):
        pass
    with SweepWriter(tmp_path, spec, "0.1.0"):
        pass


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "sweep[1]*"
    assert stub_sweep(folder, spec_of("[fixed]\ntest = 'good'\n")).left == 0
    assert open_sweep(folder).table().height == 1


def test_rows_that_are_put_into_the_table_meanwhile_are_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_sweep(tmp_path, spec_of("[fixed]\ntest = 'good'\n"))
    sweep = open_sweep(tmp_path)
    table = sweep.row_files()
    listings = iter([[tmp_path / "parts" / "part-00000001.parquet"], table])
    monkeypatch.setattr(SweepFolder, "row_files", lambda _: next(listings))
    assert sweep.table().height == 1


def test_what_a_disk_does_not_take_is_said_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n")
    stub_sweep(tmp_path, spec, limit=1)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, SweepWriter(tmp_path, spec, "0.1.0") as writer:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SweepWriteError, match=r"results\.parquet: No space left on device"):
            writer.compact()
    assert not list(tmp_path.rglob("*.new"))
    assert stub_sweep(tmp_path, spec).ran == 1


def test_a_folder_that_cannot_be_locked_or_tidied_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.parquet.new").mkdir()
    with pytest.raises(SweepFolderError, match=str(tmp_path)), SweepWriter(tmp_path, spec_of(""), "0.1.0"):
        pass


def test_a_file_at_which_polars_panics_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some files with a flipped byte make it do; its exception is no Exception."""
    stub_sweep(tmp_path, spec_of("[fixed]\ntest = 'good'\n"))

    def panic(*_: object, **__: object) -> None:
        raise pl.exceptions.PanicException("range end index 12 out of range")

    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(SweepFolderError, match=r"results\.parquet is damaged"):
        open_sweep(tmp_path).table()


def test_folders_that_are_damaged_or_no_sweeps(tmp_path: Path) -> None:
    with pytest.raises(SweepFolderError, match=r"it has no sweep\.json"):
        open_sweep(tmp_path)
    folder = tmp_path / "sweep"
    spec = spec_of("[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n")
    stub_sweep(folder, spec)
    table = folder / "results.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SweepFolderError, match=r"results\.parquet is damaged"):
        open_sweep(folder).table()
    with pytest.raises(SweepFolderError, match=r"results\.parquet is damaged"):
        stub_sweep(folder, spec)
    pl.DataFrame({"a": [1]}).write_parquet(table)
    with pytest.raises(SweepFolderError, match="is no file of this sweep: it has no column 'error'"):
        open_sweep(folder).table()
    header = folder / "sweep.json"
    for text in (
        b"{",
        b"[]",
        b"\xff",
        b'{"schema": "shadowmmu-sweep/1"}',
        b'{"schema": "shadowmmu-sweep/2"}',
        b"[" * 10_000,
    ):
        header.write_bytes(text)
        with pytest.raises(SweepFolderError, match=r"sweep\.json"):
            open_sweep(folder)
    header.unlink()
    with pytest.raises(SweepFolderError, match=r"has results, but no sweep\.json"):
        stub_sweep(folder, spec)


def test_a_file_that_was_being_written_is_no_matter(tmp_path: Path) -> None:
    spec = spec_of("[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n")
    first = stub_sweep(tmp_path / "a", spec)
    stub_sweep(tmp_path / "b", spec, limit=1)
    (tmp_path / "b" / "parts" / "part-00000007.parquet.new").write_bytes(b"half")
    assert stub_sweep(tmp_path / "b", spec).digest == first.digest
    assert list((tmp_path / "b" / "parts").iterdir()) == []


def test_rows_in_parts_and_table_are_one_table(tmp_path: Path) -> None:
    """As a program that was killed between writing the table and removing the parts leaves them."""
    spec = spec_of("[fixed]\ntest = 'good'\n[grid]\nops = [1, 2]\n")
    done = stub_sweep(tmp_path, spec)
    shutil.copy(tmp_path / "results.parquet", tmp_path / "parts" / "part-00000001.parquet")
    assert open_sweep(tmp_path).table().height == 2
    assert stub_sweep(tmp_path, spec) == done._replace(ran=0)
