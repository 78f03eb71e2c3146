"""Frames to envelopes and back.

Every message is two frames (a ROUTER socket adds the routing id in front, which the transport takes off): the version,
`SMMU/<major>.<minor>` in ASCII, and the envelope, a MessagePack array of incarnation, sequence number and body.

There are four directions, each with its own set of messages and its own limits, so that a message in the wrong
direction is refused as such. Sizes and counts are checked before anything is decoded; depth and lengths are checked
by the typed decoder while it decodes. Whatever bytes come in, `decode` returns an Envelope or raises
RemoteProtocolError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from shadowmmu.protocol import messages
from shadowmmu.protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from shadowmmu.protocol.messages import Envelope

__all__ = [
    "DIRECTIONS",
    "FROM_COORDINATOR",
    "FROM_MMU",
    "TO_COORDINATOR",
    "TO_MMU",
    "VERSION",
    "VERSION_FRAME",
    "Direction",
    "minor_version",
]

VERSION: Final = (1, 1)
"""The protocol's major and minor version."""
VERSION_FRAME: Final = b"SMMU/%d.%d" % VERSION
"""The first frame of every message that we send."""

_VERSION_PATTERN = re.compile(rb"SMMU/(0|[1-9][0-9]{0,4})\.(0|[1-9][0-9]{0,4})", re.ASCII)
_VERSION_FRAME_LIMIT = 16  # "SMMU/" and two numbers of up to five digits

KIB: Final = 1024
MIB: Final = 1024 * 1024

_encode = msgspec.msgpack.Encoder().encode
_Numbers = tuple[messages.U64, messages.U64, msgspec.Raw]
_numbers_decoder: msgspec.msgpack.Decoder[tuple[int, int, msgspec.Raw]] = msgspec.msgpack.Decoder(_Numbers)
_any_decoder: msgspec.msgpack.Decoder[tuple[int, int, messages.Message]] = msgspec.msgpack.Decoder(
    tuple[messages.U64, messages.U64, messages.Message]
)

# What decoding of hostile bytes may raise: msgspec's own errors, bad UTF-8 and the like, nesting too deep.
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)


class Direction:
    """One of the four directions: who speaks to whom, with which messages, and how large they may be.

    Up to `soft_limit` bytes a message is read; above it is refused with an error reply; above `hard_limit` the
    receiving socket (MAXMSGSIZE) cuts the connection.
    """

    __slots__ = ("_decode", "hard_limit", "name", "soft_limit")

    def __init__(self, name: str, bodies: Any, *, soft_limit: int, hard_limit: int) -> None:
        self.name = name
        self.soft_limit = soft_limit
        self.hard_limit = hard_limit
        decoder: msgspec.msgpack.Decoder[tuple[int, int, messages.Message]] = msgspec.msgpack.Decoder(
            tuple[messages.U64, messages.U64, bodies]
        )
        self._decode = decoder.decode

    def __repr__(self) -> str:
        return f"<Direction {self.name}>"

    def encode(self, envelope: Envelope) -> list[bytes]:
        """The two frames of a message of ours.

        Raises LocalProtocolError if it does not fit: over the soft limit, or an integer of more than 64 bits.
        """
        try:
            data = _encode((envelope.incarnation, envelope.seq, envelope.body))
        except (OverflowError, TypeError, ValueError, msgspec.MsgspecError) as error:
            raise LocalProtocolError(ErrorCode.MALFORMED, f"cannot encode: {error}") from error
        if len(data) > self.soft_limit:
            raise LocalProtocolError(
                ErrorCode.TOO_LARGE, f"{len(data)} bytes; {self.name} takes {self.soft_limit}"
            )
        return [VERSION_FRAME, data]

    def decode(self, frames: Sequence[bytes]) -> Envelope:
        """The envelope in a peer's frames (without routing id), or RemoteProtocolError."""
        if len(frames) != 2:
            raise RemoteProtocolError(
                ErrorCode.BAD_PART_COUNT, f"{len(frames)} frames after the routing id; a message has 2"
            )
        version, data = frames
        if version != VERSION_FRAME:
            _check_version(version)
        if len(data) > self.soft_limit:
            raise RemoteProtocolError(
                ErrorCode.TOO_LARGE, f"{len(data)} bytes; {self.name} takes {self.soft_limit}"
            )
        try:
            return Envelope(*self._decode(data))
        except _DECODE_ERRORS as error:
            raise self._diagnose(data, error) from error

    def _diagnose(self, data: bytes, error: Exception) -> RemoteProtocolError:
        """Why `data` could not be decoded: in the wrong direction, or malformed; with its numbers if readable."""
        incarnation = seq = 0
        try:
            incarnation, seq, _ = _numbers_decoder.decode(data)
            body = _any_decoder.decode(data)[2]
        except _DECODE_ERRORS:
            text = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            return RemoteProtocolError(ErrorCode.MALFORMED, text, incarnation=incarnation, seq=seq)
        return RemoteProtocolError(
            ErrorCode.UNEXPECTED_MESSAGE,
            f"{type(body).__name__} is no message {self.name}",
            incarnation=incarnation,
            seq=seq,
        )


def minor_version(frames: Sequence[bytes]) -> int:
    """Of the sender of a message that has been decoded."""
    return int(frames[0].rpartition(b".")[2])


def _check_version(frame: bytes) -> None:
    match = _VERSION_PATTERN.fullmatch(frame) if len(frame) <= _VERSION_FRAME_LIMIT else None
    if match is None:
        raise RemoteProtocolError(ErrorCode.MALFORMED, "the first frame is no version (SMMU/<major>.<minor>)")
    if int(match[1]) != VERSION[0]:
        raise RemoteProtocolError(
            ErrorCode.UNSUPPORTED_VERSION,
            f"{frame.decode('ascii')} is not spoken here; spoken: {VERSION_FRAME.decode('ascii')}",
        )


TO_MMU: Final = Direction(
    "to the MMU service", messages.VcpuMessage, soft_limit=256 * KIB, hard_limit=1 * MIB
)
"""From vCPUs, host agents and probes. The largest have a program's state: 192 kB and something."""
FROM_MMU: Final = Direction(
    "from the MMU service", messages.MmuMessage, soft_limit=8 * MIB, hard_limit=16 * MIB
)
"""To vCPUs, host agents and probes. The largest is the dirty log of a guest of 2**20 pages: 5 MB."""
TO_COORDINATOR: Final = Direction(
    "to the coordinator", messages.MemberMessage, soft_limit=1 * MIB, hard_limit=4 * MIB
)
"""From the processes of a run: event batches and reports are the large ones."""
FROM_COORDINATOR: Final = Direction(
    "from the coordinator", messages.CoordinatorMessage, soft_limit=64 * KIB, hard_limit=1 * MIB
)
"""To the processes of a run."""

DIRECTIONS: Final = (TO_MMU, FROM_MMU, TO_COORDINATOR, FROM_COORDINATOR)
"""All of them, in the order of the documentation."""
