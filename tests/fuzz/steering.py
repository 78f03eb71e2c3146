"""Decisions out of bytes: how an input of a fuzzer steers a harness.

Every decision takes bytes from the front of the input; when they are used up, each is the first of its kind (0). So
every byte string is a run of the harness, and a small change of the bytes is a small change of the run. `build` makes any message
that way: from its type, like the strategies of `tests.protocol.strategies`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from msgspec import inspect

__all__ = ["Hints", "Steering", "build"]

T = TypeVar("T")
Hints = Mapping[str, Sequence[int]]
"""By field name: numbers that mean something where the message is going."""

U64_MAX = (1 << 64) - 1
ACCESS = ("flags", "gva", "pfn", "size", "value")
"""What the parts of a logged access are; a tuple has no names."""


class Steering:
    """An input that is used up from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether all of it is used."""
        return self._at >= len(self._data)

    def byte(self) -> int:
        """The next byte, or 0."""
        if self.done:
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or as many as there are."""
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1; `count` at most 256."""
        return self.byte() % count

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def integer(self, low: int, high: int) -> int:
        """A number within bounds: near either of them, small, a power of two, or any."""
        kind = self.byte()
        if kind < 96:
            number = low + kind % 16
        elif kind < 128:
            number = high - kind % 4
        elif kind < 192:
            number = 1 << kind % 64
        else:
            number = int.from_bytes(self.take(1 + kind % 8), "little")
        return min(max(number, low), high)


def build(kind: type[T], steering: Steering, hints: Hints) -> T:
    """A well-formed message (or struct) of that type. Three quarters of the fields that have hints take one."""
    of: Any = kind
    made: T = _build(_type_of(of), "", steering, hints)
    return made


@functools.cache
def _type_of(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _build(info: inspect.Type, name: str, steering: Steering, hints: Hints) -> Any:
    match info:
        case inspect.Metadata():
            return _build(info.type, name, steering, hints)
        case inspect.IntType():
            known = hints.get(name)
            if known and steering.byte() % 4:
                return steering.pick(known)
            low = -(1 << 63) if info.ge is None else info.ge
            return steering.integer(low, U64_MAX if info.le is None else info.le)
        case inspect.FloatType():
            return float(steering.byte() or 1) / 16
        case inspect.StrType():
            limit = min(info.max_length or 8, 8)
            text = steering.take(steering.below(limit + 1)).decode("latin-1")
            return text.ljust(info.min_length or 0, "x")
        case inspect.BytesType():
            return steering.take(steering.below(16))
        case inspect.BoolType():
            return bool(steering.below(2))
        case inspect.NoneType():
            return None
        case inspect.EnumType():
            return steering.pick(list(info.cls))
        case inspect.ListType():
            least = info.min_length or 0
            count = min(least + steering.below(4), info.max_length or 4)
            return [_build(info.item_type, name, steering, hints) for _ in range(count)]
        case inspect.TupleType():
            names = ACCESS if len(info.item_types) == len(ACCESS) else ("gpa", "value")
            return tuple(
                _build(item, part, steering, hints) for item, part in zip(info.item_types, names, strict=True)
            )
        case inspect.DictType():
            return {
                _build(info.key_type, "", steering, hints): _build(info.value_type, "", steering, hints)
                for _ in range(steering.below(3))
            }
        case inspect.UnionType():
            return _build(steering.pick(info.types), name, steering, hints)
        case inspect.StructType():
            fields = {field.name: _build(field.type, field.name, steering, hints) for field in info.fields}
            return info.cls(**fields)
        case _:
            raise NotImplementedError(info)
