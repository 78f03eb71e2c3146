"""Starts and ends runs, aggregates and reports.

`Coordinator` conducts a run of processes; `RunReport` is what comes of it, `render_report` shows it to people.
"""

from shadowmmu.coordinator.report import RunReport, decode_report, encode_report, write_report
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import RunSettings
from shadowmmu.coordinator.service import Coordinator
from shadowmmu.coordinator.tables import render_report

__all__ = [
    "Coordinator",
    "RunSettings",
    "RunReport",
    "write_report",
    "encode_report",
    "decode_report",
    "render_report",
    "RunState",
]
