"""Older and newer ends: a 1.0 client and our service, what later versions may send, other major versions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import msgspec
import pytest

from shadowmmu.client import RequestRefused, ServiceError, SessionEnded
from shadowmmu.machine import Attached, Runner, ToVcpu, VcpuSent, boot_inputs
from shadowmmu.protocol import (
    DIRECTIONS,
    FROM_COORDINATOR,
    FROM_MMU,
    MMU,
    REGISTRY,
    TO_COORDINATOR,
    TO_MMU,
    Direction,
    Effect,
    Envelope,
    ErrorCode,
    RemoteProtocolError,
    Session,
    Side,
    codec,
    error_reply,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.schemas import MESSAGES
from shadowmmu.vcpu.driver import VcpuDriver
from tests.protocol.golden import VALID, Vector, direction, frames, name_of

GVA = 0xFFFF_8000_0080_0000
CONFIG = m.RunConfig(park_rate=0.0, host_rate=0.0, audit=m.Audit.NEVER)


@contextmanager
def speaking(major: int, minor: int) -> Iterator[None]:
    """Our codec is that of another version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "VERSION", (major, minor))
        patch.setattr(codec, "VERSION_FRAME", b"SMMU/%d.%d" % (major, minor))
        yield


# --- minor versions -----------------------------------------------------------------------------------------------


KNOWN: dict[str, set[str]] = {
    "attached": {"vcpu", "incarnation", "vpid", "heartbeat", "pfec_mask", "pfec_match"},
    "entered": {
        "entry", "flush", "inject", "completed", "general_protection", "interrupts", "processor",
    },
    "walked": {"entry", "walk", "pfn", "level", "flags"},
    "walk_fault": {"entry", "walk", "error_code", "misconfig"},
    "loaded": {"entry", "value"},
    "applied": {"logs"},
    "kick": {"entry"},
    "host_reply": {"request", "result", "gfns"},
    "heartbeat": set(),
    "error": {"code", "text", "seq"},
    "ended": {"code", "text"},
}  # fmt: skip
"""What version 1.0 has from the MMU service: the messages, and their fields."""


class FrozenClient:
    """A vCPU client of version 1.0 that has nothing of our code: written from docs/PROTOCOL.md, with msgpack.

    It refuses what it does not know.
    """

    def __init__(self) -> None:
        self.incarnation = 0
        self.sent = 0
        self.heard = 0
        self.versions: set[str] = set()

    def send(self, tag: str, **fields: object) -> list[bytes]:
        body = {"t": tag, **fields}
        if tag == "attach":
            return [b"SMMU/1.0", msgpack.packb([0, 0, body])]
        self.sent += 1
        return [b"SMMU/1.0", msgpack.packb([self.incarnation, self.sent, body])]

    def receive(self, parts: Sequence[bytes]) -> dict[str, Any]:
        version, data = parts
        assert re.fullmatch(rb"SMMU/1\.(0|[1-9][0-9]{0,4})", version)
        self.versions.add(version.decode())
        incarnation, number, body = msgpack.unpackb(data)
        self.heard += 1
        assert number == self.heard
        assert body.keys() - {"t"} <= KNOWN[body["t"]]
        if body["t"] == "attached":
            self.incarnation = body["incarnation"]
        assert incarnation == self.incarnation
        known: dict[str, Any] = body
        return known


class ServiceInMemory:
    """The MMU service without sockets: the codec, the session and the machine of one vCPU."""

    def __init__(self) -> None:
        self.session = Session(MMU, Side.SERVICE)
        self.runner = Runner(CONFIG, lambda _record: None)
        self.runner.submit(Attached(0, 7))
        for item in boot_inputs(CONFIG, 1):
            self.runner.submit(item)
            self._settle()

    def _settle(self) -> list[ToVcpu]:
        while self.runner.step(1000):
            pass
        return [output for output in self.runner.take_outputs() if isinstance(output, ToVcpu)]

    def answer(self, parts: Sequence[bytes]) -> list[list[bytes]]:
        envelope = TO_MMU.decode(parts)
        assert self.session.receive(envelope)
        if isinstance(envelope.body, m.Attach):
            welcome = m.Attached(0, 7, vpid=True, heartbeat=1.0)
            return [FROM_MMU.encode(self.session.send(welcome))]
        assert isinstance(envelope.body, m.Enter | m.Log | m.Walk | m.Load | m.Exit)
        self.runner.submit(VcpuSent(0, envelope.body))
        return [FROM_MMU.encode(self.session.send(output.body)) for output in self._settle()]


def test_a_client_of_1_0_goes_on_working_when_the_service_speaks_1_1() -> None:
    client, service = FrozenClient(), ServiceInMemory()

    def ask(tag: str, **fields: object) -> dict[str, Any]:
        with speaking(1, 1):
            answers = service.answer(client.send(tag, **fields))
        assert len(answers) == 1
        return client.receive(answers[0])

    assert ask("attach", role="vcpu", name="frozen")["vcpu"] == 0
    assert ask("enter")["entry"] == 1
    fault = ask("walk", entry=1, walk=1, gva=GVA, flags=1)
    assert (fault["t"], fault["error_code"]) == ("walk_fault", 2)
    reason = {"t": "page_fault", "gva": GVA, "error_code": 2, "instruction": {"flags": 1, "value": 42}}
    assert ask("exit", entry=1, reason=reason)["entry"] == 2
    walked = ask("walk", entry=2, walk=2, gva=GVA, flags=1)
    stored = [1 | walked["flags"], GVA, walked["pfn"], 8, 42]
    assert ask("log", entry=2, accesses=[stored]) == {"t": "applied", "logs": 1}
    loaded = [8 | walked["flags"], GVA, walked["pfn"], 8, 0]
    assert ask("load", entry=2, access=loaded)["value"] == 42
    assert ask("exit", entry=2, reason={"t": "invlpg", "gva": GVA})["entry"] == 3
    assert ask("exit", entry=3, reason={"t": "external_interrupt"})["entry"] == 4
    assert client.versions == {"SMMU/1.1"}


@pytest.mark.parametrize("way", DIRECTIONS)
def test_minor_versions_are_taken_both_ways(way: Direction) -> None:
    envelope = Envelope(1, 1, m.Heartbeat() if m.Heartbeat in MESSAGES[way] else m.Enter())
    older = way.encode(envelope)
    with speaking(1, 2):
        newer = way.encode(envelope)
        assert way.decode(older) == envelope
    assert [older[0], newer[0]] == [b"SMMU/1.1", b"SMMU/1.2"]
    assert way.decode(newer) == envelope


def later(way: Direction) -> Direction:
    """The direction as version 1.2 may have it: a field more in each message, and a message more."""
    kinds = [
        msgspec.defstruct(
            kind.__name__,
            [("later", int, 0)],
            bases=(kind,),
            tag=m.tag_of(kind),
            frozen=True,
            forbid_unknown_fields=True,
            omit_defaults=True,
        )
        for kind in MESSAGES[way]
    ]
    another = msgspec.defstruct("Another", [], tag_field="t", tag="another", frozen=True)
    union: Any = another
    for kind in kinds:
        union |= kind
    return Direction(way.name, union, soft_limit=way.soft_limit, hard_limit=way.hard_limit)


LATER = {way: later(way) for way in DIRECTIONS}


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_a_receiver_of_1_2_takes_every_message_of_before(vector: Vector) -> None:
    now = direction(vector).decode(frames(vector)).body
    body: Any = LATER[direction(vector)].decode(frames(vector)).body
    assert body.later == 0
    assert all(getattr(body, name) == getattr(now, name) for name in now.__struct_fields__)


@pytest.mark.parametrize("vector", VALID, ids=name_of)
def test_a_receiver_of_1_1_takes_what_1_2_sends_it_without_what_is_new(vector: Vector) -> None:
    way = direction(vector)
    envelope = LATER[way].decode(frames(vector))
    assert way.decode(LATER[way].encode(envelope)) == way.decode(frames(vector))


def test_what_is_new_is_refused_by_those_who_do_not_know_it() -> None:
    """Which is why it may be sent only to who has shown to know it."""
    data = msgpack.packb([1, 1, {"t": "kick", "entry": 1, "later": 5}])
    body: Any = LATER[FROM_MMU].decode([b"SMMU/1.2", data]).body
    assert body.later == 5
    with pytest.raises(RemoteProtocolError, match="unknown field"):
        FROM_MMU.decode([b"SMMU/1.2", data])


def test_a_service_names_its_version_to_who_knows_more_than_it_does() -> None:
    """So that a later peer knows with which fields to attach again."""
    attach = msgpack.packb([0, 0, {"t": "attach", "role": "vcpu", "name": "x", "later": 1}])
    with pytest.raises(RemoteProtocolError) as caught:
        TO_MMU.decode([b"SMMU/1.2", attach])
    assert caught.value.code is ErrorCode.MALFORMED
    reply = FROM_MMU.encode(error_reply(caught.value))
    assert reply[0] == b"SMMU/1.1"
    assert msgpack.unpackb(reply[1])[2]["code"] == "malformed"


ADDED: dict[str, dict[str, Any]] = {
    "attach": {"resumable": False, "token": b"", "heartbeat": None},
    "load": {"state": None},
    "locked": {"state": None},
    "exit": {"state": None},
    "attached": {"token": b""},
    "entered": {"resume": None},
    "error": {"request": 0},
    "join": {"member": 0, "token": b""},
    "joined": {"run": b"", "token": b"", "vcpu": None, "vcpu_token": b"", "next_event": 0},
    "ready": {"token": b""},
}
"""The fields that 1.1 has added, by message, and what they are when they are left out."""


@pytest.mark.parametrize("vector", [v for v in VALID if v["version"] == "1.0"], ids=name_of)
def test_a_message_of_1_0_has_the_defaults_of_what_1_1_added_and_is_made_without_it(vector: Vector) -> None:
    way = direction(vector)
    envelope = way.decode(frames(vector))
    added = ADDED.get(vector["body"]["t"], {})
    assert {name: getattr(envelope.body, name) for name in added} == added
    made = msgpack.unpackb(way.encode(envelope)[1])[2]
    assert not made.keys() & added.keys()


# --- other major versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way, back", [(TO_MMU, FROM_MMU), (TO_COORDINATOR, FROM_COORDINATOR)])
@pytest.mark.parametrize("spoken", [(1, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("version", [b"SMMU/0.9", b"SMMU/2.0", b"SMMU/99999.0"])
def test_an_unknown_major_version_is_refused_with_what_is_spoken(
    way: Direction, back: Direction, spoken: tuple[int, int], version: bytes
) -> None:
    with speaking(*spoken):
        with pytest.raises(RemoteProtocolError) as caught:
            way.decode([version, b"whatever another major version has"])
        answer = back.encode(error_reply(caught.value))
    assert answer[0] == b"SMMU/%d.%d" % spoken
    incarnation, number, body = msgpack.unpackb(answer[1])
    assert (incarnation, number, body["t"], body["code"]) == (0, 0, "error", "unsupported-version")
    assert re.findall(r"SMMU/[0-9]+\.[0-9]+", body["text"]) == [
        version.decode(),
        "SMMU/{}.{}".format(*spoken),
    ]


def test_our_worker_leaves_a_service_of_another_major_version() -> None:
    driver = attaching_driver()
    driver.received([b"SMMU/2.0", b""])
    assert driver.end is not None
    assert not driver.end.in_order
    assert "unsupported-version" in driver.end.text and "SMMU/2.0" in driver.end.text


# --- codes of later versions --------------------------------------------------------------------------------------

UNKNOWN = "invented-later"


def attaching_driver() -> VcpuDriver:
    def no_core(_vcpu: int, _vcpus: int) -> Any:
        raise AssertionError("the run does not start")

    driver = VcpuDriver("worker", no_core, lambda: 0.0, patience=60.0)
    driver.opened()
    driver.take_frames()
    return driver


@pytest.mark.parametrize("kind", [ServiceError, RequestRefused, SessionEnded])
def test_an_unknown_code_is_indefinite_for_a_client(kind: type[ServiceError]) -> None:
    error = kind(UNKNOWN, "from the future")
    assert error.code == UNKNOWN
    assert error.info is None
    assert not error.definite


@pytest.mark.parametrize("code", ErrorCode)
def test_a_known_code_is_as_definite_as_the_registry_says(code: ErrorCode) -> None:
    assert ServiceError(code, "").definite is (REGISTRY[code].effect is not Effect.UNKNOWN)


def test_a_worker_bears_an_unknown_code_in_an_error_reply() -> None:
    driver = attaching_driver()
    driver.received(FROM_MMU.encode(Envelope(0, 0, m.ErrorReply(UNKNOWN, "no"))))
    assert driver.end is not None
    assert not driver.end.in_order
    assert UNKNOWN in driver.end.text


def test_a_worker_bears_an_unknown_code_at_the_end() -> None:
    driver = attaching_driver()
    driver.received(FROM_MMU.encode(Envelope(7, 1, m.Attached(0, 7, vpid=True, heartbeat=1.0))))
    assert driver.attached
    driver.received(FROM_MMU.encode(Envelope(7, 2, m.Ended(UNKNOWN))))
    assert driver.end is not None
    assert not driver.end.in_order
    assert UNKNOWN in driver.end.text


def test_a_session_takes_unknown_codes_as_it_takes_others() -> None:
    session = Session(MMU, Side.PEER)
    session.send(m.Attach(m.Role.HOST, "agent"))
    session.receive(Envelope(7, 1, m.Attached(None, 7, vpid=True, heartbeat=1.0)))
    request = session.send(m.HostRequest(1, m.ZapAll()))
    assert session.receive(Envelope(7, 0, m.ErrorReply(UNKNOWN, "refused", request.seq)))
    assert session.receive(Envelope(7, 2, m.ErrorReply(UNKNOWN, "not possible", request.seq)))
    assert not session.requests
    assert session.receive(Envelope(7, 3, m.Ended(UNKNOWN)))
    assert not session.attached
