"""Sweeps whose runs are made by `stub_child`, and the command line."""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowmmu.experiments.engine import SweepResult, Workplace, local_workplace, run_sweep
from shadowmmu.experiments.folder import SweepWriter
from shadowmmu.experiments.spec import SweepSpec, parse_spec

STUB = (sys.executable, "-m", "tests.experiments.stub_child")


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find `tests`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def spec_of(text: str) -> SweepSpec:
    """An experiment of kind explore, to which `text` is added."""
    return parse_spec('title = "A sweep"\nkind = "explore"\n' + text, "sweep.toml")


@functools.cache
def _stub_workplace() -> Workplace:
    """One for all tests: starting children takes longer than their runs."""
    place = local_workplace(2, STUB)
    atexit.register(place.__exit__, None, None, None)
    return place.__enter__()


def stub_sweep(
    folder: Path,
    spec: SweepSpec,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> SweepResult:
    """Goes on with the sweep in a folder, by the stub."""
    place = _stub_workplace()._replace(window=jobs)
    with SweepWriter(folder, spec, "0.1.0") as writer:
        return run_sweep(writer, place, retry_failed=retry_failed, limit=limit, stopped=stopped)
