"""Hypothesis strategies for every message, made from the types themselves; and messages with plausible numbers."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from shadowmmu.protocol import Message
from shadowmmu.protocol import messages as m

U64_MAX = (1 << 64) - 1
MESSAGES: tuple[type[Message], ...] = get_args(m.Message)


def _strategy(info: inspect.Type, depth: int = 0) -> st.SearchStrategy[Any]:
    match info:
        case inspect.Metadata(extra_json_schema={"minimum": low, "maximum": high}):
            return st.integers(low, high)
        case inspect.Metadata(extra_json_schema={"exclusiveMinimum": low}):
            return st.floats(low, exclude_min=True, allow_infinity=False)
        case inspect.Metadata():
            return _strategy(info.type, depth)
        case inspect.IntType():
            low = -(1 << 63) if info.ge is None else info.ge
            return st.integers(low, U64_MAX if info.le is None else info.le)
        case inspect.FloatType():
            return st.floats(
                info.ge if info.gt is None else info.gt,
                info.le,
                exclude_min=info.gt is not None,
                allow_nan=False,
                allow_infinity=False,
            )
        case inspect.StrType():
            return st.text(
                st.characters(exclude_categories=["Cs"]),
                min_size=info.min_length or 0,
                max_size=min(info.max_length or 20, 20),
            )
        case inspect.BytesType():
            return st.binary(max_size=min(info.max_length or 20, 20))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.EnumType():
            return st.sampled_from(list(info.cls))
        case inspect.ListType():
            return st.lists(
                _strategy(info.item_type),
                min_size=info.min_length or 0,
                max_size=min(info.max_length or 5, 5),
            )
        case inspect.TupleType():
            return st.tuples(*map(_strategy, info.item_types))
        case inspect.DictType():
            return st.dictionaries(_strategy(info.key_type), _strategy(info.value_type), max_size=4)
        case inspect.UnionType():
            return st.one_of(*map(_strategy, info.types))
        case inspect.StructType() if info.cls is m.TrailStep:
            # What keeps trails from having trails.
            answers = [_strategy(inspect.type_info(kind)) for kind in (m.Loaded, m.WalkFault)]
            entered = st.builds(m.Entered, numbers, interrupts=st.lists(st.integers(32, 255), max_size=3))
            asked = st.sampled_from(m.Asked)
            return st.builds(m.TrailStep, numbers, asked, st.one_of(entered, *answers))
        case inspect.StructType():
            return st.builds(info.cls, **{field.name: _strategy(field.type) for field in info.fields})
        case _:
            raise NotImplementedError(info)


def bodies(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of that type."""
    return _strategy(inspect.type_info(kind))


numbers = st.integers(0, U64_MAX)


def envelopes(*kinds: type[Message]) -> st.SearchStrategy[m.Envelope]:
    """Any envelope with a message of these types."""
    return st.builds(m.Envelope, numbers, numbers, st.one_of(*map(bodies, kinds or MESSAGES)))


def plain(value: object) -> Any:
    """What an independent decoder sees: maps, lists and scalars."""
    value = msgspec.to_builtins(value, builtin_types=(bytes,))
    return _lists(value)


def _lists(value: object) -> object:
    match value:
        case dict():
            return {key: _lists(item) for key, item in value.items()}
        case list() | tuple():
            return [_lists(item) for item in value]
        case _:
            return value
