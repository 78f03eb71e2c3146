"""Where fuzzing begins: the golden vectors, and some messages of every type."""

from __future__ import annotations

import random
from typing import Any, get_args

from shadowmmu.protocol import DIRECTIONS, Envelope
from shadowmmu.protocol import messages as m
from tests.fuzz.decode_target import seed
from tests.fuzz.journal_target import real_journal
from tests.fuzz.steering import Steering, build
from tests.protocol.golden import INVALID, VALID, direction, frames

__all__ = ["seeds"]

PER_MESSAGE = 3
MESSAGE_BYTES = 64
SIMPLE = 32


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with."""
    match target:
        case "decode":
            return _vectors() + _made()
        case "journal":
            return [b"\0" + real_journal()[:4096], *(bytes([128, what, 0, 1]) for what in range(4))]
        case _:
            # An input steers: some lengths of everything that a byte may say.
            return [bytes(range(start, start + SIMPLE)) for start in range(0, 256 - SIMPLE, SIMPLE)]


def _vectors() -> list[bytes]:
    found = []
    for vector in (*VALID, *INVALID):
        parts = frames(vector)
        if len(parts) == 2 and len(parts[1]) < 1 << 12:
            found.append(seed(DIRECTIONS.index(direction(vector)), parts[1]))
    return found


def _made() -> list[bytes]:
    draw = random.Random(1)
    found: list[bytes] = []
    for kind in get_args(m.Message):
        for _ in range(PER_MESSAGE):
            body: Any = build(kind, Steering(draw.randbytes(MESSAGE_BYTES)), {})
            envelope = Envelope(1, 1, body)
            found += [seed(number, each.encode(envelope)[1]) for number, each in enumerate(DIRECTIONS)]
    return found
