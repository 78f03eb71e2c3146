"""The event stream's encoding: a plain concatenation, read back by both libraries."""

from __future__ import annotations

import io
from typing import get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from shadowmmu.protocol import events as ev
from tests.protocol.strategies import _strategy

KINDS: tuple[type, ...] = get_args(ev.Event)
events = st.lists(st.one_of(*(_strategy(inspect.type_info(kind)) for kind in KINDS)), max_size=20)


@given(events, st.integers(0, 20))
def test_round_trip_however_it_is_cut(stream: list[ev.Event], cut: int) -> None:
    data = ev.encode_events(stream)
    assert data == b"".join(map(ev.encode_event, stream))
    assert ev.decode_events(data, len(stream)) == stream
    head = ev.encode_events(stream[:cut])
    assert data.startswith(head)
    assert ev.decode_events(data[len(head) :], len(stream[cut:])) == stream[cut:]
    unpacked = list(msgpack.Unpacker(io.BytesIO(data), strict_map_key=False))
    assert [item[0] for item in unpacked] == [type(event).__struct_config__.tag for event in stream]


def test_tags_are_distinct() -> None:
    tags = [kind.__struct_config__.tag for kind in KINDS]  # type: ignore[attr-defined]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_count_is_refused(count: int) -> None:
    with pytest.raises(msgspec.MsgspecError):
        ev.decode_events(ev.encode_event(ev.LockTaken(1)), count)
