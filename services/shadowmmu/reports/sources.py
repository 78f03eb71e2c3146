"""From a path to a page: which kind of folder it is, and the page of that kind.

A folder of a run has report.json, one of a virtual-time run simulation.json, one of a sweep sweep.json.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Final

from shadowmmu.coordinator.report import REPORT_NAME
from shadowmmu.experiments.results import HEADER_NAME
from shadowmmu.experiments.simulation import SIMULATION_NAME
from shadowmmu.reports.errors import ReportError
from shadowmmu.reports.page import Page
from shadowmmu.reports.run_folder import read_run
from shadowmmu.reports.run_page import run_page
from shadowmmu.reports.simulation_page import read_simulation_folder, simulation_page
from shadowmmu.reports.sweep_page import read_sweep, sweep_page

__all__ = ["page_of"]


class _Kind(enum.Enum):
    """What a folder is of. The value stands in errors."""

    RUN = "a run"
    SIMULATION = "a virtual-time run"
    SWEEP = "a sweep"


_FILES: Final = {HEADER_NAME: _Kind.SWEEP, SIMULATION_NAME: _Kind.SIMULATION, REPORT_NAME: _Kind.RUN}


def page_of(path: Path, against: Path | None = None) -> Page:
    """The page of a folder, compared with another one of the same kind. Raises ReportError."""
    kind = _kind(path)
    if against is not None and (other := _kind(against)) is not kind:
        raise ReportError(
            f"{path} is the folder of {kind.value}, {against} of {other.value}: they cannot be compared"
        )
    match kind:
        case _Kind.RUN:
            return run_page(read_run(path), None if against is None else read_run(against))
        case _Kind.SIMULATION:
            other_one = None if against is None else read_simulation_folder(against)
            return simulation_page(read_simulation_folder(path), other_one)
        case _Kind.SWEEP:
            return sweep_page(read_sweep(path), None if against is None else read_sweep(against))


def _kind(path: Path) -> _Kind:
    try:
        if not path.is_dir():
            raise ReportError(f"{path} is not a folder" if path.exists() else f"there is no folder {path}")
        for name, kind in _FILES.items():
            if (path / name).exists():
                return kind
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    raise ReportError(f"{path} is no folder to report on: it has none of {', '.join(_FILES)}")
