"""A journal gives back what was written, survives its writer's death, and refuses what is no journal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.machine.journal import (
    SCHEMA,
    Attached,
    Digest,
    End,
    GivenUp,
    Header,
    HostAsked,
    JournalError,
    JournalWriter,
    Record,
    Steps,
    VcpuSent,
    read_journal,
)
from shadowmmu.protocol import messages as m

U64 = st.integers(0, (1 << 64) - 1)
SMALL = st.integers(0, 255)

records = st.one_of(
    st.builds(Attached, SMALL, U64),
    st.builds(GivenUp, SMALL, st.just("given-up"), st.text(max_size=20)),
    st.builds(VcpuSent, SMALL, st.builds(m.Exit, U64, st.builds(m.InvlpgExit, U64))),
    st.builds(
        VcpuSent,
        SMALL,
        st.builds(
            m.Log, U64, st.lists(st.tuples(SMALL, U64, SMALL, st.just(8), U64), min_size=1, max_size=3)
        ),
    ),
    st.builds(HostAsked, U64, st.builds(m.Reclaim, st.integers(0, 1 << 30)), st.booleans()),
    st.builds(Steps, SMALL, st.lists(SMALL)),
    st.builds(Digest, U64, st.text(max_size=32)),
)

HEADER = Header(SCHEMA, "1.2.3", m.RunConfig(seed=7))


def journal_of(*items: Record) -> bytes:
    written: list[bytes] = []
    writer = JournalWriter(written.append)
    assert [writer.append(item) for item in items] == list(range(len(items)))
    return b"".join(written)


@given(st.lists(records, max_size=10))
def test_what_was_written_is_read(items: list[Record]) -> None:
    everything = [HEADER, *items, End(5, "00")]
    assert list(read_journal(io.BytesIO(journal_of(*everything)))) == everything


@given(st.integers(0, 200))
def test_a_journal_cut_short_gives_its_whole_records(cut: int) -> None:
    items: list[Record] = [HEADER, Steps(3, [1, 2]), Attached(0, 1)]
    data = journal_of(*items)
    sizes = [len(journal_of(*items[:count])) for count in range(len(items) + 1)]
    kept = data[: min(cut, len(data))]
    whole = max(count for count, size in enumerate(sizes) if size <= len(kept))
    if whole == 0:
        with pytest.raises(JournalError, match="empty"):
            list(read_journal(io.BytesIO(kept)))
    else:
        assert list(read_journal(io.BytesIO(kept))) == items[:whole]


@pytest.mark.parametrize(
    "data, complaint",
    [
        (b"", "empty"),
        (b"not a journal at all", "record 0"),
        (journal_of(Attached(0, 1)), "record 0: a header"),
        (journal_of(HEADER, HEADER), "record 1: a header"),
        (journal_of(Header(SCHEMA + 1, "9", m.RunConfig())), "schema"),
        (journal_of(HEADER) + b"\xc1", "record"),
        (journal_of(HEADER) + b"\x81\xa1t\xa1x", "record 1"),
    ],
)
def test_what_is_no_journal_is_refused_with_the_record_that_is_wrong(data: bytes, complaint: str) -> None:
    with pytest.raises(JournalError, match=complaint):
        list(read_journal(io.BytesIO(data)))
