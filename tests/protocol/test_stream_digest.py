"""The digest of a stream depends on its bytes alone, and can be taken up in the middle."""

from __future__ import annotations

import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.protocol.stream_digest import BLOCK, StreamDigest

LENGTHS = st.lists(st.integers(0, 3 * BLOCK), max_size=8)


def content(size: int) -> bytes:
    return bytes(i * 131 + (i >> 8) & 0xFF for i in range(size))


def digest_of(data: bytes) -> str:
    digest = StreamDigest()
    digest.update(data)
    return digest.hexdigest()


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


@given(LENGTHS)
def test_it_does_not_depend_on_the_pieces(lengths: list[int]) -> None:
    data = content(sum(lengths))
    digest = StreamDigest()
    start = 0
    for length in lengths:
        digest.update(data[start : start + length])
        start += length
    assert digest.hexdigest() == digest_of(data)


@given(st.integers(0, 3 * BLOCK), st.integers(0, 3 * BLOCK), st.booleans())
def test_it_goes_on_from_its_parts_and_from_a_pickle(first: int, second: int, pickled: bool) -> None:
    data = content(first + second)
    digest = StreamDigest()
    digest.update(data[:first])
    copy = pickle.loads(pickle.dumps(digest)) if pickled else StreamDigest(digest.chain, digest.rest)
    copy.update(data[first:])
    assert copy.hexdigest() == digest_of(data)
    assert digest.hexdigest() == digest_of(data[:first])
    assert len(digest.rest) < BLOCK


def test_it_is_what_its_definition_says() -> None:
    data = content(2 * BLOCK + 5)
    first = blake(bytes(16) + data[:BLOCK])
    second = blake(first + data[BLOCK : 2 * BLOCK])
    assert digest_of(data) == blake(second + data[2 * BLOCK :]).hex()
    assert digest_of(b"") == blake(bytes(16)).hex()


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_every_byte_counts(size: int) -> None:
    data = content(size)
    for place in (0, size // 2, size - 1):
        other = bytearray(data)
        other[place] ^= 1
        assert digest_of(bytes(other)) != digest_of(data)
    assert digest_of(data[:-1]) != digest_of(data)
