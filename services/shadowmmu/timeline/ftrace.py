"""A run in the text form of the kernel's own tracing: the lines that ftrace prints for KVM's tracepoints.

Groups `kvmmmu` and `kvm`, from the events and from the tracepoints that are no events (`tracepoints`); names and text
as a kernel of today prints them, without the fields that 3.1 does not have. Which fields hold what is in docs/TRACE.md.
The tracepoints of 3.1 are in arch/x86/kvm/mmutrace.h and trace.h. A task is a vCPU's thread (`vcpu-N`, on CPU N) or one
of the host agent's (`host-N`, on CPU 256 + N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, Final

from shadowmmu.protocol import events as ev
from shadowmmu.protocol.messages import Tdp
from shadowmmu.timeline.bookkeeping import HostThreads, Pages
from shadowmmu.timeline.executions import Ending, Execution
from shadowmmu.timeline.ftrace_exits import exit_text
from shadowmmu.timeline.sorter import Sorter
from shadowmmu.timeline.tracepoints import Traced, page_text
from shadowmmu.timeline.window import ALL, Records

__all__ = ["FtraceLines", "header", "write_ftrace"]

_PID: Final = 1000
_HOST_PID: Final = 2000
_HOST_CPU: Final = 256
_SELF: Final = ("shadowmmu", 1, 0)
"""The task that notes what was found."""

_PLAIN: Final = "....."
_LOCKED: Final = "...1."  # preemption is off under a spinlock
_ENTRY: Final = "d..1."  # and interrupts, right before an entry

_HEADER: Final = """\
# tracer: nop
#
# entries-in-buffer/entries-written: {numbers}
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""


def header(lines: int, cpus: int) -> str:
    """What stands before the lines; always of one length, so that it can be written before their number is known."""
    return _HEADER.format(numbers=f"{lines}/{lines}   #P:{cpus}".ljust(40))


class FtraceLines:
    """Takes the events of a run and the tracepoints among them, in order; `put` gets a time in nanoseconds and a line.

    `tdp` NPT: exits have the names of AMD's processors, else of Intel's. Lines are put of what follows from `records`.
    The line of an exit that writes a register comes when it is known which, with the exit's time: whoever writes the
    lines has to sort them. `cpus` counts the processors that the lines name.
    """

    def __init__(self, put: Callable[[int, str], object], tdp: Tdp | None, records: Records = ALL) -> None:
        self._put = put
        self._tdp = tdp
        self._now = 0
        self._pages = Pages()
        self._threads = HostThreads()
        self._operations: dict[int, tuple[int, int]] = {}  # (vCPU, thread) by number
        self._holder: tuple[int, int] | None = None
        self._injected: dict[int, int] = {}  # error code, by vCPU, for its next entry
        self._register_exits: dict[int, tuple[int, ev.Exited]] = {}  # with their times, by vCPU
        self._cpus: set[int] = set()
        self._records = records
        self._muted = not records.has(0)
        self._handlers: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.InputConsumed: self._input_consumed,
            ev.Entered: self._entered,
            ev.Exited: self._exited,
            ev.Injected: self._inject,
            ev.OperationStarted: self._operation_started,
            ev.OperationEnded: self._operation_ended,
            ev.LockTaken: self._lock_taken,
            ev.LockReleased: self._lock_released,
            ev.ShadowPageCreated: self._pages.created,
            ev.ShadowPageUnsynced: self._unsynced,
            ev.ShadowPageSynced: self._synced,
            ev.ShadowPageZapped: self._zapped,
            ev.PagingRegisters: lambda event: self._register_exit(event.vcpu, event.register),
            ev.MmioAccess: self._mmio,
            ev.AuditFailed: lambda event: self._mark(f"audit failed: {event.check}: {event.text}"),
            ev.NoProgress: lambda event: self._mark(f"no progress: {'; '.join(event.waiting)}"),
        }

    @property
    def cpus(self) -> int:
        """How many processors the lines name."""
        return len(self._cpus)

    def event(self, time: int, event: ev.Event) -> None:
        """The next event, at `time` in nanoseconds."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            self._now = time
            handler(event)

    def traced(self, time: int, hit: Traced) -> None:
        """The next tracepoint, at `time` in nanoseconds."""
        self._now = time
        if hit.vcpu is None:
            self._locked_line(hit.text)
        else:
            self._vcpu_line(hit.vcpu, hit.text)

    def violation(self, time: int, text: str) -> None:
        """The event before broke a rule of coherence."""
        self._now = time
        self._mark(f"violation: {text}")

    def _line(self, task: tuple[str, int, int], flags: str, text: str) -> None:
        if self._muted:
            return
        name, pid, cpu = task
        self._cpus.add(cpu)
        seconds, micros = divmod(self._now // 1000, 1_000_000)
        self._put(self._now, f"{name:>16}-{pid:<7d} [{cpu:03d}] {flags} {seconds:5d}.{micros:06d}: {text}\n")

    def _mark(self, text: str) -> None:
        """As user space writes to trace_marker."""
        self._line(_SELF, _PLAIN, f"tracing_mark_write: {' '.join(text.split())}")

    def _vcpu_line(self, vcpu: int, text: str, flags: str = _PLAIN) -> None:
        self._line((f"vcpu-{vcpu}", _PID + vcpu, vcpu), flags, text)

    def _locked_line(self, text: str) -> None:
        """Under mmu_lock: its holder's task."""
        vcpu, thread = (-1, 0) if self._holder is None else self._holder
        if vcpu >= 0:
            self._vcpu_line(vcpu, text, _LOCKED)
        else:
            self._line((f"host-{thread}", _HOST_PID + thread, _HOST_CPU + thread), _LOCKED, text)

    def _input_consumed(self, event: ev.InputConsumed) -> None:
        self._muted = not self._records.has(event.record)

    # --- group kvm -----------------------------------------------------------------------------------------------

    def _entered(self, event: ev.Entered) -> None:
        self._pages.entered(event)
        error_code = self._injected.pop(event.vcpu, None)
        if error_code is not None:
            self._vcpu_line(event.vcpu, f"kvm_inj_exception: #PF (0x{error_code:x})", _ENTRY)
        self._vcpu_line(event.vcpu, f"kvm_entry: vcpu {event.vcpu}", _ENTRY)

    def _exited(self, event: ev.Exited) -> None:
        if event.reason == "register_write":
            if not self._muted:
                self._register_exits[event.vcpu] = self._now, event
            return
        self._exit_line(event)
        if event.reason == "page_fault":
            self._vcpu_line(
                event.vcpu,
                f"kvm_page_fault: vcpu {event.vcpu} address 0x{event.gva:016x} error_code 0x{event.error_code:x}",
            )

    def _exit_line(self, event: ev.Exited, register: str = "") -> None:
        text = exit_text(event, self._tdp, register)
        self._vcpu_line(
            event.vcpu,
            f"kvm_exit: vcpu {event.vcpu} reason {text.reason} rip 0x0 "
            f"info1 0x{text.info1:016x} info2 0x{text.info2:016x}",
        )

    def _register_exit(self, vcpu: int, register: str) -> None:
        """It is known which register the vCPU's exit writes, or ("") that none is written."""
        waiting = self._register_exits.pop(vcpu, None)
        if waiting is not None:
            now, muted, self._muted = self._now, self._muted, False
            self._now, event = waiting
            self._exit_line(event, register)
            self._now, self._muted = now, muted

    def end(self) -> None:
        """There are no more events."""
        for vcpu in list(self._register_exits):
            self._register_exit(vcpu, "")

    def _inject(self, event: ev.Injected) -> None:
        self._injected[event.vcpu] = event.error_code

    def _mmio(self, event: ev.MmioAccess) -> None:
        kind = "write" if event.write else "unsatisfied-read"
        self._vcpu_line(event.vcpu, f"kvm_mmio: mmio {kind} len {event.size} gpa 0x{event.gpa:x} val 0x0")

    # --- host operations -----------------------------------------------------------------------------------------

    def _operation_started(self, event: ev.OperationStarted) -> None:
        self._operations[event.op] = event.vcpu, self._threads.take() if event.vcpu < 0 else -1

    def _operation_ended(self, event: ev.OperationEnded) -> None:
        vcpu, thread = self._operations.pop(event.op)
        self._register_exit(vcpu, "")
        if thread >= 0:
            self._threads.give_back(thread)

    def _lock_taken(self, event: ev.LockTaken) -> None:
        self._holder = self._operations[event.op]

    def _lock_released(self, _event: ev.LockReleased) -> None:
        self._holder = None

    # --- group kvmmmu --------------------------------------------------------------------------------------------

    def _page_line(self, name: str, sp: int) -> None:
        page = self._pages.page(sp)
        text = page_text(page.gfn, page.role, self._pages.root_count(sp), unsync=page.unsync)
        self._locked_line(f"{name}: {text}")

    # The kernel traces these three before it changes the page.

    def _unsynced(self, event: ev.ShadowPageUnsynced) -> None:
        self._page_line("kvm_mmu_unsync_page", event.sp)
        self._pages.unsynced(event)

    def _synced(self, event: ev.ShadowPageSynced) -> None:
        self._page_line("kvm_mmu_sync_page", event.sp)
        self._pages.synced(event)

    def _zapped(self, event: ev.ShadowPageZapped) -> None:
        self._page_line("kvm_mmu_prepare_zap_page", event.sp)
        self._pages.zapped(event)


def write_ftrace(execution: Execution, out: BinaryIO, records: Records = ALL) -> Ending:
    """Executes the run and writes its lines to a file that can be written from its beginning again.

    Raises what the execution raises.
    """
    written = 0

    def write(line: str) -> None:
        nonlocal written
        written += 1
        out.write(line.encode())

    out.write(header(0, 0).encode())
    sorter = Sorter(write)
    lines = FtraceLines(sorter.put, execution.tdp, records)
    ending = execution.play(lines, lines.traced)
    lines.end()
    sorter.end()
    out.seek(0)
    out.write(header(written, lines.cpus).encode())
    return ending
