"""The programs' source of choices: a small generator whose whole state is one number.

The recurrence is Knuth's 64-bit linear congruential generator (MMIX); only its upper bits are used. The standard
library's generator has a state of 2.5 KB, too much for programs whose state is saved at every step of a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec

__all__ = ["ADD", "MASK", "MULTIPLY", "Prng"]

T = TypeVar("T")

MULTIPLY: Final = 6364136223846793005
ADD: Final = 1442695040888963407
MASK: Final = (1 << 64) - 1


class Prng(msgspec.Struct):
    """`state`: 64 bits. Seeded by `seeded`, so that near seeds give unlike sequences."""

    state: int

    @classmethod
    def seeded(cls, *parts: int) -> Prng:
        prng = cls(0x9E3779B97F4A7C15)
        for part in parts:
            prng.state = (prng.state ^ (part & MASK)) * MULTIPLY & MASK
            prng.state ^= prng.state >> 29
            prng.below(2)
        return prng

    def bits(self) -> int:
        """32 random bits."""
        self.state = (self.state * MULTIPLY + ADD) & MASK
        return self.state >> 32

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return self.bits() * n >> 32

    def chance(self, one_in: int) -> bool:
        """True once in `one_in` times."""
        return self.bits() * one_in >> 32 == 0

    def choice(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Up to `count` different ones, in their order."""
        left = list(items)
        while len(left) > count:
            del left[self.below(len(left))]
        return left
