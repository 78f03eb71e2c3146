"""Frames and envelopes: both libraries, and everything that can be wrong with a frame."""

from __future__ import annotations

from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shadowmmu.protocol import (
    DIRECTIONS,
    FROM_COORDINATOR,
    FROM_MMU,
    TO_COORDINATOR,
    TO_MMU,
    VERSION_FRAME,
    Direction,
    Envelope,
    ErrorCode,
    LocalProtocolError,
    RemoteProtocolError,
    error_reply,
)
from shadowmmu.protocol import messages as m
from tests.protocol.strategies import bodies, envelopes, numbers, plain

UNIONS = {
    TO_MMU: m.VcpuMessage,
    FROM_MMU: m.MmuMessage,
    TO_COORDINATOR: m.MemberMessage,
    FROM_COORDINATOR: m.CoordinatorMessage,
}
CASES = [(direction, kind) for direction, union in UNIONS.items() for kind in get_args(union)]


def refused(direction: Direction, *frames: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        direction.decode(frames)
    return caught.value


def body(data: bytes) -> bytes:
    """An envelope [1, 2, data]."""
    return b"\x93\x01\x02" + data


@pytest.mark.parametrize("direction, kind", CASES)
@given(data=st.data())
def test_every_message_survives_both_libraries(direction: Direction, kind: Any, data: st.DataObject) -> None:
    envelope = Envelope(data.draw(numbers), data.draw(numbers), data.draw(bodies(kind)))
    frames = direction.encode(envelope)
    assert frames[0] == b"SMMU/1.1"
    assert direction.decode(frames) == envelope
    expected = [envelope.incarnation, envelope.seq, plain(envelope.body)]
    unpacked = msgpack.unpackb(frames[1], strict_map_key=False)
    assert unpacked == expected
    assert direction.decode([VERSION_FRAME, msgpack.packb(unpacked)]) == envelope


@pytest.mark.parametrize("direction, kind", CASES)
@given(data=st.data())
def test_wrong_direction(direction: Direction, kind: Any, data: st.DataObject) -> None:
    envelope = Envelope(data.draw(numbers), data.draw(numbers), data.draw(bodies(kind)))
    frames = direction.encode(envelope)
    for other in DIRECTIONS:
        if kind not in get_args(UNIONS[other]):
            error = refused(other, *frames)
            assert error.code == ErrorCode.UNEXPECTED_MESSAGE
            assert (error.incarnation, error.seq) == (envelope.incarnation, envelope.seq)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(count=st.integers(0, 10).filter(lambda n: n != 2))
def test_part_count(direction: Direction, count: int) -> None:
    assert refused(direction, *[VERSION_FRAME] * count).code == ErrorCode.BAD_PART_COUNT


@pytest.mark.parametrize(
    "version, code",
    [
        (b"SMMU/0.9", ErrorCode.UNSUPPORTED_VERSION),
        (b"SMMU/2.0", ErrorCode.UNSUPPORTED_VERSION),
        (b"SMMU/99999.99999", ErrorCode.UNSUPPORTED_VERSION),
        (b"SMMU/999999.0", ErrorCode.MALFORMED),
        (b"SMMU/01.0", ErrorCode.MALFORMED),
        (b"SMMU/1", ErrorCode.MALFORMED),
        (b"SMMU/1.1\n", ErrorCode.MALFORMED),
        (b"smmu/1.0", ErrorCode.MALFORMED),
        (b"", ErrorCode.MALFORMED),
        (b"\xff" * 8, ErrorCode.MALFORMED),
        (b"SMMU/1.1" * 10_000, ErrorCode.MALFORMED),
        ("SMMU/\N{ARABIC-INDIC DIGIT ONE}.0".encode(), ErrorCode.MALFORMED),
    ],
)
def test_versions(version: bytes, code: ErrorCode) -> None:
    error = refused(TO_MMU, version, TO_MMU.encode(Envelope(1, 1, m.Enter()))[1])
    assert error.code == code
    if code is ErrorCode.UNSUPPORTED_VERSION:
        assert "SMMU/1.1" in error.text


def test_another_minor_version_is_read() -> None:
    frames = TO_MMU.encode(Envelope(1, 1, m.Enter()))
    assert TO_MMU.decode([b"SMMU/1.17", frames[1]]).body == m.Enter()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_too_large(direction: Direction) -> None:
    assert direction.soft_limit < direction.hard_limit
    assert refused(direction, VERSION_FRAME, bytes(direction.soft_limit + 1)).code == ErrorCode.TOO_LARGE
    assert refused(direction, VERSION_FRAME, bytes(direction.soft_limit)).code == ErrorCode.MALFORMED


def test_the_largest_legal_messages_fit() -> None:
    top = (1 << 64) - 1
    TO_MMU.encode(Envelope(top, top, m.HostRequest(top, m.WritePhys([(top, top)] * 4096))))
    TO_MMU.encode(Envelope(top, top, m.Log(top, [(0xFFFF, top, (1 << 40) - 1, 8, top)] * m.LOG_LIMIT)))
    FROM_MMU.encode(Envelope(top, top, m.HostReply(top, 1 << 20, [1 << 20] * (1 << 20))))
    FROM_COORDINATOR.encode(Envelope(top, top, m.Joined(1, m.RunConfig(), "x" * 1024, 1.0)))


def test_our_own_mistakes_are_local() -> None:
    with pytest.raises(LocalProtocolError, match="takes"):
        TO_COORDINATOR.encode(Envelope(1, 1, m.EventBatch(1, 1, bytes(TO_COORDINATOR.soft_limit))))
    with pytest.raises(LocalProtocolError, match="cannot encode"):
        TO_MMU.encode(Envelope(1, 1, m.Walk(1, 1, 1 << 64, 0)))
    with pytest.raises(LocalProtocolError):
        TO_MMU.encode(Envelope(1, 1 << 64, m.Enter()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 50_000,
        b"\x81" * 50_000,
        body(b"\x91" * 50_000),
        body(b"\x81\xa1t" + b"\x91" * 50_000),
        body(b"\x82\xa1t\xa3log\xa8accesses" + b"\x91" * 50_000),
        body(b"\x82\xa1t\xa3log\xa8accesses\xdd\xff\xff\xff\xff"),
        body(b"\x82\xa1t\xacevent_credit\xdf\xff\xff\xff\xff"),
        body(b"\xdf\xff\xff\xff\xff"),
        b"\xdd\xff\xff\xff\xff",
        body(b"\x81\xa1t\xdb\xff\xff\xff\xff"),
        body(b"\x82\xa1t\xa6attach\xa4name\xa2\xff\xff"),
        body(b"\x81\xa1t\xa2\xff\xff"),
        body(b"\x80"),
        body(b"\x90"),
        body(b"\xc0"),
        body(b"\x81\xa1t\xa4none"),
        body(b"\x82\xa1t\xa5enter\xa5extra\x01"),
        body(b"\x81\xa1t\xa5enter") + b"\x00",
        b"\x94\x01\x02\x81\xa1t\xa5enter\x00",
        b"\x92\x01\x02",
        b"\x93\xff\x02\x81\xa1t\xa5enter",
        b"\x93\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\x02\x81\xa1t\xa5enter",
        b"\x93\xa1x\x02\x81\xa1t\xa5enter",
    ],
    ids=range(25),
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_malformed(direction: Direction, data: bytes) -> None:
    assert refused(direction, VERSION_FRAME, data).code == ErrorCode.MALFORMED


@pytest.mark.parametrize(
    "message",
    [
        {"t": "walk", "entry": 1, "walk": 1, "gva": -1, "flags": 0},
        {"t": "walk", "entry": 1, "walk": 1, "gva": 0, "flags": 32},
        {"t": "walk", "entry": 1, "walk": 1, "gva": 1.0, "flags": 0},
        {"t": "walk", "entry": 1, "walk": 1, "gva": "0", "flags": 0},
        {"t": "walk", "entry": 1, "walk": 1, "gva": 0},
        {"t": "log", "entry": 1, "accesses": []},
        {"t": "log", "entry": 1, "accesses": [[1, 2, 3, 8, 5]] * 65},
        {"t": "log", "entry": 1, "accesses": [[1, 2, 3, 9, 5]]},
        {"t": "log", "entry": 1, "accesses": [[1, 2, 3, 8]]},
        {"t": "log", "entry": 1, "accesses": [[1, 2, 1 << 40, 8, 0]]},
        {"t": "attach", "role": "king", "name": "x"},
        {"t": "attach", "role": "vcpu", "name": ""},
        {"t": "attach", "role": "vcpu", "name": "x" * 65},
        {"t": "attach", "role": "vcpu", "name": "x", "vcpu": 256},
        {"t": "exit", "entry": 1, "reason": {"t": "page_fault"}},
        {"t": "exit", "entry": 1, "reason": {"t": "send_ipi", "targets": [0] * 257, "vector": 32}},
        {"t": "host_request", "request": 1, "operation": {"t": "write_phys", "words": [[0, 0]] * 4097}},
    ],
    ids=range(17),
)
def test_wrong_fields(message: dict[str, Any]) -> None:
    error = refused(TO_MMU, VERSION_FRAME, msgpack.packb([7, 8, message]))
    assert error.code == ErrorCode.MALFORMED
    assert (error.incarnation, error.seq) == (7, 8)
    assert "$[2]" in error.text


@given(st.sampled_from(DIRECTIONS), st.lists(st.binary(max_size=200), max_size=4))
@example(TO_MMU, [VERSION_FRAME, b"\x93"])
def test_any_frames_decode_or_are_refused(direction: Direction, frames: list[bytes]) -> None:
    try:
        assert isinstance(direction.decode(frames), Envelope)
    except RemoteProtocolError as error:
        FROM_MMU.encode(error_reply(error))


@given(st.sampled_from(DIRECTIONS), st.binary(max_size=300))
def test_any_body_decodes_or_is_refused(direction: Direction, data: bytes) -> None:
    test_any_frames_decode_or_are_refused.hypothesis.inner_test(direction, [VERSION_FRAME, data])  # type: ignore[attr-defined]


@given(st.sampled_from(DIRECTIONS), envelopes(), st.data())
def test_damaged_messages_decode_or_are_refused(
    direction: Direction, envelope: Envelope, data: st.DataObject
) -> None:
    raw = bytearray(msgspec.msgpack.encode(envelope))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    test_any_frames_decode_or_are_refused.hypothesis.inner_test(direction, [VERSION_FRAME, bytes(raw)])  # type: ignore[attr-defined]
