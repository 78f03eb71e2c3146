"""Swarm testing: each random guest has only some of the things that guests do, and does those more often.

A test that may do everything does little of anything in particular, and some things keep others from happening. Tests
that leave out features at random find more, and more different, failures (Groce, Zhang, Eide, Chen, Regehr: "Swarm
testing", ISSTA 2012).
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from typing import TypeVar

__all__ = ["some_of"]

T = TypeVar("T", bound=Hashable)


def some_of(draw: random.Random, weights: Mapping[T, float]) -> dict[T, float]:
    """Each of the choices that has a weight, or not, by the toss of a coin; at least one of them."""
    possible = {choice: weight for choice, weight in weights.items() if weight}
    some = {choice: weight for choice, weight in possible.items() if draw.random() < 0.5}
    return some or possible
