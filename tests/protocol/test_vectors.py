"""Golden bytes: what our codec, msgspec by itself and msgpack make of them, and whether there are enough of them."""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec
import pytest
from msgspec import inspect

from shadowmmu.protocol import VERSION_FRAME, Direction, ErrorCode, RemoteProtocolError
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.schemas import MESSAGES
from tests.protocol.golden import (
    INVALID,
    VALID,
    Vector,
    direction,
    frames,
    from_json,
    means,
    name_of,
    to_json,
)

FULL = [vector for vector in VALID if vector["form"] == "full"]
SPARSE = [vector for vector in VALID if vector["form"] == "sparse"]
KINDS = {m.tag_of(kind): kind for kinds in MESSAGES.values() for kind in kinds}
CASES = [(direction, kind) for direction, kinds in MESSAGES.items() for kind in kinds]


def same(left: object, right: object) -> bool:
    """Equal, and of the same types: 1, 1.0 and True are three values."""
    if type(left) is not type(right):
        return False
    match left, right:
        case dict(), dict():
            return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
        case list(), list():
            return len(left) == len(right) and all(map(same, left, right))
        case _:
            return left == right


def refusal(way: Direction, parts: list[bytes]) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        way.decode(parts)
    return caught.value


# --- valid vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_the_codec_reads_what_the_vector_says(vector: Vector) -> None:
    envelope = direction(vector).decode(frames(vector))
    assert (envelope.incarnation, envelope.seq) == (vector["incarnation"], vector["number"])
    assert same(to_json(with_defaults(envelope.body)), means(vector))


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_msgpack_reads_what_the_vector_says(vector: Vector) -> None:
    unpacked = msgpack.unpackb(frames(vector)[1])
    assert same(to_json(unpacked), [vector["incarnation"], vector["number"], vector["body"]])


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_msgspec_without_our_types_reads_the_same_as_msgpack(vector: Vector) -> None:
    data = frames(vector)[1]
    assert same(msgspec.msgpack.decode(data), msgpack.unpackb(data))


@pytest.mark.parametrize("vector", FULL, ids=name_of)
def test_the_codec_makes_the_bytes_of_a_message_with_all_fields(vector: Vector) -> None:
    way = direction(vector)
    assert way.encode(way.decode(frames(vector))) == [VERSION_FRAME, frames(vector)[1]]


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_a_vector_says_of_which_version_it_is(vector: Vector) -> None:
    assert frames(vector)[0] == f"SMMU/{vector['version']}".encode()


@pytest.mark.parametrize("vector", [v for v in VALID if v["form"] == "earlier"], ids=name_of)
def test_a_message_may_have_some_of_the_fields_that_may_be_left_out(vector: Vector) -> None:
    kind = KINDS[vector["body"]["t"]]
    optional = {field.encode_name for field in struct_info(kind).fields if not field.required}
    assert optional & vector["body"].keys()
    assert missing(kind, vector["body"])


def test_every_message_of_1_0_has_its_vector_of_1_0() -> None:
    of_1_0 = {vector["body"]["t"] for vector in VALID if vector["version"] == "1.0"}
    assert of_1_0 == KINDS.keys() - {"resume", "resumed"}


@pytest.mark.parametrize("vector", FULL + SPARSE, ids=name_of)
def test_both_libraries_make_the_canonical_bytes(vector: Vector) -> None:
    value = [vector["incarnation"], vector["number"], from_json(vector["body"])]
    assert msgpack.packb(value) == frames(vector)[1]
    assert msgspec.msgpack.encode(value) == frames(vector)[1]


@pytest.mark.parametrize("vector", [v for v in VALID if v["form"] == "noncanonical"], ids=name_of)
def test_other_encodings_mean_the_same_as_the_canonical_one(vector: Vector) -> None:
    way = direction(vector)
    envelope = way.decode(frames(vector))
    canonical = way.encode(envelope)
    assert canonical[1] != frames(vector)[1]
    assert way.decode(canonical) == envelope


# --- invalid vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", INVALID, ids=name_of)
def test_what_is_refused_and_with_which_code(vector: Vector) -> None:
    error = refusal(direction(vector), frames(vector))
    assert error.code.value == vector["code"]
    assert (error.incarnation, error.seq) == (vector["incarnation"], vector["number"])


@pytest.mark.parametrize("vector", FULL, ids=name_of)
def test_no_required_field_may_be_missing(vector: Vector) -> None:
    for path, field in fields_of(means(vector)):
        if field.required:
            assert code_of(vector, without(vector["body"], path)) is ErrorCode.MALFORMED, path


@pytest.mark.parametrize("vector", FULL, ids=name_of)
def test_no_field_may_have_another_type(vector: Vector) -> None:
    for path, _ in fields_of(means(vector)):
        assert code_of(vector, replaced(vector["body"], path, {"no": None})) is ErrorCode.MALFORMED, path


@pytest.mark.parametrize("vector", FULL, ids=name_of)
def test_no_unknown_field_is_taken(vector: Vector) -> None:
    assert code_of(vector, vector["body"] | {"invented": 1}) is ErrorCode.MALFORMED


@pytest.mark.parametrize("vector", FULL, ids=name_of)
def test_nothing_may_be_cut_off_or_follow(vector: Vector) -> None:
    version, data = frames(vector)
    for length in range(len(data)):
        assert refusal(direction(vector), [version, data[:length]]).code is ErrorCode.MALFORMED
    assert refusal(direction(vector), [version, data + b"\xc0"]).code is ErrorCode.MALFORMED


def code_of(vector: Vector, body: dict[str, Any]) -> ErrorCode:
    data = msgpack.packb([vector["incarnation"], vector["number"], from_json(body)])
    error = refusal(direction(vector), [VERSION_FRAME, data])
    assert (error.incarnation, error.seq) == (vector["incarnation"], vector["number"])
    return error.code


# --- whether there are enough -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way, kind", CASES)
def test_every_message_has_a_vector_with_all_its_fields(way: Direction, kind: type[m.Message]) -> None:
    tag = m.tag_of(kind)
    assert any(
        direction(vector) is way and vector["body"]["t"] == tag and not missing(kind, vector["body"])
        for vector in FULL
    )


@pytest.mark.parametrize("way, kind", CASES)
def test_every_message_has_a_vector_without_its_defaults(way: Direction, kind: type[m.Message]) -> None:
    info = struct_info(kind)
    if all(field.required for field in info.fields):
        return  # the vector with all fields is the one
    tag = m.tag_of(kind)
    optional = {field.encode_name for field in info.fields if not field.required}
    found = [vector for vector in SPARSE if direction(vector) is way and vector["body"]["t"] == tag]
    assert any(not optional & vector["body"].keys() for vector in found)
    assert all(missing(kind, vector["body"]) and not missing(kind, means(vector)) for vector in found)


def test_every_struct_inside_a_message_has_its_vectors() -> None:
    """Exit reasons, host operations, and what else has a shape of its own."""
    complete, sparse = set[type](), set[type]()
    for vector in FULL + SPARSE:
        for kind, value in structs_of(KINDS[vector["body"]["t"]], vector["body"]):
            (sparse if missing(kind, value) else complete).add(kind)
    inside = {kind for kinds in MESSAGES.values() for kind in kinds} | complete | sparse
    assert complete >= inside
    assert sparse >= {
        kind for kind in inside if not all(field.required for field in struct_info(kind).fields)
    }


def test_every_value_of_every_enumeration_of_a_vcpu_occurs() -> None:
    text = str([vector["body"] for vector in FULL])
    for enumeration in (m.LockedOp, m.ControlRegister):
        assert all(f"'{member.value}'" in text for member in enumeration)


def test_every_kind_of_refusal_before_the_session_has_vectors() -> None:
    codes = {vector["code"] for vector in INVALID}
    assert codes == {"bad-part-count", "unsupported-version", "malformed", "unexpected-message"}


def test_names_are_unique() -> None:
    names = [vector["name"] for vector in VALID + INVALID]
    assert len(names) == len(set(names))


# --- messages by their types --------------------------------------------------------------------------------------


def with_defaults(value: object) -> object:
    """Structs as maps in which nothing is left out."""
    match value:
        case msgspec.Struct():
            tag = value.__struct_config__.tag
            fields = {name: with_defaults(getattr(value, name)) for name in value.__struct_fields__}
            if value.__struct_config__.array_like:
                return list(fields.values())
            return fields if tag is None else {"t": tag, **fields}
        case list() | tuple():
            return [with_defaults(item) for item in value]
        case enum.Enum():
            return value.value
        case _:
            return value


def struct_info(kind: type) -> inspect.StructType:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info


def missing(kind: type, value: dict[str, Any]) -> set[str]:
    return {field.encode_name for field in struct_info(kind).fields} - value.keys()


def structs_of(kind: type, value: dict[str, Any]) -> Iterator[tuple[type, dict[str, Any]]]:
    """The struct itself, and those in its fields."""
    yield kind, value
    for field in struct_info(kind).fields:
        inner = value.get(field.encode_name)
        if isinstance(inner, dict):
            for choice in choices(field.type):
                if choice.tag is None or choice.tag == inner["t"]:
                    yield from structs_of(choice.cls, inner)


def choices(info: inspect.Type) -> list[inspect.StructType]:
    parts = info.types if isinstance(info, inspect.UnionType) else (info,)
    return [part for part in parts if isinstance(part, inspect.StructType)]


Path = tuple[str, ...]


def fields_of(body: dict[str, Any]) -> Iterator[tuple[Path, inspect.Field]]:
    """Every field of a message and of the structs in it, with the way to it."""

    def visit(kind: type, value: dict[str, Any], at: Path) -> Iterator[tuple[Path, inspect.Field]]:
        for field in struct_info(kind).fields:
            path = (*at, field.encode_name)
            yield path, field
            inner = value[field.encode_name]
            if isinstance(inner, dict):
                for choice in choices(field.type):
                    if choice.tag is None or choice.tag == inner["t"]:
                        yield from visit(choice.cls, inner, path)

    return visit(KINDS[body["t"]], body, ())


def replaced(body: dict[str, Any], path: Path, value: object) -> dict[str, Any]:
    result = copy.deepcopy(body)
    at = result
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return result


def without(body: dict[str, Any], path: Path) -> dict[str, Any]:
    result = copy.deepcopy(body)
    at = result
    for name in path[:-1]:
        at = at[name]
    del at[path[-1]]
    return result
