"""One page fault, byte by byte: the worked example of docs/PROTOCOL.md.

The messages go through both ends' sessions and the codec, so what the page shows is legal and is what is really sent;
only their contents (addresses, frames) are written down here, as a service that was just started gives them. `dump`
takes MessagePack apart for people. Relies on `codec` and `session`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import FROM_MMU, TO_MMU
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.session import Session
from shadowmmu.protocol.states import MMU, Side

__all__ = ["dump", "worked_example"]

_GVA: Final = 0xFFFF_8000_0080_0000
_PFN: Final = 0x10_0800
_STORE: Final = AccessFlag.WRITE
_RIGHTS: Final = AccessFlag.MAY_WRITE | AccessFlag.MAY_FETCH | AccessFlag.DIRTY
_TEXT_COLUMN: Final = 60


class _Said(msgspec.Struct, frozen=True):
    """A message of the example, and what it says."""

    sender: Side
    body: m.Message
    text: str


_EXCHANGE: Final = (
    _Said(
        Side.PEER,
        m.Attach(m.Role.VCPU, "demo"),
        "The vCPU attaches: incarnation 0, number 0, since there is no session yet.",
    ),
    _Said(
        Side.SERVICE,
        m.Attached(0, 1, vpid=True, heartbeat=1.0),
        "It is vCPU 0, in incarnation 1. This is number 1 of the service's direction. `pfec_mask` and `pfec_match` are "
        "left out: they are 0.",
    ),
    _Said(Side.PEER, m.Enter(), "It asks for the first guest entry: its first numbered message."),
    _Said(Side.SERVICE, m.Entered(1, flush=True), "Guest entry 1 begins, with an empty TLB."),
    _Said(
        Side.PEER,
        m.Walk(1, 1, _GVA, int(_STORE)),
        "The program stores to 0xffff800000800000. The TLB is empty, so the tables have to be walked.",
    ),
    _Said(Side.SERVICE, m.WalkFault(1, 1, 2), "Nothing is mapped there: error code 2, a write."),
    _Said(
        Side.PEER,
        m.Exit(1, m.PageFaultExit(_GVA, 2, m.Instruction(int(_STORE), value=42))),
        "All page faults exit (`pfec_mask` is 0), so guest entry 1 ends here. The instruction, a store of 42 in 8 "
        "bytes, goes along for the emulator; `size` is left out: 8 is its default.",
    ),
    _Said(
        Side.SERVICE,
        m.Entered(2),
        "The fault was handled. Without `completed` and `inject`: execute the store again.",
    ),
    _Said(Side.PEER, m.Walk(2, 2, _GVA, int(_STORE)), "The same walk, as walk 2 of this incarnation."),
    _Said(
        Side.SERVICE,
        m.Walked(2, 2, _PFN, 1, int(_RIGHTS)),
        "It is in host frame 0x100800, mapped by 4 KiB, may be written and fetched from, and is dirty.",
    ),
    _Said(
        Side.PEER,
        m.Log(2, [(int(_STORE | _RIGHTS), _GVA, _PFN, 8, 42)]),
        "The store is an entry of the log now: what it is (1) and what its translation permits (0xd00) in one number, "
        "then gva, pfn, size and value.",
    ),
    _Said(Side.SERVICE, m.Applied(1), "It is applied: the vCPU has its credit back."),
)


def worked_example() -> str:
    """The exchange as Markdown: each message with its bytes, taken apart."""
    ends = {side: Session(MMU, side) for side in Side}
    directions = {Side.PEER: TO_MMU, Side.SERVICE: FROM_MMU}
    parts = []
    for said in _EXCHANGE:
        envelope = ends[said.sender].send(said.body)
        ends[said.sender.other].receive(envelope)
        version, data = directions[said.sender].encode(envelope)
        way = "vCPU to service" if said.sender is Side.PEER else "service to vCPU"
        lines = [_line(version.hex(" "), f'frame 1: "{version.decode()}"'), *dump(data)]
        parts.append(
            "\n".join([f"**{type(said.body).__name__}**, {way}. {said.text}", "", "```text", *lines, "```"])
        )
    return "\n\n".join(parts)


def _line(data: str, text: str) -> str:
    return f"{data:<{_TEXT_COLUMN}}{text}"


def dump(data: bytes) -> list[str]:
    """An envelope taken apart: a line per value, or per pair of a map, with its bytes and what they are.

    Knows the forms of MessagePack that our encoder makes. Raises ValueError for others.
    """
    if data[0] != 0x93:
        raise ValueError("no envelope as our encoder makes it")
    lines = [_line("93", "frame 2: array of 3")]
    at = 1
    for name in ("incarnation", "number"):
        end, text = _scalar(data, at)
        lines.append(_line(f"  {data[at:end].hex(' ')}", f"  {name} {text}"))
        at = end
    lines += [_line("  " + raw, "  " + text) for raw, text in _Body(data, at)]
    return lines


class _Body:
    """Iterates over (bytes, text) of each line of a value that begins at `at`."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def __iter__(self) -> Iterator[tuple[str, str]]:
        yield from self._value("", 0, b"")

    def _value(self, label: str, depth: int, before: bytes) -> Iterator[tuple[str, str]]:
        """A value; `label` and the bytes `before` it on the same line are its key."""
        indent = "  " * depth
        first = self._data[self._at]
        if 0x80 <= first <= 0x8F:
            self._at += 1
            count = first & 0xF
            yield indent + (before + bytes([first])).hex(" "), f"{indent}{label}map of {count}"
            for _ in range(count):
                start = self._at
                self._at, key = _scalar(self._data, start)
                yield from self._value(f"{key}: ", depth + 1, self._data[start : self._at])
        elif 0x90 <= first <= 0x9F:
            self._at += 1
            count = first & 0xF
            yield indent + (before + bytes([first])).hex(" "), f"{indent}{label}array of {count}"
            for _ in range(count):
                yield from self._value("", depth + 1, b"")
        else:
            start = self._at
            self._at, text = _scalar(self._data, start)
            yield indent + (before + self._data[start : self._at]).hex(" "), f"{indent}{label}{text}"


_FIXED: Final = {0xC0: "null", 0xC2: "false", 0xC3: "true"}
_UNSIGNED: Final = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


def _scalar(data: bytes, at: int) -> tuple[int, str]:
    """Where the number, string, boolean or null at `at` ends, and what it is."""
    first = data[at]
    if first <= 0x7F:
        return at + 1, str(first)
    if 0xA0 <= first <= 0xBF:
        end = at + 1 + (first & 0x1F)
        return end, f'"{data[at + 1 : end].decode()}"'
    if first in _FIXED:
        return at + 1, _FIXED[first]
    if first in _UNSIGNED:
        end = at + 1 + _UNSIGNED[first]
        value = int.from_bytes(data[at + 1 : end], "big")
        return end, f"{value:#x}" if value >= 1 << 8 else str(value)
    if first == 0xCB:
        return at + 9, str(struct.unpack(">d", data[at + 1 : at + 9])[0])
    raise ValueError(f"{first:#x} at {at} is no form that the example has")
