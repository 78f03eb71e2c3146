"""The journal's file has whole frames or nothing of them, and the disk has it as often as the policy says."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowmmu.mmu.journal_file import FSYNC_EVERY_TURN, FSYNC_NEVER, FsyncPolicy, JournalFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the file whenever the disk had to take it."""
    sizes: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda file: sizes.append(os.fstat(file).st_size))
    return sizes


def writes(monkeypatch: pytest.MonkeyPatch, write: Callable[[int, bytes], int]) -> None:
    monkeypatch.setattr(os, "write", write)


def test_what_is_written_is_in_the_file_at_once(path: Path) -> None:
    journal = JournalFile(path)
    journal.write(b"first")
    assert path.read_bytes() == b"first"
    journal.write(b"second")
    assert path.read_bytes() == b"firstsecond"
    assert journal.bytes_written == 11
    journal.close()
    journal.close()


def test_a_new_journal_takes_the_place_of_an_old_one(path: Path) -> None:
    for text in (b"a long old journal", b"new"):
        journal = JournalFile(path)
        journal.write(text)
        journal.close()
    assert path.read_bytes() == b"new"


def test_a_journal_that_is_taken_up_is_cut_off_first(path: Path) -> None:
    journal = JournalFile(path)
    journal.write(b"whole|torn tail")
    journal.close()
    journal = JournalFile(path, cut_at=6)
    assert journal.bytes_written == 6
    journal.write(b"more")
    journal.close()
    assert path.read_bytes() == b"whole|more"


def test_a_service_without_a_journal_counts_bytes_all_the_same() -> None:
    journal = JournalFile(None)
    journal.write(b"abc")
    journal.flush(0.0)
    journal.close()
    assert journal.bytes_written == 3


def test_short_writes_are_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile(path)
    real = os.write
    sizes: list[int] = []

    def short(file: int, data: bytes) -> int:
        sizes.append(real(file, data[:3]))
        return sizes[-1]

    writes(monkeypatch, short)
    journal.write(b"0123456789")
    assert sizes == [3, 3, 3, 1]
    assert path.read_bytes() == b"0123456789"


def test_of_a_frame_that_does_not_fit_nothing_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile(path)
    journal.write(b"whole|")
    real = os.write
    room = [4]

    def full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, data[: room[0]])
        room[0] -= done
        return done

    writes(monkeypatch, full)
    with pytest.raises(OSError, match="the journal cannot be written: No space left") as raised:
        journal.write(b"too much")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"whole|"
    assert journal.bytes_written == 6
    room[0] = 100
    journal.write(b"fits")
    assert path.read_bytes() == b"whole|fits"


def test_a_journal_that_cannot_be_opened_says_so(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(OSError, match="the journal cannot be written: Is a directory"):
        JournalFile(path)
    with pytest.raises(OSError, match="the journal cannot be written: No such file"):
        JournalFile(path / "missing" / "journal", cut_at=3)


@pytest.mark.parametrize(
    "policy, sizes",
    [
        (FSYNC_NEVER, []),
        (FSYNC_EVERY_TURN, [1, 2, 3, 4, 5]),
        (FsyncPolicy(2.0), [1, 3, 5]),
        (FsyncPolicy(100.0), [1, 5]),
    ],
    ids=["never", "every turn", "every two seconds", "at the end"],
)
def test_the_disk_has_it_as_often_as_the_policy_says(
    path: Path, synced: list[int], policy: FsyncPolicy, sizes: list[int]
) -> None:
    journal = JournalFile(path, fsync=policy)
    for now in range(5):
        journal.write(b"x")
        journal.flush(1000.0 + now)
        journal.flush(1000.0 + now)
    journal.close()
    assert synced == sizes


def test_a_disk_that_fails_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile(path, fsync=FSYNC_EVERY_TURN)
    journal.write(b"x")

    def fail(_file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="the journal cannot be written: Input/output error"):
        journal.flush(0.0)
