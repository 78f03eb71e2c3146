"""The protocol as an AsyncAPI 3.0 document, made from the data that the code uses.

It is written from the side of a peer: an operation with action `send` is what a peer of that role sends. A channel is a
service's socket. What AsyncAPI has no words for stands in extensions: the framing, the limits, the legal order
(`x-conversations`: the tables of `states`) and the error registry (`x-errors`). Messages refer to the definitions of
the JSON Schemas (`schemas`), which lie beside the document; examples are golden vectors, handed in by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import (
    DIRECTIONS,
    FROM_COORDINATOR,
    FROM_MMU,
    TO_COORDINATOR,
    TO_MMU,
    VERSION,
    VERSION_FRAME,
    Direction,
)
from shadowmmu.protocol.continuity import KEPT, kind_counts
from shadowmmu.protocol.errors import REGISTRY
from shadowmmu.protocol.heartbeat import MISSED_LIMIT
from shadowmmu.protocol.ledger import EVENT_CREDITS, HOST_CREDITS
from shadowmmu.protocol.schemas import DEFINITION, MESSAGES, envelope_of
from shadowmmu.protocol.states import CONVERSATIONS, OPENINGS, Conversation, Rule, Service, Side

__all__ = ["SCHEMA_FILE", "Example", "asyncapi_document"]

SCHEMA_FILE: Final = "messages.schema.json"
"""The JSON Schemas, beside the document."""

Example: TypeAlias = list[Any]
"""An envelope in JSON form."""
_Object: TypeAlias = dict[str, Any]

_SCHEMA_FORMAT: Final = "application/schema+json;version=draft-2020-12"
_CONTENT_TYPE: Final = "application/vnd.msgpack"
_CHANNELS: Final = {Service.MMU: (TO_MMU, FROM_MMU), Service.COORDINATOR: (TO_COORDINATOR, FROM_COORDINATOR)}
_TITLES: Final = {Service.MMU: "The MMU service", Service.COORDINATOR: "The coordinator of a run"}
_PORTS: Final = {Service.MMU: "5701", Service.COORDINATOR: "5700"}


def asyncapi_document(examples: Mapping[str, Iterable[Example]]) -> _Object:
    """The document. `examples`: envelopes in JSON form, by the class name of the message."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "shadowmmu protocol",
            "version": "{}.{}".format(*VERSION),
            "description": (
                "How processes talk to the MMU service and to the coordinator of a run. docs/PROTOCOL.md is normative. "
                "Written from the side of a peer: `send` is what a peer of that role sends. Generated from the code: "
                "do not edit."
            ),
            "license": {"name": "GPL-2.0-only"},
        },
        "defaultContentType": _CONTENT_TYPE,
        "servers": {service.value: _server(service) for service in Service},
        "channels": {service.value: _channel(service) for service in Service},
        "operations": _operations(),
        "components": {
            "messages": {
                kind.__name__: _message(kind, examples.get(kind.__name__, ())) for kind in _kinds(*DIRECTIONS)
            }
        },
        "x-framing": _framing(),
        "x-limits": _limits(),
        "x-counting": {
            direction.name: [kind.__name__ for kind in MESSAGES[direction] if kind_counts(kind)]
            for direction in (TO_MMU, FROM_MMU)
        },
        "x-conversations": [_conversation(conversation) for conversation in CONVERSATIONS],
        "x-errors": _errors(),
    }


def _kinds(*directions: Direction) -> list[type[m.Message]]:
    return list(dict.fromkeys(kind for direction in directions for kind in MESSAGES[direction]))


def _ref(*path: str) -> _Object:
    return {"$ref": "#/" + "/".join(path)}


def _server(service: Service) -> _Object:
    return {
        "title": _TITLES[service],
        "host": "{host}:{port}",
        "protocol": "zmtp",
        "protocolVersion": "3.1",
        "description": "ZeroMQ over TCP. The service binds a ROUTER socket, a peer connects a DEALER socket.",
        "variables": {
            "host": {"default": "127.0.0.1", "description": "Where the service runs."},
            "port": {"default": _PORTS[service], "description": "Given by --bind."},
        },
    }


def _channel(service: Service) -> _Object:
    return {
        "address": None,
        "title": _TITLES[service],
        "description": "The service's socket: one conversation with each peer, known by its routing id.",
        "servers": [_ref("servers", service.value)],
        "messages": {
            kind.__name__: _ref("components", "messages", kind.__name__)
            for kind in _kinds(*_CHANNELS[service])
        },
    }


def _operations() -> _Object:
    operations: _Object = {}
    for (service, role), conversation in OPENINGS.items():
        for side, action in ((Side.PEER, "send"), (Side.SERVICE, "receive")):
            names = dict.fromkeys(r.message.__name__ for r in conversation.rules if r.sender is side)
            operations[f"{service.value}.{role.value}.{action}"] = {
                "action": action,
                "title": f"What a peer of role {role.value} may {action}",
                "description": f"In which order: x-conversations, {conversation.name}.",
                "channel": _ref("channels", service.value),
                "messages": [_ref("channels", service.value, "messages", name) for name in names],
            }
    return operations


def _message(kind: type[m.Message], examples: Iterable[Example]) -> _Object:
    summary, _, rest = " ".join((kind.__doc__ or "").split()).partition(". ")
    message: _Object = {
        "name": m.tag_of(kind),
        "title": kind.__name__,
        "summary": summary.rstrip(".") + ".",
        "contentType": _CONTENT_TYPE,
        "payload": {
            "schemaFormat": _SCHEMA_FORMAT,
            "schema": envelope_of({"$ref": SCHEMA_FILE + DEFINITION.format(name=kind.__name__)}, SCHEMA_FILE),
        },
        "examples": [{"payload": payload} for payload in examples],
        "x-directions": [direction.name for direction in DIRECTIONS if kind in MESSAGES[direction]],
    }
    return message | ({"description": rest} if rest else {})


def _framing() -> _Object:
    return {
        "frames": ["version, in ASCII", "envelope, in MessagePack: [incarnation, number, body]"],
        "version": VERSION_FRAME.decode("ascii"),
        "tag": "t",
        "bytesInJson": '{"$bin": "<hexadecimal>"}',
    }


def _limits() -> _Object:
    return {
        "bytes": {
            direction.name: {"soft": direction.soft_limit, "hard": direction.hard_limit}
            for direction in DIRECTIONS
        },
        "accessesPerLog": m.LOG_LIMIT,
        "secondsUntilLogIsShipped": m.LOG_SECONDS,
        "logsNotApplied": m.LOG_CREDITS,
        "hostRequestsUnderWay": HOST_CREDITS,
        "eventBatchesNotTakenIn": EVENT_CREDITS,
        "silentHeartbeatIntervals": MISSED_LIMIT,
        "messagesKept": KEPT,
        "stepsOfATrail": m.TRAIL_LIMIT,
    }


def _conversation(conversation: Conversation) -> _Object:
    return {
        "name": conversation.name,
        "title": conversation.title,
        "openedBy": [
            {"service": service.value, "role": role.value}
            for (service, role), opened in OPENINGS.items()
            if opened is conversation
        ],
        "states": [state.value for state in conversation.states],
        "rules": [_rule(rule) for rule in conversation.rules],
    }


def _rule(rule: Rule) -> _Object:
    return {
        "sender": rule.sender.value,
        "message": rule.message.__name__,
        "in": [state.value for state in rule.at],
        "then": None if rule.to is None else rule.to.value,
        "receiverOnly": rule.crossing,
        "ignored": rule.ignored,
    }


def _errors() -> _Object:
    return {
        info.code.value: {
            "where": info.stage.value,
            "meaning": info.meaning,
            "effect": info.effect.value,
            "endsTheSession": info.ends,
            "advice": info.advice,
        }
        for info in REGISTRY.values()
    }
