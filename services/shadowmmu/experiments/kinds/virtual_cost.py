"""Runs in virtual time, and how long the simulator takes for them by the wall clock.

What is measured is this machine, so points run one at a time; the rest is as in `virtual`.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping

from shadowmmu.experiments.kinds.virtual import VirtualKind
from shadowmmu.experiments.values import Metric, Value

__all__ = ["VirtualCostKind"]


class VirtualCostKind(VirtualKind):
    """The metrics of `virtual`, and `wall_seconds`, `processor_seconds`, `cores`, `python`.

    Wall-clock seconds are longer than those of the processor where other programs run beside this one.
    """

    title = "run in virtual time, and what it takes by the wall clock"
    repeatable = False

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """As for `virtual`."""
        started, used = time.perf_counter(), time.process_time()
        metrics = super().run(values, seed)
        return metrics | {
            "wall_seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - used,
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        }
