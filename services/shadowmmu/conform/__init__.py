"""Replaying recordings of the real shadow MMU against the model, comparing every field of every operation.

`run_trace` replays one recording and reports the first mismatch; `conform_files` many; `render` makes a report text.
"""

from shadowmmu.conform.recording import BadRecordingError, Header, Recording, read_recording
from shadowmmu.conform.report import Mismatch, TraceReport, conform_files, render, run_trace
from shadowmmu.conform.runner import Runner, drive

__all__ = [
    "run_trace",
    "conform_files",
    "render",
    "TraceReport",
    "Mismatch",
    "read_recording",
    "Recording",
    "Header",
    "BadRecordingError",
    "Runner",
    "drive",
]
