"""A design has every combination once, and every run a seed that is its own and stays its own."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.experiments.design import points_of, runs_of
from shadowmmu.experiments.kinds.kind import Kind
from shadowmmu.experiments.spec import SweepSpec
from shadowmmu.experiments.values import Value

names = st.sampled_from(["ops", "vcpus", "executions", "host_ops", "profile", "first"])
values: st.SearchStrategy[Value] = st.one_of(
    st.booleans(), st.integers(0, 99), st.floats(0.5, 9.5), st.text("xyz")
)


@st.composite
def specs(draw: st.DrawFn) -> SweepSpec:
    parameters = draw(st.lists(names, unique=True, min_size=1, max_size=4))
    # repr: True, 1 and 1.0 are different values of different parameters, never of one.
    grid = {name: draw(st.lists(values, unique_by=repr, min_size=1, max_size=4)) for name in parameters}
    return SweepSpec(
        title="t",
        kind=Kind.EXPLORE,
        grid=grid,
        replicates=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, (1 << 63) - 1)),
        common_random_numbers=draw(st.booleans()),
    )


@given(specs())
def test_a_design_has_every_combination_once_for_every_replicate(spec: SweepSpec) -> None:
    points = points_of(spec)
    assert [point.number for point in points] == list(range(math.prod(map(len, spec.grid.values()))))
    assert len({repr(point.parameters) for point in points}) == len(points)
    assert all(point.parameters[name] in spec.grid[name] for point in points for name in spec.grid)
    runs = runs_of(spec)
    assert {run.key for run in runs} == set(itertools.product(range(len(points)), range(spec.replicates)))
    assert len(runs) == len(points) * spec.replicates == spec.runs()


@given(specs())
def test_seeds_are_distinct_or_common_as_the_spec_says(spec: SweepSpec) -> None:
    runs = runs_of(spec)
    assert all(0 <= run.seed < 1 << 63 for run in runs)
    if spec.common_random_numbers:
        by_replicate = {run.replicate: run.seed for run in runs}
        assert all(run.seed == by_replicate[run.replicate] for run in runs)
        assert len(set(by_replicate.values())) == spec.replicates
    else:
        assert len({run.seed for run in runs}) == len(runs)


@given(specs(), st.data())
def test_a_point_keeps_its_seeds_when_the_design_grows(spec: SweepSpec, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(spec.grid)))
    grid = spec.grid | {name: [*spec.grid[name], "one more"]}
    larger = SweepSpec(
        title="another",
        kind=spec.kind,
        grid=grid,
        replicates=spec.replicates + 1,
        seed=spec.seed,
        common_random_numbers=spec.common_random_numbers,
    )
    seeds = {(repr(run.point.parameters), run.replicate): run.seed for run in runs_of(larger)}
    assert all(seeds[repr(run.point.parameters), run.replicate] == run.seed for run in runs_of(spec))


def test_seeds_stay_what_they_are() -> None:
    """Pinned: with other seeds, results that were published could not be had again."""
    spec = SweepSpec(title="t", kind=Kind.EXPLORE, fixed={"test": "cr3-global"}, grid={"ops": [1, 2]}, seed=7)
    assert [run.seed for run in runs_of(spec)] == [3196516127236171636, 4766403048063707775]
