"""The JSON Schemas and the AsyncAPI document: valid themselves, and true of the messages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

import jsonschema
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.protocol import CONVERSATIONS, DIRECTIONS, REGISTRY, Direction
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.schemas import MESSAGES, direction_name, inner_structs
from shadowmmu.protocol.states import OPENINGS, Side
from tests.protocol.golden import INVALID, VALID, Vector, direction, frames, name_of, to_json
from tests.protocol.strategies import bodies, plain

DOCS: Final = Path(__file__).parents[2] / "docs" / "protocol"
SCHEMAS: Final[dict[str, Any]] = json.loads((DOCS / "messages.schema.json").read_text())
ASYNCAPI: Final[dict[str, Any]] = json.loads((DOCS / "asyncapi.json").read_text())
OFFICIAL: Final = Path(__file__).parents[1] / "data" / "asyncapi" / "3.0.0.json.gz"
CASES = [(direction, kind) for direction, kinds in MESSAGES.items() for kind in kinds]

# JSON knows no difference between 1 and 1.0.
BEYOND_JSON: Final = {"a floating-point number for an integer", "number as a floating-point number"}


def definition(name: str) -> jsonschema.Draft202012Validator:
    """A validator for one definition of the schemas."""
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]})


def has_json_form(vector: Vector) -> bool:
    """Whether an invalid vector is invalid by contents that JSON can have, too."""
    if vector["code"] not in ("malformed", "unexpected-message") or vector["name"] in BEYOND_JSON:
        return False
    version, data = frames(vector)
    try:
        json.dumps(to_json(msgpack.unpackb(data)))
    except (ValueError, TypeError):  # no MessagePack, or with keys and values that JSON has not
        return False
    return version in (b"SMMU/1.0", b"SMMU/1.1", b"SMMU/1.2")


VALIDATORS: Final = {way: definition(direction_name(way)) for way in DIRECTIONS}


# --- the schemas --------------------------------------------------------------------------------------------------


def test_the_schemas_are_schemas() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)


def test_there_is_a_definition_for_every_message_struct_and_direction() -> None:
    kinds = get_args(m.Message)
    for kind in [*kinds, *inner_structs(kinds)]:
        schema = SCHEMAS["$defs"][kind.__name__]
        if kind is m.TrailStep:
            assert [part["title"] for part in schema["prefixItems"]] == ["accesses", "asked", "answer"]
            assert schema["maxItems"] == 3
            continue
        assert schema["additionalProperties"] is False
        assert all(part["description"] for name, part in schema["properties"].items() if name != "t")
    assert {"ToMmu", "FromMmu", "ToCoordinator", "FromCoordinator"} <= SCHEMAS["$defs"].keys()


def test_every_integer_has_its_range() -> None:
    def integers(schema: object) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") == "integer":
                yield schema
            for part in schema.values():
                yield from integers(part)
        elif isinstance(schema, list):
            for part in schema:
                yield from integers(part)

    found = list(integers(SCHEMAS))
    assert found
    assert all(-(1 << 63) <= schema["minimum"] <= schema["maximum"] < 1 << 64 for schema in found)


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_golden_vectors_are_valid(vector: Vector) -> None:
    envelope = [vector["incarnation"], vector["number"], vector["body"]]
    VALIDATORS[direction(vector)].validate(envelope)
    jsonschema.Draft202012Validator(SCHEMAS).validate(envelope)


@pytest.mark.parametrize("vector", [v for v in INVALID if has_json_form(v)], ids=name_of)
def test_what_the_codec_refuses_by_its_contents_is_invalid(vector: Vector) -> None:
    value = to_json(msgpack.unpackb(frames(vector)[1]))
    assert not VALIDATORS[direction(vector)].is_valid(value)
    in_another_direction = jsonschema.Draft202012Validator(SCHEMAS).is_valid(value)
    assert in_another_direction is (vector["code"] == "unexpected-message")


@pytest.mark.parametrize("way, kind", CASES)
@given(data=st.data())
def test_whatever_can_be_sent_is_valid(way: Direction, kind: Any, data: st.DataObject) -> None:
    VALIDATORS[way].validate([1, 2, to_json(plain(data.draw(bodies(kind))))])


# --- AsyncAPI -----------------------------------------------------------------------------------------------------


def test_the_asyncapi_document_is_valid_by_the_official_schema() -> None:
    official = json.loads(gzip.decompress(OFFICIAL.read_bytes()))
    jsonschema.Draft7Validator(official).validate(ASYNCAPI)
    broken = ASYNCAPI | {"operations": {"x": {"action": "shout"}}}
    assert not jsonschema.Draft7Validator(official).is_valid(broken)


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


def test_every_reference_leads_somewhere() -> None:
    documents = {"": ASYNCAPI, "messages.schema.json": SCHEMAS}
    found = set(references(ASYNCAPI))
    assert found
    for reference in found:
        name, _, path = reference.partition("#/")
        at: Any = documents[name]
        for part in path.split("/"):
            at = at[part]


def test_every_message_has_an_example_that_its_schema_accepts() -> None:
    messages = ASYNCAPI["components"]["messages"]
    assert messages.keys() == {kind.__name__ for kind in get_args(m.Message)}
    for name, message in messages.items():
        validator = jsonschema.Draft202012Validator(
            json.loads(json.dumps(message["payload"]["schema"]).replace("messages.schema.json#", "#"))
            | {"$defs": SCHEMAS["$defs"]}
        )
        assert message["examples"], name
        for example in message["examples"]:
            validator.validate(example["payload"])
            assert example["payload"][2]["t"] == message["name"]


def test_a_role_has_the_operations_that_its_conversation_has() -> None:
    for (service, role), conversation in OPENINGS.items():
        for side, action in ((Side.PEER, "send"), (Side.SERVICE, "receive")):
            operation = ASYNCAPI["operations"][f"{service.value}.{role.value}.{action}"]
            names = {reference["$ref"].rpartition("/")[2] for reference in operation["messages"]}
            assert names == {rule.message.__name__ for rule in conversation.rules if rule.sender is side}
            assert names <= ASYNCAPI["channels"][service.value]["messages"].keys()


def test_the_extensions_have_the_whole_tables() -> None:
    assert ASYNCAPI["x-errors"].keys() == {code.value for code in REGISTRY}
    tables = {table["name"]: table["rules"] for table in ASYNCAPI["x-conversations"]}
    assert {name: len(rules) for name, rules in tables.items()} == {
        c.name: len(c.rules) for c in CONVERSATIONS
    }
