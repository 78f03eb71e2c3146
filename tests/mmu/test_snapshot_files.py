"""Snapshots in a run's folder: the two newest, each whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shadowmmu.mmu.snapshot_files import SnapshotFiles


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_two_newest_are_kept_and_read_newest_first(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path)
    assert list(files.newest_first()) == []
    for record in (9, 80, 700):
        path = files.write(record, b"at %d" % record)
        assert path.read_bytes() == b"at %d" % record
    assert names(tmp_path) == {"snapshot-80", "snapshot-700"}
    assert list(files.newest_first()) == [b"at 700", b"at 80"]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("journal", "snapshot-1.bak", "snapshot-", "snapshot-x"):
        (tmp_path / name).write_bytes(b"mine")
    files = SnapshotFiles(tmp_path)
    files.write(3, b"three")
    assert list(files.newest_first()) == [b"three"]
    files.clear()
    assert names(tmp_path) == {"journal", "snapshot-1.bak", "snapshot-", "snapshot-x"}


def test_one_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SnapshotFiles(tmp_path)
    files.write(5, b"five")

    def fail(_file: int) -> None:
        raise OSError("the power fails")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="power"):
            files.write(6, b"six")
    assert list(SnapshotFiles(tmp_path).newest_first()) == [b"five"]
    files.write(7, b"seven")
    assert names(tmp_path) == {"snapshot-5", "snapshot-7"}


def test_one_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    files = SnapshotFiles(tmp_path)
    files.write(5, b"five")
    (tmp_path / "snapshot-6").mkdir()
    assert list(files.newest_first()) == [b"five"]
