"""The virtual machine as a pure state machine: scheduler, lanes, journal, replay, runs in one process.

    runner = Runner(config, journal.write, on_events)     # a machine with its journal
    runner.submit(VcpuSent(0, Exit(...)))                 # an input is journalled, then consumed
    runner.step(256)                                      # host operations, walks and stores advance, by seeded choice
    runner.take_outputs()                                 # messages for vCPUs and answers for the host agent

    run_in_process(config, 4, journal.write, on_events)   # a whole run, without sockets, repeatable to the digest
    replay(directory, None, on_events)                    # a run again, from its journal
    Recovery(file, snapshots, on_events)                  # a run that goes on, after its service was killed

Relies on `shadowmmu.kvm` (host operations), `shadowmmu.cpu` (the hardware walk, vCPU cores) and `shadowmmu.protocol`.
"""

from shadowmmu.machine.event_stream import EventSink
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.machine.inprocess import InProcessResult, boot_inputs, run_in_process
from shadowmmu.machine.journal import (
    Admission,
    Attached,
    EmptyJournalError,
    GivenUp,
    Header,
    HostAsked,
    HostAttached,
    HostEnded,
    Input,
    JournalError,
    Note,
    Record,
    VcpuSent,
    read_journal,
)
from shadowmmu.machine.machine import HostDone, HostRefused, Machine, Output, ToVcpu
from shadowmmu.machine.recovery import Recovery
from shadowmmu.machine.replay import JOURNAL_NAME, Replayer, ReplayResult, replay, replay_records
from shadowmmu.machine.runner import Runner
from shadowmmu.machine.task import Stop, Task
from shadowmmu.machine.vm_config import kvm_config, welcome

__all__ = [
    # A machine that somebody drives.
    "Runner",
    "Machine",
    "Input",
    "Attached",
    "GivenUp",
    "VcpuSent",
    "HostAsked",
    "Admission",
    "Note",
    "HostAttached",
    "HostEnded",
    "Output",
    "ToVcpu",
    "HostDone",
    "HostRefused",
    "Task",
    "Stop",
    "EventSink",
    "welcome",
    "kvm_config",
    # Whole runs.
    "run_in_process",
    "InProcessResult",
    "boot_inputs",
    "HostProgram",
    # Journals.
    "replay",
    "replay_records",
    "ReplayResult",
    "Replayer",
    "read_journal",
    "JOURNAL_NAME",
    "JournalError",
    "EmptyJournalError",
    "Recovery",
    "Record",
    "Header",
]
