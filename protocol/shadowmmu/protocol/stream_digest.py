"""The digest of a stream of bytes that can be laid aside in the middle and taken up again.

The bytes are cut into blocks of 64 KiB. Beginning with c(0) = 16 zero bytes, c(i+1) = BLAKE2b-128(c(i) || block i);
the digest is BLAKE2b-128(c(n) || rest), where n is the number of whole blocks and `rest` what follows them (perhaps
nothing). It depends on the bytes alone, not on the pieces in which they come. Relies on nothing.
"""

from __future__ import annotations

import hashlib
from typing import Final

__all__ = ["StreamDigest"]

BLOCK: Final = 1 << 16
SIZE: Final = 16
_BEGINNING: Final = bytes(SIZE)


def _hash(chain: bytes, data: bytes | bytearray | memoryview) -> bytes:
    digest = hashlib.blake2b(chain, digest_size=SIZE)
    digest.update(data)
    return digest.digest()


class StreamDigest:
    """A stream so far: `chain` is c(n), `rest` the bytes behind the last whole block.

    Both together are all that is needed to go on: `StreamDigest(chain, rest)`. Can be pickled.
    """

    __slots__ = ("_rest", "chain")

    def __init__(self, chain: bytes = _BEGINNING, rest: bytes = b"") -> None:
        self.chain = chain
        self._rest = bytearray(rest)

    @property
    def rest(self) -> bytes:
        """Less than a block."""
        return bytes(self._rest)

    def update(self, data: bytes) -> None:
        """The next bytes of the stream."""
        rest = self._rest
        rest += data
        if len(rest) < BLOCK:
            return
        whole = len(rest) - len(rest) % BLOCK
        with memoryview(rest) as view:
            for start in range(0, whole, BLOCK):
                self.chain = _hash(self.chain, view[start : start + BLOCK])
        del rest[:whole]

    def hexdigest(self) -> str:
        """The digest of the bytes so far, 32 hexadecimal digits."""
        return _hash(self.chain, self._rest).hex()
