"""The event stream as files, so that a coordinator that is started again need not ask for it again.

`events` is the plain stream. `events.index` has a record of fixed size per batch: number of its first event, count,
bytes, CRC-32 of the bytes, CRC-32 of the record so far. A batch counts when its record is whole and agrees with the
stream: a killed process leaves at most one that does not, at the end, which is cut off. The operating system decides
when the disk is written.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from shadowmmu.protocol.messages import EventBatch

__all__ = ["EVENTS_NAME", "INDEX_NAME", "EventStore"]

EVENTS_NAME: Final = "events"
INDEX_NAME: Final = "events.index"
_RECORD: Final = struct.Struct("<QIII")
_CHECK: Final = struct.Struct("<I")
_SIZE: Final = _RECORD.size + _CHECK.size


class EventStore:
    """The batches of a run, in order. `fresh`: what the files had is forgotten. Raises OSError."""

    def __init__(self, directory: Path, *, fresh: bool) -> None:
        self._events_path = directory / EVENTS_NAME
        self._index_path = directory / INDEX_NAME
        self._stored = 0  # batches that were there
        self._cut(*((0, 0) if fresh else self._whole()))
        self._events = self._events_path.open("ab", buffering=0)
        self._index = self._index_path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, batch: EventBatch) -> None:
        """Stores the next batch: when this returns, a killed process does not lose it."""
        record = _RECORD.pack(batch.first, batch.count, len(batch.data), zlib.crc32(batch.data))
        _write(self._events, batch.data)
        _write(self._index, record + _CHECK.pack(zlib.crc32(record)))

    def batches(self) -> Iterator[EventBatch]:
        """What was stored before, in order, read as it is asked for."""
        with self._index_path.open("rb") as index, self._events_path.open("rb") as events:
            for _ in range(self._stored):
                batch = _read(index, events)
                if batch is None:
                    raise OSError(f"{self._events_path} has changed since it was opened")
                yield batch

    def close(self) -> None:
        """More than once does no harm."""
        self._events.close()
        self._index.close()

    def _whole(self) -> tuple[int, int]:
        """How many bytes of the stream, and of the index, agree."""
        stream = records = 0
        if not self._index_path.exists() or not self._events_path.exists():
            return 0, 0
        with self._index_path.open("rb") as index, self._events_path.open("rb") as events:
            while batch := _read(index, events):
                stream += len(batch.data)
                records += _SIZE
                self._stored += 1
        return stream, records

    def _cut(self, stream: int, records: int) -> None:
        for path, size in ((self._events_path, stream), (self._index_path, records)):
            path.touch()
            os.truncate(path, size)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read(index: BinaryIO, events: BinaryIO) -> EventBatch | None:
    """The next batch; None at the end, or where the files do not agree."""
    record = index.read(_SIZE)
    if len(record) < _SIZE or _CHECK.unpack(record[_RECORD.size :]) != (zlib.crc32(record[: _RECORD.size]),):
        return None
    first, count, length, checksum = _RECORD.unpack(record[: _RECORD.size])
    data = events.read(length)
    if len(data) < length or zlib.crc32(data) != checksum:
        return None
    return EventBatch(first, count, data)
