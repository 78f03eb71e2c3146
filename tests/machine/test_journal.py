"""A journal gives back what was written, survives its writer's death, and refuses what is damaged or no journal."""

from __future__ import annotations

import io
import zlib

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.machine.journal import (
    SCHEMA,
    Admission,
    Attached,
    Digest,
    EmptyJournalError,
    End,
    GivenUp,
    Header,
    HostAsked,
    HostAttached,
    HostEnded,
    JournalError,
    JournalReader,
    JournalWriter,
    Record,
    Recovered,
    Steps,
    VcpuSent,
    read_journal,
)
from shadowmmu.protocol import messages as m

U64 = st.integers(0, (1 << 64) - 1)
SMALL = st.integers(0, 255)

records = st.one_of(
    st.builds(Attached, SMALL, U64, st.booleans(), st.binary(max_size=20)),
    st.builds(GivenUp, SMALL, st.just("given-up"), st.text(max_size=20)),
    st.builds(VcpuSent, SMALL, st.builds(m.Exit, U64, st.builds(m.InvlpgExit, U64))),
    st.builds(
        VcpuSent,
        SMALL,
        st.builds(
            m.Log, U64, st.lists(st.tuples(SMALL, U64, SMALL, st.just(8), U64), min_size=1, max_size=3)
        ),
    ),
    st.builds(HostAsked, U64, st.builds(m.Reclaim, st.integers(0, 1 << 30)), st.booleans(), U64, U64),
    st.builds(HostAttached, U64, st.binary(max_size=20)),
    st.builds(HostEnded, U64),
    st.builds(Admission, st.booleans()),
    st.builds(Steps, SMALL, st.lists(SMALL)),
    st.builds(Digest, U64, st.text(max_size=32)),
    st.builds(Recovered, U64, st.text(max_size=32)),
)

HEADER = Header(SCHEMA, "1.2.3", m.RunConfig(seed=7))


def frames_of(*turns: list[Record]) -> list[bytes]:
    """The frames of a journal that was written in these turns."""
    written: list[bytes] = []
    writer = JournalWriter(written.append)
    number = 0
    for turn in turns:
        for item in turn:
            assert writer.append(item) == number
            number += 1
        writer.flush()
    assert writer.records == number
    return written


def journal_of(*turns: list[Record]) -> bytes:
    return b"".join(frames_of(*turns))


def read(data: bytes) -> tuple[list[Record], JournalReader]:
    reader = read_journal(io.BytesIO(data))
    return list(reader), reader


TURNS: list[list[Record]] = [
    [HEADER, Attached(0, 1, token=b"t" * 16)],
    [Steps(3, [1, 2]), VcpuSent(0, m.Enter())],
    [Steps(300, [0] * 40)],
    [HostAttached(4), HostAsked(1, m.Shrink(3), incarnation=4, request=9), Admission(open=False)],
    [End(5, "00")],
]


@given(st.lists(st.lists(records, max_size=5), max_size=6))
def test_what_was_written_is_read_and_a_turn_is_one_frame(turns: list[list[Record]]) -> None:
    everything: list[list[Record]] = [[HEADER], *turns, [End(5, "00")]]
    frames = frames_of(*everything)
    assert len(frames) == 2 + sum(bool(turn) for turn in turns)
    found, reader = read(b"".join(frames))
    assert found == [item for turn in everything for item in turn]
    assert reader.ended and not reader.torn


def test_a_frame_is_a_checksum_and_a_string_of_records() -> None:
    for frame in frames_of(*TURNS):
        checksum, payload = msgpack.unpackb(frame)
        assert (frame[0], frame[1], frame[6]) == (0x92, 0xCE, 0xC6)
        assert checksum == zlib.crc32(payload)
        assert len(frame) == 11 + len(payload)


def test_a_journal_cut_at_any_byte_gives_its_whole_frames_and_says_where_to_cut() -> None:
    frames = frames_of(*TURNS)
    data = b"".join(frames)
    ends = [sum(map(len, frames[:count])) for count in range(len(frames) + 1)]
    for cut in range(len(data) + 1):
        whole = max(count for count, end in enumerate(ends) if end <= cut)
        if whole == 0:
            with pytest.raises(EmptyJournalError):
                read(data[:cut])
            continue
        found, reader = read(data[:cut])
        assert found == [item for turn in TURNS[:whole] for item in turn]
        assert (reader.position.offset, reader.torn) == (ends[whole], cut - ends[whole])
        assert reader.position.record == len(found)


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x80, 0xFF])
def test_a_journal_with_any_byte_changed_is_refused_or_loses_its_last_frame(bit: int) -> None:
    frames = frames_of(*TURNS)
    data = b"".join(frames)
    last = len(data) - len(frames[-1])
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= bit
        if place >= last:
            found, reader = read(bytes(changed))
            assert found == [item for turn in TURNS[:-1] for item in turn]
            assert reader.torn == len(frames[-1])
        else:
            with pytest.raises(JournalError, match=r"record|schema"):
                read(bytes(changed))


def test_damage_is_told_by_offset_and_record() -> None:
    frames = frames_of(*TURNS)
    changed = bytearray(b"".join(frames))
    offset = len(frames[0]) + len(frames[1])
    changed[offset + 12] ^= 1
    with pytest.raises(JournalError, match=f"record 4: the frame at offset {offset} is damaged"):
        read(bytes(changed))


def test_a_journal_is_taken_up_where_it_was_left() -> None:
    written: list[bytes] = []
    first = JournalWriter(written.append)
    for turn in TURNS[:2]:
        for item in turn:
            first.append(item)
        first.flush()
    at = first.position
    second = JournalWriter(written.append, at)
    for turn in TURNS[2:]:
        for item in turn:
            second.append(item)
        second.flush()
    assert b"".join(written) == journal_of(*TURNS)
    rest = list(JournalReader(io.BytesIO(b"".join(written)), at))
    assert rest == [item for turn in TURNS[2:] for item in turn]
    for other in (journal_of([HEADER], *TURNS[1:]), b"".join(written)[: at.offset - 1]):
        with pytest.raises(JournalError, match="another journal"):
            list(JournalReader(io.BytesIO(other), at))


def test_a_frame_that_could_not_be_written_is_written_the_next_time() -> None:
    written: list[bytes] = []
    full = True

    def write(frame: bytes) -> None:
        if full:
            raise OSError("no space left on device")
        written.append(frame)

    writer = JournalWriter(write)
    writer.append(HEADER)
    with pytest.raises(OSError, match="no space"):
        writer.flush()
    full = False
    writer.append(Steps(1, []))
    writer.flush()
    writer.flush()
    assert written == frames_of([HEADER, Steps(1, [])])


@pytest.mark.parametrize(
    "data, complaint",
    [
        (b"", "empty"),
        (b"not a journal at all", "record 0"),
        (journal_of([Attached(0, 1)]), "record 0: a header"),
        (journal_of([HEADER, HEADER]), "record 1: a header"),
        (journal_of([HEADER], [End(0, "")], [Steps(1, [])]), "record 2: there are records behind the end"),
        (journal_of([HEADER, End(0, ""), End(0, "")]), "record 2: there are records behind the end"),
        (journal_of([Header(SCHEMA + 1, "9", m.RunConfig())]), f"schema {SCHEMA + 1}"),
        (msgspec.msgpack.encode(Header(1, "9", m.RunConfig())), "schema 1, which had no frames"),
    ],
)
def test_what_is_no_journal_is_refused_with_the_record_that_is_wrong(data: bytes, complaint: str) -> None:
    with pytest.raises(JournalError, match=complaint):
        read(data)


@pytest.mark.parametrize("payload", [b"\xc1", b"\x81\xa1t\xa1x", b"\x81\xa4type", b"\x05"])
def test_a_whole_frame_of_what_are_no_records_is_refused(payload: bytes) -> None:
    checksum = zlib.crc32(payload).to_bytes(4, "big")
    frame = b"\x92\xce" + checksum + b"\xc6" + len(payload).to_bytes(4, "big") + payload
    with pytest.raises(JournalError, match="record 1"):
        read(journal_of([HEADER]) + frame)
