"""A run as a timeline: for Perfetto, and as the kernel's own tracing prints it.

    execution = JournalExecution(folder)            # or TimedExecution(...), ReproExecution(...)
    with path.open("wb") as out:
        write_ftrace(execution, out)                # text, as /sys/kernel/tracing/trace has it
        perfetto.write_perfetto(execution, out)     # the extra `trace`; opened by ui.perfetto.dev

    Timeline(sink, title, axis)                     # events in, tracks with slices, flows and counters out

Runs are executed again to be watched: nothing but journals and configurations is stored. docs/TRACE.md says what the
files have in them. Relies on `shadowmmu.machine` and `shadowmmu.explorer` (executing), `shadowmmu.checker` and
`shadowmmu.protocol` (events).
"""

from shadowmmu.timeline.executions import (
    Ending,
    Execution,
    ExecutionError,
    JournalExecution,
    Observer,
    ReproExecution,
    TimedExecution,
)
from shadowmmu.timeline.ftrace import write_ftrace
from shadowmmu.timeline.timeline import Timeline, build
from shadowmmu.timeline.window import ALL, Records

__all__ = [
    "Execution",
    "JournalExecution",
    "TimedExecution",
    "ReproExecution",
    "Ending",
    "ExecutionError",
    "Observer",
    "write_ftrace",
    "Records",
    "ALL",
    "Timeline",
    "build",
]
