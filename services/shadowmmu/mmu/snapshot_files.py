"""Where snapshots are kept: `snapshot-RECORD` beside the journal, the two newest of them.

A file has its name only when the disk has all of it. What is in it is the affair of `shadowmmu.machine.snapshot`, whose
checksum tells a damaged one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["SnapshotFiles"]

KEPT: Final = 2
_NAME: Final = re.compile(r"snapshot-(\d+)")
_UNFINISHED: Final = "snapshot.unfinished"


class SnapshotFiles:
    """The snapshots in a run's folder."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _files(self) -> list[tuple[int, Path]]:
        """(record, file), the newest first."""
        found = []
        for path in self._directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found.append((int(match[1]), path))
        return sorted(found, reverse=True)

    def write(self, record: int, data: bytes) -> Path:
        """Keeps a snapshot that was taken when `record` was the next record; drops the oldest. Raises OSError."""
        path = self._directory / f"snapshot-{record}"
        unfinished = self._directory / _UNFINISHED
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        self._sync_directory()
        for _, old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def newest_first(self) -> Iterator[bytes]:
        """The contents of the snapshots; one that cannot be read is left out."""
        for _, path in self._files():
            with suppress(OSError):
                yield path.read_bytes()

    def clear(self) -> None:
        """Removes them all: those of another run are of no use to a new one. Raises OSError."""
        for _, path in self._files():
            path.unlink(missing_ok=True)
