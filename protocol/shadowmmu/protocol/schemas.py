"""JSON Schemas (draft 2020-12) of all messages, made from the types that the codec decodes.

A schema describes the *JSON form* of a message: what a MessagePack decoder shows, written as JSON. Maps, arrays,
strings, booleans and null are the same in both; an integer stays an integer; a byte string, which JSON lacks, is
`{"$bin": "<hex>"}`. Relies on msgspec for the schemas of the types and adds what it leaves open: what each field means
(`fields`), the width of integers, byte strings, and the envelopes of the four directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias, get_args

import msgspec
from msgspec import inspect

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import FROM_COORDINATOR, FROM_MMU, TO_COORDINATOR, TO_MMU, VERSION, Direction
from shadowmmu.protocol.fields import note

__all__ = [
    "DEFINITION",
    "MESSAGES",
    "Schema",
    "direction_name",
    "envelope_of",
    "inner_structs",
    "schema_document",
]

Schema: TypeAlias = dict[str, Any]

MESSAGES: Final[dict[Direction, tuple[type[m.Message], ...]]] = {
    TO_MMU: get_args(m.VcpuMessage),
    FROM_MMU: get_args(m.MmuMessage),
    TO_COORDINATOR: get_args(m.MemberMessage),
    FROM_COORDINATOR: get_args(m.CoordinatorMessage),
}
"""The messages of each direction, in the order of the documentation."""

DEFINITION: Final = "#/$defs/{name}"
"""Where a document has its definitions."""

_WIDEST: Final = {"minimum": -(1 << 63), "maximum": (1 << 64) - 1}
"""What a MessagePack integer can be."""
_U64: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1}
_ACCESS: Final[Schema] = msgspec.json.schema(m.LoggedAccess)
_ACCESS_MEMBERS: Final = ("flags", "gva", "pfn", "size", "value")
_BIN: Final[Schema] = {
    "description": "A MessagePack byte string (bin), in JSON form: its bytes in hexadecimal.",
    "type": "object",
    "properties": {"$bin": {"type": "string", "pattern": "^([0-9a-f]{2})*$"}},
    "required": ["$bin"],
    "additionalProperties": False,
}


def direction_name(direction: Direction) -> str:
    """The direction's name as that of a definition: "to the MMU service" is ToMmu."""
    words = (word for word in direction.name.split() if word not in ("the", "service"))
    return "".join(word.capitalize() for word in words)


def inner_structs(kinds: Iterable[type]) -> list[type]:
    """The structs that occur inside messages of these types, in order of appearance."""
    found: dict[type, None] = {}
    top = dict.fromkeys(kinds)

    def visit(info: inspect.Type) -> None:
        match info:
            case inspect.StructType():
                if info.cls in found or info.cls in top:
                    return  # a message may contain itself; those of `top` are visited by themselves
                found[info.cls] = None
                for field in info.fields:
                    visit(field.type)
            case inspect.UnionType():
                for part in info.types:
                    visit(part)
            case inspect.Metadata():
                visit(info.type)
            case inspect.ListType():
                visit(info.item_type)
            case _:
                pass

    for kind in top:
        info = inspect.type_info(kind)
        assert isinstance(info, inspect.StructType)
        for field in info.fields:
            visit(field.type)
    return list(found)


def envelope_of(body: Schema, base: str = "") -> Schema:
    """The schema of an envelope around `body`; `base` is the document that has the definitions."""
    number = {"$ref": base + DEFINITION.format(name="U64")}
    return {
        "type": "array",
        "prefixItems": [
            number | {"title": "incarnation"},
            number | {"title": "number"},
            body,
        ],
        "items": False,
        "minItems": 3,
    }


def schema_document() -> Schema:
    """One document: a definition per message, per struct inside one, and per direction (`ToMmu`, `FromMmu`, ...).

    The document itself accepts the envelopes of all directions.
    """
    every = list(dict.fromkeys(kind for kinds in MESSAGES.values() for kind in kinds))
    _, components = msgspec.json.schema_components(every, ref_template=DEFINITION)
    definitions = {name: _complete(schema) for name, schema in components.items()}
    for kind in [*every, *inner_structs(every)]:
        _describe(kind, definitions[kind.__name__])
    envelopes = {direction_name(direction): _direction(direction) for direction in MESSAGES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "shadowmmu protocol {}.{}".format(*VERSION),
        "description": (
            "The envelopes of all messages in JSON form (docs/PROTOCOL.md). Generated from the code: do not edit. "
            "Integers have up to 64 bits: read this file, and messages, with a JSON library that keeps them exact. An "
            "integer stands on the wire as a MessagePack integer, never as a floating-point number."
        ),
        "anyOf": [{"$ref": DEFINITION.format(name=name)} for name in envelopes],
        "$defs": {"U64": _U64, "Bin": _BIN, "LoggedAccess": _access()}
        | envelopes
        | dict(sorted(definitions.items())),
    }


def _direction(direction: Direction) -> Schema:
    refs = [{"$ref": DEFINITION.format(name=kind.__name__)} for kind in MESSAGES[direction]]
    text = f"An envelope {direction.name}: [incarnation, number, body]."
    return {"description": text} | envelope_of({"oneOf": refs})


def _access() -> Schema:
    """A logged access, its members named."""
    members = zip(_ACCESS_MEMBERS, _ACCESS["prefixItems"], strict=True)
    return _ACCESS | {"prefixItems": [{"title": name} | member for name, member in members]}


def _complete(schema: Any) -> Any:
    """A schema of msgspec's with byte strings, logged accesses by name, and the widths of integers."""
    if schema == _ACCESS:
        return {"$ref": DEFINITION.format(name="LoggedAccess")}
    match schema:
        case {"contentEncoding": "base64"}:
            default = {"default": {"$bin": ""}} if "default" in schema else {}
            return {"$ref": DEFINITION.format(name="Bin")} | default
        case {"enum": [only]}:
            return {"const": only}
        case {"type": "integer"}:
            return _WIDEST | schema
        case dict():
            # A discriminator is OpenAPI's: the constant `t` of each alternative says the same to JSON Schema.
            return {key: _complete(value) for key, value in schema.items() if key != "discriminator"}
        case list():
            return [_complete(value) for value in schema]
        case _:
            return schema


def _describe(kind: type, schema: Schema) -> None:
    """Puts the documentation's texts into the schema of a struct."""
    schema["description"] = " ".join((kind.__doc__ or "").split())
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    for number, field in enumerate(info.fields):
        text = note(kind.__name__, field.name)
        if info.array_like:
            schema["prefixItems"][number] |= {"title": field.encode_name, "description": text}
        else:
            described = schema["properties"][field.encode_name]
            described["description"] = text
            limit = _byte_limit(field.type)
            if limit is not None:
                described["properties"] = {"$bin": {"maxLength": 2 * limit}}


def _byte_limit(info: inspect.Type) -> int | None:
    """The most bytes of a byte string, which may be optional."""
    parts = info.types if isinstance(info, inspect.UnionType) else (info,)
    return next((part.max_length for part in parts if isinstance(part, inspect.BytesType)), None)
