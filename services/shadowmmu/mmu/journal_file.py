"""Where the journal is kept: one file, appended to, handed to the operating system before any message goes out.

A killed service loses nothing that was handed over; a power failure may take what the disk has not. How much that is,
is a matter of the *fsync policy*. The clock is the caller's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

__all__ = ["FSYNC_EVERY_TURN", "FSYNC_NEVER", "FsyncPolicy", "JournalFile"]


class FsyncPolicy(msgspec.Struct, frozen=True):
    """When the disk has to have the journal: `interval` seconds after the last time, 0 with every turn, None never."""

    interval: float | None

    def due(self, since: float) -> bool:
        """Whether it is time, `since` seconds after the last one."""
        return self.interval is not None and since >= self.interval


FSYNC_NEVER: Final = FsyncPolicy(None)
"""Whenever the operating system likes."""
FSYNC_EVERY_TURN: Final = FsyncPolicy(0.0)


class JournalFile:
    """An open journal. `path` None: there is none, frames are thrown away (a service for protocol clients).

    `cut_at`: the journal is there, and goes on behind so many bytes (what follows is cut off); None: a new one, in the
    place of any that is there. All methods raise OSError, which says that it is about the journal.
    """

    def __init__(
        self, path: Path | None, *, cut_at: int | None = None, fsync: FsyncPolicy = FSYNC_NEVER
    ) -> None:
        self.path = path
        self.bytes_written = cut_at or 0
        self._fsync = fsync
        self._synced = 0  # bytes that the disk has
        self._synced_at: float | None = None
        self._file: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
            if cut_at is None:
                self._file = os.open(path, flags | os.O_CREAT | os.O_TRUNC, 0o644)
            else:
                self._file = os.open(path, flags)
                os.ftruncate(self._file, cut_at)
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        return OSError(error.errno, f"the journal cannot be written: {error.strerror}", str(self.path))

    def write(self, frame: bytes) -> None:
        """Appends a frame. If that fails, nothing of it stays in the file."""
        if self._file is not None:
            left = memoryview(frame)
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(self._file, self.bytes_written)
                raise self._explained(error) from error
        self.bytes_written += len(frame)

    def flush(self, now: float | None = None) -> None:
        """Has the disk take what was written, if the policy says so at `now` (seconds); without `now`, at once."""
        if self._file is None or self._fsync.interval is None or self._synced == self.bytes_written:
            return
        if now is not None:
            if self._synced_at is not None and not self._fsync.due(now - self._synced_at):
                return
            self._synced_at = now
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._explained(error) from error
        self._synced = self.bytes_written

    def close(self) -> None:
        """Flushes and closes; more than once does no harm."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                os.close(self._file)
                self._file = None
