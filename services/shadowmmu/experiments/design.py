"""From an experiment's spec to its runs: every point, every replicate, each with its seed.

Seeds are hashes, so that a point keeps its seeds when others are added to the design.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Final

import msgspec

from shadowmmu.experiments.parameters import ParameterError
from shadowmmu.experiments.point import KINDS
from shadowmmu.experiments.spec import SpecError, SweepSpec
from shadowmmu.experiments.values import Value

__all__ = ["Point", "Run", "check_points", "points_of", "runs_of", "seed_of"]

SEED_BITS: Final = 63
"""Seeds are columns of 64-bit integers with a sign."""


class Point(msgspec.Struct, frozen=True):
    """A point of the design: its number, in the order of the file with the grid's last parameter fastest."""

    number: int
    parameters: dict[str, Value]


class Run(msgspec.Struct, frozen=True):
    """A replicate at a point."""

    point: Point
    replicate: int
    seed: int

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from the others: the point's number and the replicate's."""
        return self.point.number, self.replicate


def points_of(spec: SweepSpec) -> list[Point]:
    """The design."""
    combinations = [
        dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())
    ]
    return [
        Point(number, spec.fixed | explicit | combination)
        for number, (explicit, combination) in enumerate(itertools.product(spec.points or [{}], combinations))
    ]


def runs_of(spec: SweepSpec) -> list[Run]:
    """All runs, the first replicates of all points first: a sweep that is cut off has something of every point."""
    points = points_of(spec)
    return [
        Run(point, replicate, seed_of(spec, point, replicate))
        for replicate in range(spec.replicates)
        for point in points
    ]


def seed_of(spec: SweepSpec, point: Point, replicate: int) -> int:
    """The seed of a run: of the sweep's seed, the replicate and the point's parameters.

    With common random numbers, not of the point: what points have in common then happens to all of them alike.
    """
    parameters = None if spec.common_random_numbers else sorted(point.parameters.items())
    text = msgspec.json.encode([spec.seed, replicate, parameters])
    digest = hashlib.blake2b(text, digest_size=8, person=b"shadowmmu sweep").digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)


def check_points(spec: SweepSpec, source: str) -> None:
    """Raises SpecError if the values of some point do not go together; before anything runs."""
    kind = KINDS[spec.kind]
    for point in points_of(spec):
        try:
            kind.check(point.parameters)
        except ParameterError as error:
            where = ", ".join(f"{name} = {value}" for name, value in point.parameters.items())
            raise SpecError(source, error.name, f"{error.text} (at {where or 'the only point'})") from error
