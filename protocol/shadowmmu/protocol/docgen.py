"""Writes what the documents say of the protocol from the data that the code uses.

    python -m shadowmmu.protocol.docgen [--check] [docs]

In the folder of the documents these are: the generated sections of PROTOCOL.md, each between `<!-- generated: NAME -->`
and `<!-- end -->`, which is replaced by what the function of that name in `SECTIONS` returns; the JSON Schemas
(`schemas`); and the AsyncAPI document (`asyncapi`). `--check` changes nothing, names those that are not up to date, and
fails if there are any. To be run in the root of the repository: examples come from docs/examples and from the golden
vectors of tests/protocol.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.asyncapi import SCHEMA_FILE, Example, asyncapi_document
from shadowmmu.protocol.codec import DIRECTIONS, FROM_MMU, TO_MMU, VERSION_FRAME
from shadowmmu.protocol.continuity import KEPT, kind_counts
from shadowmmu.protocol.errors import REGISTRY, Effect
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.fields import note
from shadowmmu.protocol.heartbeat import MISSED_LIMIT
from shadowmmu.protocol.ledger import EVENT_CREDITS, HOST_CREDITS
from shadowmmu.protocol.schemas import MESSAGES, inner_structs, schema_document
from shadowmmu.protocol.states import CONVERSATIONS, OPENINGS, Conversation, Service, Side, State
from shadowmmu.protocol.wire_example import worked_example

__all__ = ["SECTIONS", "main", "render"]

VECTORS: Final = Path("tests/protocol/vectors.json")
EXAMPLE: Final = Path("docs/examples/one_page_fault.py")
SERVICES: Final = {Service.MMU: "the MMU service", Service.COORDINATOR: "the coordinator"}
ALIASES: Final = {m.LoggedAccess: "LoggedAccess"}


# --- tables -------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def _limits() -> str:
    sizes = _table(
        ["Direction", "Soft limit: refused above", "Hard limit: connection cut above"],
        [
            (direction.name, _size(direction.soft_limit), _size(direction.hard_limit))
            for direction in DIRECTIONS
        ],
    )
    counts = _table(
        ["Limit", "Value"],
        [
            ("Accesses in one Log", str(m.LOG_LIMIT)),
            ("Age at which a log is shipped at the latest", f"{m.LOG_SECONDS * 1000:g} ms"),
            ("Log messages of a vCPU that are not applied yet", str(m.LOG_CREDITS)),
            ("Host requests of an agent under way", str(HOST_CREDITS)),
            ("Event batches that the coordinator has not taken in yet", str(EVENT_CREDITS)),
            ("Heartbeat intervals of silence after which a peer is given up", str(MISSED_LIMIT)),
            ("Messages that count that an end keeps, to repeat them", str(KEPT)),
            ("Steps of a trail", str(m.TRAIL_LIMIT)),
        ],
    )
    return f"{sizes}\n\n{counts}"


def _access_flags() -> str:
    return _table(
        ["Bit", "Value", "Name"], [(str(f.bit_length() - 1), hex(f), f.name or "") for f in AccessFlag]
    )


# --- messages -----------------------------------------------------------------------------------------------------


def _doc(kind: type) -> str:
    text = kind.__doc__ or ""
    return " ".join(text.split())


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f", at least {low}"
    return f" {low} to {high}"


def _type(info: inspect.Type) -> str:
    match info:
        case inspect.Metadata():
            return _bounded(_type(info.type), info.extra_json_schema or {})
        case inspect.IntType():
            if info.ge == 0 and info.le is not None and (info.le & (info.le + 1)) == 0 and info.le > 255:
                return f"u{info.le.bit_length()}"
            return "int" + _range(info.ge, info.le)
        case inspect.FloatType():
            return "float" + (f", above {info.gt}" if info.gt is not None else _range(info.ge, info.le))
        case inspect.StrType():
            return "str" + (
                f", {info.min_length or 0} to {info.max_length} characters" if info.max_length else ""
            )
        case inspect.BytesType():
            return f"bin, up to {_size(info.max_length)}" if info.max_length else "bin"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "null"
        case inspect.EnumType():
            return " / ".join(f'"{member.value}"' for member in info.cls)
        case inspect.ListType():
            least, most = info.min_length, info.max_length
            count = f", {least or 0} to {most}" if most is not None else ""
            return f"array of {_type(info.item_type)}{count}"
        case inspect.TupleType():
            for alias, name in ALIASES.items():
                if inspect.type_info(alias) == info:
                    return name
            return f"[{', '.join(map(_type, info.item_types))}]"
        case inspect.DictType():
            return f"map of {_type(info.key_type)} to {_type(info.value_type)}"
        case inspect.UnionType():
            structs = [part for part in info.types if isinstance(part, inspect.StructType)]
            if len(structs) > 1:
                return "one of " + ", ".join(f"[{s.cls.__name__}](#{_anchor(s.cls)})" for s in structs)
            return " or ".join(map(_type, info.types))
        case inspect.StructType():
            return f"[{info.cls.__name__}](#{_anchor(info.cls)})"
        case _:
            raise NotImplementedError(info)


def _bounded(name: str, bounds: Mapping[str, Any]) -> str:
    """A type with the bounds that only its JSON schema has."""
    match bounds:
        case {"maximum": 0xFFFF_FFFF_FFFF_FFFF}:
            return "u64"
        case {"minimum": 0, "maximum": int(high)} if high & (high + 1) == 0:
            return f"u{high.bit_length()}"
        case {"minimum": low, "maximum": high}:
            return f"{name} {low} to {high}"
        case {"exclusiveMinimum": low}:
            return f"{name}, more than {low}"
        case _:
            raise NotImplementedError(bounds)


def _anchor(kind: type) -> str:
    return kind.__name__.lower()


def _default(field: inspect.Field) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return "empty"
    value = field.default
    if value is msgspec.NODEFAULT:
        return "required"
    if value == b"":
        return "empty"
    return f"`{json.dumps(msgspec.to_builtins(value))}`"


def _struct(kind: type, level: str) -> str:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    heading = f"{level} {kind.__name__}"
    text = _doc(kind)
    if info.tag is not None:
        text = f'`"{info.tag_field}": "{info.tag}"`. {text}'
    if info.array_like:
        text = f"An array of these {len(info.fields)}, in this order. {text}"
    rows = [
        (f"`{field.encode_name}`", _type(field.type), _default(field), note(kind.__name__, field.name))
        for field in info.fields
    ]
    table = _table(["Field", "Type", "Default", "Meaning"], rows)
    return "\n\n".join([heading, text, table] if rows else [heading, text])


def _messages() -> str:
    parts: list[str] = []
    seen: set[type] = set()
    for direction in DIRECTIONS:
        parts.append(f"### {direction.name.capitalize().replace('mmu', 'MMU')}")
        both = [kind.__name__ for kind in MESSAGES[direction] if kind in seen]
        parts += [_struct(kind, "####") for kind in MESSAGES[direction] if kind not in seen]
        if both:
            parts.append(f"Also, as above: {', '.join(both)}.")
        seen.update(MESSAGES[direction])
    parts.append("### Inside messages")
    parts += [
        _struct(kind, "####") for kind in inner_structs(k for kinds in MESSAGES.values() for k in kinds)
    ]
    return "\n\n".join(parts)


# --- legal order --------------------------------------------------------------------------------------------------


def _states(states: Iterable[State]) -> str:
    return ", ".join(state.value for state in states)


def _order_rows(conversation: Conversation) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for rule in conversation.rules:
        sender = "peer" if rule.sender is Side.PEER else "service"
        then = rule.to.value if rule.to is not None else "unchanged"
        who = "receiver only" if rule.crossing else "both"
        remark = "dropped" if rule.ignored and rule.crossing else "late, dropped" if rule.ignored else ""
        rows.append((sender, rule.message.__name__, _states(rule.at), then, who, remark))
    return rows


def _diagram(conversation: Conversation) -> str:
    """The rules that change the state. Of the arrows to the end, which begin everywhere, only the ordinary one."""
    last = next(s for s in (State.LEAVING, State.REPORTED, State.JOINED) if s in conversation.states)
    edges: dict[tuple[State, State], list[str]] = {}
    for rule in conversation.rules:
        for state in rule.at:
            if rule.to in (None, state) or rule.crossing or (rule.to is State.ENDED and state is not last):
                continue
            edges.setdefault((state, rule.to), []).append(rule.message.__name__)
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{state.value}" as {state.name}' for state in conversation.states]
    lines.append(f"    [*] --> {State.DETACHED.name}")
    lines += [f"    {a.name} --> {b.name} : {', '.join(names)}" for (a, b), names in edges.items()]
    lines.append("```")
    return "\n".join(lines)


def _roles() -> str:
    rows = []
    for (service, role), conversation in OPENINGS.items():
        opener = next(rule.message.__name__ for rule in conversation.rules if rule.to is State.ATTACHING)
        rows.append(
            (
                f"`{role.value}`",
                SERVICES[service],
                opener,
                f"[{conversation.title}](#{_slug(conversation.title)})",
            )
        )
    return _table(["Role", "Service", "Opened by", "Conversation"], rows)


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _order() -> str:
    parts = []
    for conversation in CONVERSATIONS:
        parts.append(f"### {conversation.title}")
        parts.append(_diagram(conversation))
        head = ["Sender", "Message", "In state", "Then", "For", "Remark"]
        parts.append(_table(head, _order_rows(conversation)))
    return "\n\n".join(parts)


# --- counting -----------------------------------------------------------------------------------------------------


def _counting() -> str:
    rows = []
    for direction in (TO_MMU, FROM_MMU):
        both = [
            [kind.__name__ for kind in MESSAGES[direction] if kind_counts(kind) is wanted]
            for wanted in (True, False)
        ]
        rows.append((direction.name, *(", ".join(names) for names in both)))
    return _table(["Direction", "Count", "Do not count"], rows)


# --- errors -------------------------------------------------------------------------------------------------------


def _errors() -> str:
    effects = {Effect.NONE: "definite: none", Effect.UNKNOWN: "indefinite", Effect.DONE: "definite: complete"}
    return _table(
        ["Code", "Where", "Meaning", "Effect", "Ends the session", "What to do"],
        [
            (f"`{i.code}`", i.stage.value, i.meaning, effects[i.effect], "yes" if i.ends else "no", i.advice)
            for i in REGISTRY.values()
        ],
    )


# --- the rest -----------------------------------------------------------------------------------------------------


def _example() -> str:
    lines = EXAMPLE.read_text().strip().splitlines()
    return "\n".join(["```python", *(line for line in lines if not line.startswith("# ruff:")), "```"])


def _version() -> str:
    return f"This page describes version `{VERSION_FRAME.decode('ascii')}`."


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "version": _version,
    "roles": _roles,
    "limits": _limits,
    "access-flags": _access_flags,
    "messages": _messages,
    "order": _order,
    "counting": _counting,
    "errors": _errors,
    "bytes": worked_example,
    "example": _example,
}
"""What is generated, by the name in the page's marks."""

_MARKED: Final = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """The page with all generated sections up to date. Raises ValueError if one is missing or unknown."""
    found: list[str] = []

    def section(match: re.Match[str]) -> str:
        found.append(match[2])
        if match[2] not in SECTIONS:
            raise ValueError(f"unknown section {match[2]}")
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n\n{match[3]}"

    rendered = _MARKED.sub(section, page)
    if sorted(found) != sorted(SECTIONS):
        raise ValueError(f"the page has the sections {found}, not {list(SECTIONS)}")
    return rendered


def _examples() -> dict[str, list[Example]]:
    """Envelopes of golden vectors by message: those with all fields, once each."""
    names = {m.tag_of(kind): kind.__name__ for kinds in MESSAGES.values() for kind in kinds}
    found: dict[str, list[Example]] = {}
    for vector in json.loads(VECTORS.read_text())["valid"]:
        payload = [vector["incarnation"], vector["number"], vector["body"]]
        examples = found.setdefault(names[vector["body"]["t"]], [])
        if vector["form"] == "full" and payload not in examples:
            examples.append(payload)
    return found


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _outputs(docs: Path) -> Iterator[tuple[Path, str]]:
    """Each generated file of the folder, and what it should be."""
    page = docs / "PROTOCOL.md"
    yield page, render(page.read_text())
    yield docs / "protocol" / SCHEMA_FILE, _json(schema_document())
    yield docs / "protocol" / "asyncapi.json", _json(asyncapi_document(_examples()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    check = "--check" in args
    folders = [arg for arg in args if arg != "--check"] or ["docs"]
    stale = [
        (path, text)
        for path, text in _outputs(Path(folders[0]))
        if not path.exists() or path.read_text() != text
    ]
    for path, text in stale:
        if check:
            sys.stderr.write(f"{path} is not up to date: run python -m shadowmmu.protocol.docgen\n")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
