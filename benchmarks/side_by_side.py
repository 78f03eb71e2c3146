"""The model's speed against that of an earlier commit, measured in turns in one run.

Each measurement is a process of its own whose import path begins with the source roots of one of the two trees; the
earlier one is unpacked from git. Measuring in turns keeps what else the machine does from favouring one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Figure

__all__ = ["model_against"]

HERE = Path(__file__).resolve().parents[1]
ROOTS = ("protocol", "services", "workers")
MEASURE = "from benchmarks.model import page_faults; print(page_faults(1).median)"


def _unpack(revision: str, directory: Path) -> None:
    archive = subprocess.run(["git", "archive", revision], cwd=HERE, stdout=subprocess.PIPE, check=True)  # noqa: S607
    subprocess.run(["tar", "-x"], cwd=directory, input=archive.stdout, check=True)  # noqa: S607


def _measure(tree: Path) -> float:
    path = os.pathsep.join([*(str(tree / root) for root in ROOTS), str(tree)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def model_against(revision: str, runs: int) -> list[Figure]:
    """Page faults per second here and at `revision`, and the ratio of each pair of measurements.

    Raises subprocess.CalledProcessError if there is no such revision, or its model cannot be measured like this one.
    """
    now: list[float] = []
    then: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        _unpack(revision, tree)
        for turn in range(runs):
            order = [(HERE, now), (tree, then)]
            for place, values in order if turn % 2 else reversed(order):
                values.append(_measure(place))
    return [
        Figure("page faults of the model alone, here", "1/s", now),
        Figure(f"the same at {revision}", "1/s", then),
        Figure(f"here / {revision}", "ratio", [a / b for a, b in zip(now, then, strict=True)], aim=0.9),
    ]
