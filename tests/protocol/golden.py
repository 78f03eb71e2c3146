"""The golden vectors (vectors.json), and the JSON form of messages that they are written in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, TypeAlias

from shadowmmu.protocol import DIRECTIONS, Direction

Vector: TypeAlias = dict[str, Any]

_FILE: Final = Path(__file__).parent / "vectors.json"
_READ: Final = json.loads(_FILE.read_text())

VALID: Final[list[Vector]] = _READ["valid"]
INVALID: Final[list[Vector]] = _READ["invalid"]
_DIRECTIONS: Final = {direction.name: direction for direction in DIRECTIONS}


def frames(vector: Vector) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in vector["frames"]]


def direction(vector: Vector) -> Direction:
    return _DIRECTIONS[vector["direction"]]


def means(vector: Vector) -> dict[str, Any]:
    """The body with everything that may be left out."""
    complete: dict[str, Any] = vector["means"] if "means" in vector else vector["body"]
    return complete


def name_of(vector: Vector) -> str:
    """For the names of tests."""
    name: str = vector["name"]
    return name


def from_json(value: Any) -> Any:
    """The value that the JSON form describes."""
    match value:
        case {"$bin": str(data)}:
            return bytes.fromhex(data)
        case dict():
            return {key: from_json(item) for key, item in value.items()}
        case list():
            return [from_json(item) for item in value]
        case _:
            return value


def to_json(value: Any) -> Any:
    """The JSON form of a value as a MessagePack decoder gives it."""
    match value:
        case bytes():
            return {"$bin": value.hex()}
        case dict():
            return {key: to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case _:
            return value
