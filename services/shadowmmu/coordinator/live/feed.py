"""What the live page's clients get, made a few times per second at most, however many there are and however slow.

A client that reads slowly misses states in between and gets the latest; the run waits for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import msgspec

from shadowmmu.coordinator.live.metrics import encode_metrics
from shadowmmu.coordinator.live.observation import Observation
from shadowmmu.coordinator.series import Sample

__all__ = ["Feed"]

UPDATE_SECONDS: Final = 0.5
"""Between two states that a client gets."""
FRESH_SECONDS: Final = 0.2
"""How long an answer may be given again."""


class Feed:
    """`observe` looks at the run, `samples` gives the series so far."""

    def __init__(self, observe: Callable[[], Observation], samples: Callable[[], list[Sample]]) -> None:
        self._observe = observe
        self._samples = samples
        self._closed = asyncio.Event()
        self._made: dict[str, tuple[float, bytes, str]] = {}

    def close(self) -> None:
        """The run is over: whoever listens gets its last state, and no more."""
        self._made.clear()
        self._closed.set()

    def state(self) -> bytes:
        """The run now: a `LiveRun` as JSON."""
        return self._fresh("state", self._make_state)[0]

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics now, and their content type."""
        openmetrics = "application/openmetrics-text"
        accept = openmetrics if openmetrics in accept else "text/plain"
        return self._fresh(accept, lambda: encode_metrics(self._observe(), accept))

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: `series` (the samples so far), then `state` again and again, at last `end`."""
        yield _event("series", msgspec.json.encode(self._samples()))
        closed = False
        while not closed:
            closed = self._closed.is_set()
            yield _event("state", self.state())
            if not closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(UPDATE_SECONDS):
                        await self._closed.wait()
        yield _event("end", b"{}")

    def _make_state(self) -> tuple[bytes, str]:
        return msgspec.json.encode(self._observe().run), "application/json"

    def _fresh(self, what: str, make: Callable[[], tuple[bytes, str]]) -> tuple[bytes, str]:
        now = time.monotonic()
        made = self._made.get(what)
        if made is None or now - made[0] >= FRESH_SECONDS:
            made = self._made[what] = (now, *make())
        return made[1:]


def _event(name: str, data: bytes) -> bytes:
    """JSON has no line breaks of its own, so an event's data is one line."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
