"""The journal: everything that the machine consumed, in the order in which it consumed it.

A journal is a sequence of MessagePack values, one per record, the first of which is the header. Record numbers count
from 0 (the header). `JournalWriter` hands encoded bytes to whoever keeps them; `JournalReader` takes bytes in pieces.
No record has a time of day in it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgpack
import msgspec

from shadowmmu.protocol.messages import Detach, Enter, Exit, HostOperation, Load, Locked, Log, RunConfig, Walk

__all__ = [
    "DIGEST_INTERVAL",
    "SCHEMA",
    "Attached",
    "Digest",
    "End",
    "GivenUp",
    "Header",
    "HostAsked",
    "Input",
    "JournalError",
    "JournalWriter",
    "Record",
    "Steps",
    "VcpuSent",
    "read_journal",
]

SCHEMA = 1
"""Version of the records."""
DIGEST_INTERVAL = 1000
"""Records from one digest to the next."""

VcpuBody: TypeAlias = Enter | Log | Walk | Load | Locked | Exit | Detach
"""A vCPU's message that the machine consumes."""


class JournalError(Exception):
    """A journal cannot be read; the text says where and why."""


class Header(msgspec.Struct, frozen=True, tag="header"):
    """The first record: what was run, by which version of the code."""

    schema: int
    code_version: str
    config: RunConfig


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """A worker attached as `vcpu`, in incarnation `incarnation`."""

    vcpu: int
    incarnation: int


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
    """A host operation; `ticket` is the service's own number for the answer, `paced` as in HostRequest."""

    ticket: int
    operation: HostOperation
    paced: bool = False


class Steps(msgspec.Struct, frozen=True, tag="steps"):
    """The machine made `count` steps, with these choices."""

    count: int
    choices: list[int]


class Digest(msgspec.Struct, frozen=True, tag="digest"):
    """The event stream so far: number of events and BLAKE2b-128 (hex) of its bytes."""

    events: int
    events_digest: str


class End(msgspec.Struct, frozen=True, tag="end"):
    """The run ended in order; as Digest. `stuck`: because nothing could go on any more, which was an event too."""

    events: int
    events_digest: str
    stuck: bool = False


Input: TypeAlias = Attached | GivenUp | VcpuSent | HostAsked
Record: TypeAlias = Header | Input | Steps | Digest | End

_encode = msgspec.msgpack.Encoder().encode


class JournalWriter:
    """Numbers and encodes records.

    `write` receives each record's bytes, in order, before `append` returns.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self.records = 0

    def append(self, record: Record) -> int:
        """Writes a record and returns its number."""
        number = self.records
        self._write(_encode(record))
        self.records = number + 1
        return number


def read_journal(source: io.BufferedIOBase) -> Iterator[Record]:
    """The records of a journal, the header first.

    A journal whose writer was killed may end in the middle of a record: what is whole is returned. Raises
    JournalError if something else than a journal, or a record that is none, is met.
    """
    unpacker = msgpack.Unpacker(source, raw=False, strict_map_key=True, max_buffer_size=1 << 30)
    number = -1
    try:
        for value in unpacker:
            number += 1
            record = msgspec.convert(value, Record)
            if (number == 0) != isinstance(record, Header):
                raise JournalError(f"record {number}: a header is expected first, and only there")
            if isinstance(record, Header) and record.schema != SCHEMA:
                raise JournalError(f"journal schema {record.schema}; this version reads {SCHEMA}")
            yield record
    except (msgspec.ValidationError, msgpack.UnpackException, ValueError) as error:
        raise JournalError(f"record {number}: {error}") from error
    if number < 0:
        raise JournalError("the journal is empty")
