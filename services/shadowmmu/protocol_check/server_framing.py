"""Checks of a service: frames, encodings, versions, sizes."""

from __future__ import annotations

import re
from typing import Any, Final

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from shadowmmu.protocol import FROM_MMU, MMU, TO_MMU, VERSION, VERSION_FRAME, ErrorCode, Session, Side
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, WRITE, Lab, gva_of
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import checks, require
from shadowmmu.protocol_check.wide_pack import wide_frames

__all__: list[str] = []

_HEARTBEAT: Final = {"t": "heartbeat"}
_GVA: Final = gva_of(100)


@checks("framing.parts", "A message that has not two frames is refused", "Framing")
def _parts(lab: Lab) -> None:
    peer = lab.stranger()
    envelope = msgpack.packb([0, 0, {"t": "attach", "role": "probe", "name": "parts"}])
    for frames in (
        [VERSION_FRAME],
        [b"", VERSION_FRAME, envelope],
        [VERSION_FRAME, envelope, b""],
        [b"x"] * 40,
    ):
        peer.send_frames(frames)
        peer.refused(ErrorCode.BAD_PART_COUNT, number=0, incarnation=0)
    peer.attach(m.Role.PROBE)


@checks("framing.version-frame", "What is no version frame is refused", "Framing")
def _version_frame(lab: Lab) -> None:
    peer = lab.stranger()
    envelope = msgpack.packb([0, 0, {"t": "attach", "role": "probe", "name": "version"}])
    for version in (
        b"", b"SMMU", b"SMMU/1", b"SMMU/1.", b"SMMU/01.0", b"SMMU/1.00", b"smmu/1.0", b"SMMU/1.0 ", b" SMMU/1.0",
        b"SMMU/1.0\0", b"SMMU/-1.0", b"SMMU/1.123456", b"HTTP/1.0", b"\xff" * 8, b"SMMU/1.0" * 9000,
    ):  # fmt: skip
        peer.send_frames([version, envelope])
        peer.refused(ErrorCode.MALFORMED, number=0, incarnation=0)
    peer.attach(m.Role.PROBE)


_GARBAGE: Final = (
    b"",
    b"\xc1",
    b"\x93",
    b"\x93\x00\x00",
    b"\x80",
    b"\xc0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xdd\xff\xff\xff\xff",
    b"\x93\xff\x00\x81\xa1t\xa9heartbeat",
    b"\x93\x00\xff\x81\xa1t\xa9heartbeat",
    b"\x93\xcb" + b"\0" * 8 + b"\x00\x81\xa1t\xa9heartbeat",
    b"\x92\x00\x81\xa1t\xa9heartbeat",
    b"\x94\x00\x00\x81\xa1t\xa9heartbeat\x00",
    b"\x93\x00\x00\x81\xa1t\xa9heartbeat\x00",
    b"\x91" * 60_000,
    b"\x93\x00\x00" + b"\x81\xa1t" * 30_000,
)


@checks("framing.garbage", "What is no envelope is refused, whatever it is", "Framing")
def _garbage(lab: Lab) -> None:
    peer = lab.stranger()
    for data in _GARBAGE:
        peer.send_frames([VERSION_FRAME, data])
        reply = peer.next("the refusal").body
        require(
            isinstance(reply, m.ErrorReply) and reply.code == ErrorCode.MALFORMED.value,
            f"{reply!r} instead of malformed, to {data[:24]!r}",
        )
    random = lab.random
    for _ in range(100):
        peer.send_frames([VERSION_FRAME, random.randbytes(random.randrange(200))])
        reply = peer.next("the refusal").body
        require(isinstance(reply, m.ErrorReply), f"{reply!r} to random bytes")
    peer.attach(m.Role.PROBE)


def _misshapen(entry: int, walk: int) -> list[dict[str, Any]]:
    """Bodies that are not as the specification says, of a vCPU in guest mode."""
    right: dict[str, Any] = {"t": "walk", "entry": entry, "walk": walk, "gva": _GVA, "flags": 0}
    bodies: list[dict[str, Any]] = [
        {"t": "stroll"},
        {"t": 5},
        {"t": None},
        {},
        {"T": "heartbeat"},
        {"t": "heartbeat", "extra": 1},
        right | {"extra": None},
    ]
    bodies += [{key: value for key, value in right.items() if key != left_out} for left_out in right]
    values: tuple[object, ...] = ("1", 1.0, True, None, b"\x01", [1], {}, -1, -(1 << 63))
    bodies += [right | {"gva": value} for value in values]
    bodies += [right | {"flags": value} for value in (32, 1 << 40, -1, "0")]
    log = {"t": "log", "entry": entry}
    access = [WRITE | 0x900, _GVA, 0x100064, 8, 1]
    for accesses in (
        [],
        [access] * (m.LOG_LIMIT + 1),
        [access[:4]],
        [[*access, 0]],
        [dict(enumerate(map(str, access)))],
        [[1 << 16, *access[1:]]],
        [[access[0], _GVA, 1 << 40, 8, 1]],
        [[*access[:3], 0, 1]],
        [[*access[:3], 9, 1]],
        None,
    ):
        bodies.append(log | {"accesses": accesses})
    exit_ = {"t": "exit", "entry": entry}
    for reason in (
        None,
        {},
        {"t": "unknown"},
        "halt",
        {"t": "invlpg"},
        {"t": "send_ipi", "targets": [0], "vector": 31},
        {"t": "send_ipi", "targets": [256], "vector": 64},
        {"t": "send_ipi", "targets": [0] * 257, "vector": 64},
        {"t": "register_write", "register": "cr1", "value": 0},
        {"t": "page_fault", "gva": _GVA, "error_code": 32, "instruction": {"flags": 0}},
        {"t": "page_fault", "gva": _GVA, "error_code": 2},
    ):
        bodies.append(exit_ | {"reason": reason})
    return bodies


@checks(
    "framing.body", "A body that is not as the specification says is refused, with its numbers", "Framing"
)
def _body(lab: Lab) -> None:
    vcpu = lab.guest()
    entry, walk = vcpu.session.entry, vcpu.session.walk + 1
    for body in _misshapen(entry, walk):
        vcpu.post(body)
        try:
            vcpu.refused(ErrorCode.MALFORMED)
        except Exception as error:
            error.add_note(f"to {body!r}")
            raise
    vcpu.map(_GVA)


@checks("framing.names", "Attach is refused if its name or role is not as the specification says", "Attach")
def _names(lab: Lab) -> None:
    peer = lab.stranger()
    right: dict[str, Any] = {"t": "attach", "role": "probe", "name": "names"}
    for change in (
        {"name": ""}, {"name": "n" * 65}, {"name": b"bytes"}, {"name": None}, {"role": "Probe"}, {"role": 3},
        {"vcpu": 256}, {"vcpu": -1}, {"vcpu": "0"}, {"vcpu": False}, {"version": 1},
    ):  # fmt: skip
        peer.post(right | change)
        peer.refused(ErrorCode.MALFORMED, number=0, incarnation=0)
    peer.name = "ü" * 64
    peer.attach(m.Role.PROBE)


@checks("framing.encodings", "Every encoding that the specification allows is taken", "Framing")
def _encodings(lab: Lab) -> None:
    peer = lab.stranger()
    session = Session(MMU, Side.PEER)
    peer.session = session

    def say(body: m.VcpuMessage) -> None:
        peer.send_frames(wide_frames(session.send(body), lab.random))

    for turn in range(8):
        say(m.Attach(m.Role.VCPU, "ünïcödé" * 3 if turn else "plain"))
        peer.expect(m.Attached)
        say(m.Enter())
        peer.expect(m.Entered)
        gva = DATA + 8 * turn
        walked = None
        while walked is None:
            say(m.Walk(session.entry, session.walk + 1, gva, WRITE))
            answer = peer.next("the answer to a walk").body
            if isinstance(answer, m.Walked):
                walked = answer
            else:
                require(isinstance(answer, m.WalkFault), f"{answer!r} instead of the answer to a walk")
                assert isinstance(answer, m.WalkFault)
                reason = m.PageFaultExit(gva, answer.error_code, m.Instruction(WRITE))
                say(m.Exit(session.entry, reason))
                peer.expect(m.Entered)
        pfn = walked.pfn + ((gva >> 12) & 511 if walked.level == 2 else 0)
        say(m.Log(session.entry, [(WRITE | walked.flags, gva, pfn, 8, turn)]))
        say(m.Load(session.entry, (8 | walked.flags, gva, pfn, 8, 0)))
        value = peer.expect(m.Loaded).value
        require(value == turn, f"loaded {value} instead of {turn}")
        say(m.Exit(session.entry, m.ExternalInterruptExit()))
        say(m.Detach())
        peer.ended(ErrorCode.DETACHED)


@checks("framing.direction", "Messages of other directions are refused", "Legal order")
def _direction(lab: Lab) -> None:
    vcpu = lab.guest()
    foreign: tuple[m.Message, ...] = (
        m.Entered(2),
        m.Kick(1),
        m.Walked(1, 1, 1, 1, 0),
        m.Applied(1),
        m.Attached(0, 1, vpid=True, heartbeat=1.0),
        m.Ended("detached"),
        m.ErrorReply("malformed", "no", 1),
        m.HostReply(1, 0),
        m.Join(m.Role.VCPU, "join"),
        m.Ready(0),
        m.Drain(),
        m.Progress({}),
        m.Finished(m.Verdict.PASS),
    )
    for body in foreign:
        vcpu.post(body)
        vcpu.refused(ErrorCode.UNEXPECTED_MESSAGE)
    vcpu.map(_GVA)


# --- versions -----------------------------------------------------------------------------------------------------


@checks("version.minor", "Every minor version of the own major version is taken", "Versions")
def _minor(lab: Lab) -> None:
    for minor in (0, VERSION[1] + 1, 65535, 99999):
        vcpu = lab.vcpu()
        vcpu.version = b"SMMU/%d.%d" % (VERSION[0], minor)
        vcpu.enter()
        vcpu.store(DATA, minor)
        value = vcpu.load(DATA)
        require(value == minor, f"loaded {value} instead of {minor}")
        lab.dismiss(vcpu)


@checks("version.major", "Another major version is refused, with those that are spoken", "Versions")
def _major(lab: Lab) -> None:
    peer = lab.stranger()
    envelope = msgpack.packb([0, 0, {"t": "attach", "role": "probe", "name": "major"}])
    for major in (0, VERSION[0] + 1, 99999):
        peer.send_frames([b"SMMU/%d.0" % major, envelope])
        require(peer.socket.poll(round(lab.patience * 1000)), "no answer to another major version")
        version, data = peer.socket.recv_multipart()
        own = re.fullmatch(rb"SMMU/(\d+)\.\d+", version)
        require(own is not None, f"the answer's version frame is {version!r}")
        reply = FROM_MMU.decode([VERSION_FRAME, data])
        body = reply.body
        require(
            isinstance(body, m.ErrorReply) and body.code == ErrorCode.UNSUPPORTED_VERSION.value,
            f"{body!r} to SMMU/{major}.0",
        )
        assert isinstance(body, m.ErrorReply)
        require(
            (reply.incarnation, reply.seq, body.seq) == (0, 0, 0),
            f"the refusal has numbers that are not 0: {reply!r}",
        )
        named = re.findall(r"SMMU/(\d+)\.\d+", body.text.partition("spoken:")[2] or body.text)
        require(str(VERSION[0]) in named, f"the text does not name the version that is spoken: {body.text!r}")
    peer.attach(m.Role.PROBE)


# --- sizes --------------------------------------------------------------------------------------------------------


@checks("limits.soft", "A message over the soft limit is refused, and one below is read", "Limits")
def _soft_limit(lab: Lab) -> None:
    host = lab.host()
    for size in (TO_MMU.soft_limit + 1, TO_MMU.hard_limit // 2):
        host.send_frames([VERSION_FRAME, b"\x93" + b"\0" * (size - 1)])
        host.refused(ErrorCode.TOO_LARGE, number=0, incarnation=0)
    host.send_frames([VERSION_FRAME, b"\x93" + b"\0" * (TO_MMU.soft_limit - 1)])
    host.refused(ErrorCode.MALFORMED, number=0, incarnation=0)
    words = [(DATA - gva_of(0) + 8 * n, (1 << 64) - 1 - n) for n in range(4096)]
    host.request(m.WritePhys(words))


@checks("limits.hard", "A frame over the hard limit cuts the connection, and nobody else's", "Limits")
def _hard_limit(lab: Lab) -> None:
    other = lab.guest()
    peer = lab.probe()
    lost = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        peer.silent = True
        peer.send_frames([VERSION_FRAME, b"\0" * (TO_MMU.hard_limit + 1)])
        require(_comes(lab, peer, lost), f"the connection was not cut within {lab.patience:g} s")
    finally:
        peer.socket.disable_monitor()
    other.map(_GVA)


def _comes(lab: Lab, peer: Peer, monitor: zmq.Socket[bytes]) -> bool:
    """Whether the monitor tells of its event in time; the others are looked after meanwhile."""
    for _ in range(round(lab.patience / 0.05)):
        if monitor.poll(50):
            recv_monitor_message(monitor)
            return True
        lab.look_after(peer)
    return False


@checks("limits.log", "A log has up to 64 accesses, all of which are applied", "Limits")
def _log_limit(lab: Lab) -> None:
    vcpu = lab.guest()
    flags, gva, pfn, size, _ = vcpu.access(DATA, WRITE)
    vcpu.log(*[(flags, gva + 8 * n, pfn, size, n + 1) for n in range(m.LOG_LIMIT)])
    for n in (0, 31, m.LOG_LIMIT - 1):
        value = vcpu.load(DATA + 8 * n)
        require(value == n + 1, f"access {n} of a log stored {value} instead of {n + 1}")
