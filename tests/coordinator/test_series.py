"""The samples of a run over time."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.coordinator.series import (
    POINTS_INTERRUPTED,
    POINTS_REACHED,
    Sample,
    Series,
    is_sum,
    sampled_counters,
)

LIMIT = 8
NAMES = ("events", "exits.hlt", "kvm.mmu_unsync.current", "kvm.mmu_unsync.highest")

moments = st.lists(
    st.tuples(
        st.floats(0.0, 20.0, allow_nan=False),
        st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50)),
    ),
    min_size=1,
    max_size=80,
)


def sampled(moments: list[tuple[float, dict[str, int]]]) -> tuple[Series, float, dict[str, int]]:
    """A series that was offered those gaps and counters, the last of them in any case."""
    series, now = Series(1.0, LIMIT), 0.0
    for gap, counters in moments:
        now += gap
        if series.due(now):
            series.add(now, counters)
    series.add(now, moments[-1][1])
    return series, now, moments[-1][1]


@given(moments)
def test_there_are_never_more_than_the_limit_and_the_first_and_the_last_are_kept(
    moments: list[tuple[float, dict[str, int]]],
) -> None:
    series, end, counters = sampled(moments)
    assert len(series.samples) <= LIMIT
    assert series.samples[0].seconds == 0.0
    assert series.samples[-1].seconds == round(end, 3)
    last = series.samples[-1].counters
    assert all(last.get(name, 0) >= value for name, value in counters.items())


@given(moments)
def test_times_increase_and_sums_never_go_down(moments: list[tuple[float, dict[str, int]]]) -> None:
    samples = sampled(moments)[0].samples
    for one, other in itertools.pairwise(samples):
        assert one.seconds < other.seconds
        for name, value in one.counters.items():
            assert not is_sum(name) or other.counters.get(name, 0) >= value


@given(moments)
def test_gauges_are_as_they_were_told(moments: list[tuple[float, dict[str, int]]]) -> None:
    series, _, counters = sampled(moments)
    gauge = "kvm.mmu_unsync.current"
    assert series.samples[-1].counters.get(gauge, 0) == counters.get(gauge, 0)


@given(st.integers(1, 500))
def test_samples_taken_regularly_stay_evenly_spread(count: int) -> None:
    series = Series(1.0, LIMIT)
    for second in range(1, count + 1):
        if series.due(second):
            series.add(second, {})
    times = [sample.seconds for sample in series.samples]
    assert {b - a for a, b in itertools.pairwise(times)} <= {series.interval}
    assert len(times) > LIMIT // 2 or count < LIMIT
    assert count - times[-1] < series.interval


def test_a_service_that_has_not_told_its_counters_again_takes_nothing_back() -> None:
    series = Series(1.0)
    series.add(1.0, {"events": 10, "kvm.mmu_unsync.current": 3})
    series.add(2.0, {"events": 4})
    assert series.samples == [
        Sample(0.0, {}),
        Sample(1.0, {"events": 10, "kvm.mmu_unsync.current": 3}),
        Sample(2.0, {"events": 10}),
    ]


def test_coverage_is_sampled_as_two_numbers() -> None:
    counters = {
        "point.A.reached": 5,
        "point.A.store": 1,
        "point.A.operation": 2,
        "point.B.reached": 1,
        "point.B.parked": 1,
        "point.C.reached": 0,
        "vcpu.instructions": 7,
        "vcpu.resumed": 1,
        "exits.hlt": 2,
    }
    assert sampled_counters(counters) == {
        "vcpu.instructions": 7,
        "exits.hlt": 2,
        POINTS_REACHED: 2,
        POINTS_INTERRUPTED: 1,
    }
