"""Envelopes in other encodings than ours: what the specification allows and a receiver has to take. Pure.

Members of maps in another order, defaults written out, and for every value one of the forms that MessagePack has for
it. The choices come from a seeded generator.
"""

from __future__ import annotations

import random
import struct
from typing import Any, Final

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import VERSION_FRAME

__all__ = ["wide_envelope", "wide_frames"]

_UNSIGNED: Final = ((0xCC, 8), (0xCD, 16), (0xCE, 32), (0xCF, 64))
_SIGNED: Final = ((0xD0, 7), (0xD1, 15), (0xD2, 31), (0xD3, 63))


def wide_frames(envelope: m.Envelope, choices: random.Random, version: bytes = VERSION_FRAME) -> list[bytes]:
    """The two frames of a message."""
    return [version, wide_envelope(envelope.incarnation, envelope.seq, _plain(envelope.body), choices)]


def wide_envelope(incarnation: int, seq: int, body: dict[str, Any], choices: random.Random) -> bytes:
    """An envelope with a body of plain values."""
    return _array([incarnation, seq, body], choices)


def _plain(value: object) -> Any:
    """A struct with all its members, those that have their default value, too."""
    if isinstance(value, msgspec.Struct):
        members = {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
        tag = value.__struct_config__.tag
        if value.__struct_config__.array_like:
            return list(members.values())
        return members if tag is None else {"t": tag, **members}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def _number(number: int, choices: random.Random) -> bytes:
    forms = [bytes([number])] if number < 0x80 else []
    for first, bits in (*_UNSIGNED, *_SIGNED):
        if number < 1 << bits:
            forms.append(bytes([first]) + number.to_bytes((bits + 7) // 8, "big"))
    return choices.choice(forms)


def _sized(
    short: tuple[int, int], forms: tuple[tuple[int, int], ...], size: int, choices: random.Random
) -> bytes:
    """The head of a value with `size` parts: `short` is (first byte, limit), `forms` (first byte, bytes of length)."""
    first, limit = short
    heads = [bytes([first | size])] if size < limit else []
    heads += [bytes([code]) + size.to_bytes(width, "big") for code, width in forms if size < 1 << 8 * width]
    return choices.choice(heads)


def _array(items: list[Any], choices: random.Random) -> bytes:
    head = _sized((0x90, 16), ((0xDC, 2), (0xDD, 4)), len(items), choices)
    return head + b"".join(_value(item, choices) for item in items)


def _value(value: Any, choices: random.Random) -> bytes:
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value >= 0:
            return _number(value, choices)
        case float():
            return struct.pack(">Bd", 0xCB, value)
        case str():
            data = value.encode()
            return _sized((0xA0, 32), ((0xD9, 1), (0xDA, 2), (0xDB, 4)), len(data), choices) + data
        case bytes():
            forms = ((0xC4, 1), (0xC5, 2), (0xC6, 4))
            return _sized((0, 0), forms, len(value), choices) + value
        case list():
            return _array(value, choices)
        case dict():
            pairs = list(value.items())
            choices.shuffle(pairs)
            head = _sized((0x80, 16), ((0xDE, 2), (0xDF, 4)), len(pairs), choices)
            return head + b"".join(_value(key, choices) + _value(item, choices) for key, item in pairs)
        case _:
            raise TypeError(f"no value of a message: {value!r}")
