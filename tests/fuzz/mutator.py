"""Mutations of MessagePack that stay MessagePack: for bytes whose decoder is compiled, so that no coverage guides the way in."""

from __future__ import annotations

import random
from typing import Any, Final, get_args

import msgpack

from shadowmmu.protocol import messages as m

__all__ = ["mutate"]

HEAD: Final = 2
"""Bytes in front of the envelope in an input of target `decode`."""
TAGS: Final = tuple(m.tag_of(kind) for kind in get_args(m.Message))
SCALARS: Final[tuple[Any, ...]] = (
    0, 1, -1, 31, 32, 255, 256, (1 << 40) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63),
    None, True, False, 0.0, 1e308, float("nan"), float("inf"), "", "x", "x" * 65, b"", b"\xff",
    msgpack.ExtType(0, b""), msgpack.ExtType(5, b"x" * 8), msgpack.Timestamp(1, 0),
)  # fmt: skip


def mutate(data: bytes, most: int, seed: int) -> bytes | None:
    """Another input of at most `most` bytes, the envelope of which is still MessagePack; None if it cannot be had."""
    draw = random.Random(seed)
    try:
        tree = msgpack.unpackb(data[HEAD:], strict_map_key=False, raw=False, timestamp=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    for _ in range(1 + draw.randrange(3)):
        tree = _changed(tree, draw)
    try:
        packed = msgpack.packb(tree, use_bin_type=True)
    except (ValueError, OverflowError, TypeError):
        return None
    return (data[:HEAD] + packed)[:most] if len(packed) + HEAD <= most else None


def _changed(node: Any, draw: random.Random) -> Any:
    """The tree with one change somewhere."""
    inner = isinstance(node, list | dict) and node and draw.random() < 0.85
    match node:
        case list() if inner:
            at = draw.randrange(len(node))
            return [*node[:at], _changed(node[at], draw), *node[at + 1 :]]
        case dict() if inner:
            key = draw.choice(list(node))
            if key == "t":
                return node | {"t": draw.choice(TAGS)}
            return node | {key: _changed(node[key], draw)}
        case list():
            return draw.choice((node[1:], node * 2, [*node, draw.choice(SCALARS)], [node], []))
        case dict():
            other: list[Any] = [
                {},
                [node],
                node | {draw.choice(("x", "vcpu", "entry")): draw.choice(SCALARS)},
            ]
            if node:
                gone = draw.choice(list(node))
                other.append({key: value for key, value in node.items() if key != gone})
            return draw.choice(other)
        case int():
            return draw.choice(
                (node + 1, node - 1, node ^ 1 << draw.randrange(64), draw.choice(SCALARS), [node])
            )
        case str():
            return draw.choice((node + "x", node[:-1], node * 20, draw.choice(TAGS), draw.choice(SCALARS)))
        case _:
            return draw.choice(SCALARS)
