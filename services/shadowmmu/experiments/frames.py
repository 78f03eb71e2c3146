"""Messages over a pipe between a process and its child: four bytes of length, then MessagePack."""

from __future__ import annotations

import os
import select
import time
from typing import Final

__all__ = ["PipeEndedError", "ReadTimeoutError", "read_frame", "write_frame"]

HEADER: Final = 4


class PipeEndedError(Exception):
    """The other end is gone."""


class ReadTimeoutError(Exception):
    """Nothing whole came in time."""


def write_frame(descriptor: int, data: bytes) -> None:
    """Writes a frame. Raises PipeEndedError."""
    view = memoryview(len(data).to_bytes(HEADER, "big") + data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError as error:
        raise PipeEndedError from error


def read_frame(descriptor: int, timeout: float | None = None) -> bytes:
    """The next frame, within `timeout` seconds if given. Raises PipeEndedError, or ReadTimeoutError."""
    end = None if timeout is None else time.monotonic() + timeout
    return _read(descriptor, int.from_bytes(_read(descriptor, HEADER, end), "big"), end)


def _read(descriptor: int, count: int, end: float | None) -> bytes:
    data = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while len(data) < count:
        left = None if end is None else max(0.0, end - time.monotonic()) * 1000.0
        if not poll.poll(left):
            raise ReadTimeoutError
        piece = os.read(descriptor, count - len(data))
        if not piece:
            raise PipeEndedError
        data += piece
    return bytes(data)
