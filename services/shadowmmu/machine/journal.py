"""The journal: everything that the machine consumed, in the order in which it consumed it.

A journal is a sequence of *frames*, one per write. A frame is a MessagePack array of two elements: the CRC-32 of the
second element's contents, and that element, a byte string of concatenated MessagePack values, one per record. Lengths
and checksums are always written in 32 bits, so that a frame's head has 11 bytes. Record numbers count from 0, the
header.

A writer that was killed leaves at most one frame unfinished, or not as it should be, at the end: the *torn tail*, which
is as if it had never been written. Anything wrong before a whole frame is damage, and an error.

`JournalWriter` gathers records and hands frames to whoever keeps them; `JournalReader` gives the records back. No
record has a time of day in it. Relies on the protocol's messages.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, TypeAlias

import msgpack
import msgspec

from shadowmmu.protocol.messages import Detach, Enter, Exit, HostOperation, Load, Locked, Log, RunConfig, Walk

__all__ = [
    "DIGEST_INTERVAL",
    "SCHEMA",
    "START",
    "Admission",
    "Attached",
    "Digest",
    "EmptyJournalError",
    "End",
    "GivenUp",
    "Header",
    "HostAsked",
    "HostAttached",
    "HostEnded",
    "Input",
    "JournalError",
    "JournalPosition",
    "JournalReader",
    "JournalWriter",
    "Note",
    "Record",
    "Recovered",
    "Steps",
    "VcpuSent",
    "read_journal",
]

SCHEMA: Final = 2
"""Version of the records and of their framing."""
DIGEST_INTERVAL: Final = 1000
"""Records from one digest to the next."""

VcpuBody: TypeAlias = Enter | Log | Walk | Load | Locked | Exit | Detach
"""A vCPU's message that the machine consumes."""


class JournalError(Exception):
    """A journal cannot be read; the text says where and why."""


class EmptyJournalError(JournalError):
    """A journal without a whole frame: whoever began it was killed before anything had happened."""


class Header(msgspec.Struct, frozen=True, tag="header"):
    """The first record: what was run, by which version of the code, and which run it was, if it had a name."""

    schema: int
    code_version: str
    config: RunConfig
    run: bytes = b""


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """A worker attached as `vcpu`, in incarnation `incarnation`.

    `resume`: it goes on with the program of the incarnation before. `token`: what it may be resumed with.
    """

    vcpu: int
    incarnation: int
    resume: bool = False
    token: bytes = b""


class GivenUp(msgspec.Struct, frozen=True, tag="given_up"):
    """The vCPU's worker was given up: missed heartbeats, or a broken sequence. `code`: of the error registry."""

    vcpu: int
    code: str
    text: str


class VcpuSent(msgspec.Struct, frozen=True, tag="vcpu"):
    """A message of a vCPU."""

    vcpu: int
    body: VcpuBody


class HostAsked(msgspec.Struct, frozen=True, tag="host"):
    """A host operation; `ticket` is the service's own number for the answer, `paced` as in HostRequest.

    `incarnation` is the host agent's that asked, and `request` its number for the request.
    """

    ticket: int
    operation: HostOperation
    paced: bool = False
    incarnation: int = 0
    request: int = 0


class Admission(msgspec.Struct, frozen=True, tag="admission"):
    """From now on host operations and hardware walks may begin (`open`), or wait."""

    open: bool


class HostAttached(msgspec.Struct, frozen=True, tag="host_attached"):
    """A host agent attached, in incarnation `incarnation`; `token` is what it may be resumed with."""

    incarnation: int
    token: bytes = b""


class HostEnded(msgspec.Struct, frozen=True, tag="host_ended"):
    """The host agent's incarnation is over."""

    incarnation: int


class Steps(msgspec.Struct, frozen=True, tag="steps"):
    """The machine made `count` steps, with these choices."""

    count: int
    choices: list[int]


class Digest(msgspec.Struct, frozen=True, tag="digest"):
    """The event stream so far: number of events and the digest (`StreamDigest`) of its bytes."""

    events: int
    events_digest: str


class Recovered(msgspec.Struct, frozen=True, tag="recovered"):
    """A service that was restarted goes on from here; as Digest. New choices are drawn from another seed."""

    events: int
    events_digest: str


class End(msgspec.Struct, frozen=True, tag="end"):
    """The run ended in order; as Digest. `stuck`: because nothing could go on any more, which was an event too."""

    events: int
    events_digest: str
    stuck: bool = False


Input: TypeAlias = Attached | GivenUp | VcpuSent | HostAsked | Admission
"""What the machine consumes."""
Note: TypeAlias = HostAttached | HostEnded
"""What the machine does not know, and a service that recovers has to."""
Record: TypeAlias = Header | Input | Note | Steps | Digest | Recovered | End

_encode = msgspec.msgpack.Encoder().encode

_HEAD: Final = struct.Struct(">BBIBI")
"""Array of two; unsigned 32-bit integer: the checksum; byte string with a 32-bit length."""
_ARRAY_2, _UINT_32, _BIN_32 = 0x92, 0xCE, 0xC6
_FRAME_BEGINS: Final = bytes([_ARRAY_2, _UINT_32])


class JournalPosition(msgspec.Struct, frozen=True):
    """A place between two frames: the number of the next record, and the offset of its frame in bytes.

    `frame` and `checksum` are the offset and the CRC-32 of the frame before: they tell this journal from others.
    """

    record: int
    offset: int
    frame: int
    checksum: int


START: Final = JournalPosition(0, 0, 0, 0)
"""The beginning of a journal."""


class JournalWriter:
    """Numbers and encodes records, and gathers them into frames.

    `write` receives each frame. `at` is where the journal is taken up again; whoever does that has cut it off there.
    """

    def __init__(self, write: Callable[[bytes], object], at: JournalPosition = START) -> None:
        self._write = write
        self._pending: list[bytes] = []
        self._at = at
        self.records = at.record

    @property
    def position(self) -> JournalPosition:
        """Behind the last frame; all records must have been flushed."""
        assert not self._pending
        return self._at

    def append(self, record: Record) -> int:
        """Adds a record to the next frame and returns its number."""
        number = self.records
        self._pending.append(_encode(record))
        self.records = number + 1
        return number

    def flush(self) -> None:
        """Writes what has gathered as one frame. If `write` raises, the records are still pending."""
        if not self._pending:
            return
        payload = b"".join(self._pending)
        checksum = zlib.crc32(payload)
        frame = _HEAD.pack(_ARRAY_2, _UINT_32, checksum, _BIN_32, len(payload)) + payload
        self._write(frame)
        self._pending.clear()
        start = self._at.offset
        self._at = JournalPosition(self.records, start + len(frame), start, checksum)


class JournalReader:
    """The records of a journal, in order; iterate once.

    `at` is where to begin; without, the header comes first. While iterating, `position` is where the frame that is
    being read begins; afterwards it is where the journal is to be cut off, and `torn` the number of bytes behind it.
    `ended`: the last record is the run's end.

    Iterating raises JournalError if something else than a journal, damage before a whole frame, a record that is none,
    or a record behind the end is met; EmptyJournalError if there is no whole frame.
    """

    def __init__(self, source: BinaryIO, at: JournalPosition = START) -> None:
        self._source = source
        self._checksum = 0
        self._bytes = 0  # of the whole journal
        self.position = at
        self.torn = 0
        self.ended = False

    def __iter__(self) -> Iterator[Record]:
        self.check()
        number = self.position.record
        for payload in self._frames():
            unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=1 << 30)
            unpacker.feed(payload)
            consumed = 0
            try:
                for value in unpacker:
                    consumed = unpacker.tell()
                    record = msgspec.convert(value, Record)
                    self._check_order(number, record)
                    number += 1
                    yield record
                if consumed != len(payload):
                    raise JournalError(f"record {number}: it is not whole, in a frame that is")
            except (msgspec.ValidationError, msgpack.UnpackException, ValueError) as error:
                raise JournalError(f"record {number}: {error}") from error
            at = self.position
            self.position = JournalPosition(
                number, at.offset + _HEAD.size + len(payload), at.offset, self._checksum
            )
        if not number:
            raise EmptyJournalError("the journal is empty")

    def _check_order(self, number: int, record: Record) -> None:
        if (number == 0) != isinstance(record, Header):
            raise JournalError(f"record {number}: a header is expected first, and only there")
        if isinstance(record, Header) and record.schema != SCHEMA:
            raise JournalError(f"journal schema {record.schema}; this version reads {SCHEMA}")
        if self.ended:
            raise JournalError(f"record {number}: there are records behind the end")
        self.ended = isinstance(record, End)

    def check(self) -> None:
        """Raises JournalError if this is not the journal whose position was noted."""
        at = self.position
        self._bytes = self._source.seek(0, io.SEEK_END)
        if at.record:
            self._source.seek(at.frame)
            head = self._source.read(_HEAD.size)
            noted = _HEAD.pack(_ARRAY_2, _UINT_32, at.checksum, _BIN_32, at.offset - at.frame - _HEAD.size)
            if head != noted or self._bytes < at.offset:
                raise JournalError(
                    f"record {at.record} is not at offset {at.offset}: this is another journal"
                )
        self._source.seek(at.offset)

    def _frames(self) -> Iterator[bytes]:
        """The contents of the frames. `position` is to be moved on between them."""
        while head := self._source.read(_HEAD.size):
            payload = self._payload(head)
            if payload is None:
                self._tail()
                return
            yield payload

    def _payload(self, head: bytes) -> bytes | None:
        """The contents of the frame whose head this is; None if it is not whole, or not as it was written."""
        if len(head) < _HEAD.size:
            return None
        array, integer, self._checksum, binary, size = _HEAD.unpack(head)
        if (array, integer, binary) != (_ARRAY_2, _UINT_32, _BIN_32):
            return None
        if size > self._bytes - self.position.offset - _HEAD.size:
            return None
        payload = self._source.read(size)
        return payload if zlib.crc32(payload) == self._checksum else None

    def _tail(self) -> None:
        """The frame at `position` is not whole. That is a torn tail, if no whole frame follows."""
        at = self.position
        self._source.seek(at.offset)
        tail = self._source.read()
        self.torn = len(tail)
        if not at.record and 0x80 <= tail[0] <= 0x8F:
            raise JournalError(f"journal schema 1, which had no frames; this version reads {SCHEMA}")
        if not _FRAME_BEGINS.startswith(tail[:2]) and not at.record:
            raise JournalError("record 0: this is no journal")
        start = tail.find(_FRAME_BEGINS, 1)
        while start >= 0:
            if _is_frame(tail, start):
                raise JournalError(
                    f"record {at.record}: the frame at offset {at.offset} is damaged, and one at "
                    f"{at.offset + start} follows it"
                )
            start = tail.find(_FRAME_BEGINS, start + 1)


def _is_frame(data: bytes, start: int) -> bool:
    if len(data) < start + _HEAD.size:
        return False
    checksum: int
    binary: int
    size: int
    _, _, checksum, binary, size = _HEAD.unpack_from(data, start)
    begin = start + _HEAD.size
    return (
        binary == _BIN_32 and begin + size <= len(data) and zlib.crc32(data[begin : begin + size]) == checksum
    )


def read_journal(source: BinaryIO) -> JournalReader:
    """The records of a journal from its beginning; see JournalReader."""
    return JournalReader(source)
