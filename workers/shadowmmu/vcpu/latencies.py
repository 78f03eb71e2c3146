"""Latency histograms as they go into a Report."""

from __future__ import annotations

from hdrh.histogram import HdrHistogram

__all__ = ["Latencies"]

LOWEST_US = 1
HIGHEST_US = 60_000_000
SIGNIFICANT_DIGITS = 3


class Latencies:
    """Microseconds, from 1 us to 60 s in three digits; what lies outside counts as the nearest of the two."""

    __slots__ = ("_histogram",)

    def __init__(self) -> None:
        self._histogram = HdrHistogram(LOWEST_US, HIGHEST_US, SIGNIFICANT_DIGITS)

    def record(self, seconds: float) -> None:
        """One more latency."""
        self._histogram.record_value(min(max(int(seconds * 1e6), LOWEST_US), HIGHEST_US))

    @property
    def count(self) -> int:
        return self._histogram.get_total_count()

    def encoded(self) -> str:
        """HdrHistogram's V2 encoding, base64."""
        return self._histogram.encode().decode("ascii")
