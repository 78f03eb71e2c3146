"""Charts as pictures, and the distributions that they draw."""

from xml.etree import ElementTree as ET

import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.reports.charts import (
    PALETTE,
    Bar,
    Chart,
    Estimate,
    LinePoint,
    bars,
    density,
    estimates,
    lines,
    percentiles,
    ratios,
    stacked,
    to_spec,
    to_svg,
)
from shadowmmu.reports.distributions import DistributionError, decode_distribution


def encoded(values: list[int]) -> str:
    histogram = HdrHistogram(1, 1 << 20, 3)
    for value in values:
        histogram.record_value(value)
    return histogram.encode().decode("ascii")


LATENCIES = decode_distribution(encoded([1, 2, 2, 3, 50, 700, 700, 9000]))
CHARTS = {
    "bars": bars([Bar("page_fault", 12), Bar("halt", 3)], "exits"),
    "stacked": stacked([Bar("a", 1, "guest"), Bar("a", 2, "lock"), Bar("b", 3, "guest")], "cycles"),
    "lines": lines(
        [LinePoint(0, 1, "a"), LinePoint(1, 4, "a"), LinePoint(1, 2, "b")], "seconds", "per second"
    ),
    "percentiles": percentiles([("this", LATENCIES)], "exit latency, microseconds"),
    "density": density([("this", LATENCIES), ("other", LATENCIES)], "exit latency, microseconds"),
    "ratios": ratios([Bar("up", 3.0), Bar("down", 0.5)], "ratio", "more", "less"),
    "estimates": estimates([Estimate(1, 2, 1, 3), Estimate(2, 4, None, None)], "vCPUs", "cycles", x_log=True),
    "estimates by name": estimates(
        [Estimate("on", 2, 1, 3, "x"), Estimate("off", 4, 3, 5, "x")], "vpid", "cycles"
    ),
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS.keys())
def test_a_picture_is_complete_and_the_same_each_time(chart: Chart) -> None:
    svg = to_svg(chart)
    assert svg == to_svg(chart)
    root = ET.fromstring(svg)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 3
    assert "NaN" not in svg and "href" not in svg


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", PALETTE)
@pytest.mark.parametrize("ground, contrast", [("#ffffff", 2.2), ("#0d1117", 2.9)])
def test_every_colour_is_seen_by_day_and_by_night(colour: str, ground: str, contrast: float) -> None:
    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= contrast


def test_names_have_colours_of_their_own() -> None:
    spec = to_spec(stacked([Bar("a", 1, str(part)) for part in range(len(PALETTE))], "cycles"), "Cycles")
    assert len(set(spec["encoding"]["color"]["scale"]["range"])) == len(PALETTE)


def test_names_with_line_ends_do_not_reach_vegas_expressions() -> None:
    spec = to_spec(bars([Bar("a\u2028b\nc", 1)], "exits"), "Exits")
    assert spec["encoding"]["y"]["sort"] == ["a b c"]


def some(least: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, 1 << 14), min_size=1, max_size=50)


@settings(max_examples=30)  # the library walks through every bucket, in Python
@given(some(1))
def test_a_curve_is_that_of_the_histogram(values: list[int]) -> None:
    histogram = HdrHistogram.decode(encoded(values))
    curve = decode_distribution(encoded(values)).curve
    assert curve[0].percentile == 0.0
    assert curve[-1].percentile == 100.0
    assert curve[-1].value == histogram.get_value_at_percentile(100.0)
    assert [point.value for point in curve] == sorted(point.value for point in curve)
    for point in curve:
        at_most = sum(value <= point.value for value in values)
        assert at_most >= point.percentile / 100 * len(values) - 1e-6


@settings(max_examples=30)
@given(some(0))
def test_bins_share_all_values_among_them(values: list[int]) -> None:
    distribution = decode_distribution(encoded(values))
    assert distribution.count == len(values)
    assert sum(one.share for one in distribution.bins) == pytest.approx(1.0)
    assert all(one.low < one.high for one in distribution.bins)
    assert distribution.bins[0].low <= max(1, min(values))
    assert distribution.bins[-1].high > max(values)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))  # which the histogram does not round
def test_a_bin_has_the_share_of_the_values_within_it(values: list[int]) -> None:
    for one in decode_distribution(encoded(values)).bins:
        within = sum(one.low <= max(1, value) < one.high for value in values)
        assert one.share == pytest.approx(within / len(values))


@pytest.mark.parametrize("text", ["", "HISTOGRAM", "HISTFAAAACF42pNpmSzMwMDAxAAB", "\u2603" * 20])
def test_what_is_no_histogram_is_refused(text: str) -> None:
    with pytest.raises(DistributionError):
        decode_distribution(text)
