"""The fewest inputs that reach what all of them reach, as far as a greedy choice finds them.

What is reached is counted by Python's own tracing (steps from one line to the next in our packages) and by the words that the
target returns: no atheris is needed.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, TypeAlias

from tests.fuzz.targets import runner

__all__ = ["reduced"]

Step: TypeAlias = tuple[str, int, int]


class _Tracer:
    """Collects the steps within functions of `shadowmmu`."""

    def __init__(self) -> None:
        self.steps: set[Step] = set()

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if event != "call" or "/shadowmmu/" not in name:
            return None
        last = frame.f_lineno
        steps = self.steps

        def line(frame: FrameType, _event: str, _argument: Any) -> Any:
            nonlocal last
            steps.add((name, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line


def reduced(target: str, inputs: list[bytes]) -> list[bytes]:
    """Those of the inputs that reach something that no shorter one does; without those that fail."""
    run = runner(target)
    reached: set[Step | str] = set()
    kept = []
    run(b"")
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        tracer = _Tracer()
        sys.settrace(tracer)
        try:
            words = run(data)
        except Exception:  # noqa: BLE001 - a finding: it belongs elsewhere
            continue
        finally:
            sys.settrace(None)
        new = tracer.steps.union(words or ()) - reached
        if new:
            reached |= new
            kept.append(data)
    return kept
