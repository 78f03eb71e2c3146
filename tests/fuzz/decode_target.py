"""Fuzz target `decode`: any frames, in each of the four directions.

The first byte chooses the direction and how many frames there are; the second the version frame; the rest is the envelope.
Promised: an Envelope or RemoteProtocolError. What was decoded can be encoded again and means the same; what was
refused can be answered.
"""

from __future__ import annotations

import enum
import re
from typing import Any

import msgspec

from shadowmmu.protocol import (
    DIRECTIONS,
    FROM_MMU,
    VERSION_FRAME,
    LocalProtocolError,
    RemoteProtocolError,
    error_reply,
)

__all__ = ["run", "seed"]

VERSIONS = (VERSION_FRAME, b"SMMU/1.7", b"SMMU/2.0", b"SMMU/01.0", b"SMMU/99999.99999", b"", b"\xff" * 40)


def run(data: bytes) -> list[str]:
    """One input; raises AssertionError, or whatever escaped, on a finding.

    Returns what became of it, in words: the decoder is compiled, so that no coverage tells one outcome from another.
    """
    first, second, rest = data[:1] or b"\0", data[1:2] or b"\0", data[2:]
    direction = DIRECTIONS[first[0] & 3]
    frames = [VERSIONS[second[0] % len(VERSIONS)], rest]
    match first[0] >> 2:
        case 1:
            frames = [rest]
        case 2:
            frames = [rest, rest]
        case 3:
            frames = [*frames, *(rest[at : at + 1] for at in range(min(len(rest), 20)))]
        case _:
            pass
    try:
        envelope = direction.decode(frames)
    except RemoteProtocolError as error:
        _check_answerable(error)
        return [f"{direction.name} {error.code} {re.sub('[0-9]+', '', error.text)}"]
    try:
        again = direction.encode(envelope)
    except LocalProtocolError:
        # Defaults that a sender left out are written: a message near the limit may grow beyond it.
        if len(rest) <= direction.soft_limit // 16:
            raise
        return ["too large when encoded again"]
    assert repr(direction.decode(again)) == repr(envelope), "encoded again it means something else"
    return list(_shape(envelope.body, ""))


def _check_answerable(error: RemoteProtocolError) -> None:
    reply = error_reply(error)
    assert FROM_MMU.decode(FROM_MMU.encode(reply)) == reply, "an error reply that its receiver refuses"


def _shape(value: Any, where: str) -> set[str]:
    """Types and rough sizes of the parts of a message."""
    match value:
        case msgspec.Struct():
            name = f"{where}/{type(value).__name__}"
            parts = (_shape(getattr(value, field), f"{name}.{field}") for field in value.__struct_fields__)
            return {name}.union(*parts)
        case list() | tuple():
            return {f"{where}[{len(value).bit_length()}]"}.union(
                *(_shape(item, f"{where}[]") for item in value)
            )
        case bool() | enum.Enum():
            return {f"{where}={value}"}
        case int():
            return {f"{where}:{value.bit_length() // 8}"}
        case _:
            return {f"{where}:{type(value).__name__}"}


def seed(direction: int, envelope: bytes) -> bytes:
    """The input that decodes these bytes in that direction."""
    return bytes([direction, 0]) + envelope
