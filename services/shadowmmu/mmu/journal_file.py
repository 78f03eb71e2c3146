"""Where the journal is kept: one file, appended to, handed to the operating system before any message goes out."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["JournalFile"]

BUFFER_BYTES: Final = 1 << 20


class JournalFile:
    """An open journal. `directory` None: there is none, records are thrown away (a service for protocol clients)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.bytes_written = 0
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=BUFFER_BYTES)

    def write(self, data: bytes) -> None:
        """Appends the bytes of a record."""
        self.bytes_written += len(data)
        if self._file is not None:
            self._file.write(data)

    def flush(self) -> None:
        """Hands everything written to the operating system: a killed service loses nothing that others saw."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes; more than once does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None
