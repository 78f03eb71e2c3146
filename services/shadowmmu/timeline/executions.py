"""Runs that are executed again to be watched: a journal, a run in virtual time, a failing execution.

Each says what its time is and gives an observer every event with its time in nanoseconds of the timeline's axis. Where
there is no clock, the axis counts steps: one is a microsecond there, so that tools show something sensible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import msgspec

from shadowmmu.checker import Checker
from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.execution import failure_of
from shadowmmu.explorer.repro import Repro, replay_repro
from shadowmmu.explorer.world import StepLimitError, World
from shadowmmu.kvm import KvmError, Tracepoints
from shadowmmu.machine import JOURNAL_NAME, Header, Replayer, read_journal
from shadowmmu.machine.choices import ChoicesExhaustedError
from shadowmmu.machine.costs import Costs
from shadowmmu.machine.timed_config import TimedConfig
from shadowmmu.machine.virtual_time import StuckError, run_timed
from shadowmmu.protocol.events import Event
from shadowmmu.protocol.messages import RunConfig, Tdp
from shadowmmu.timeline.tracepoints import Traced, TracepointTexts

__all__ = [
    "Ending",
    "ExecutionError",
    "Execution",
    "JournalExecution",
    "Observer",
    "ReproExecution",
    "TimedExecution",
]

STEP: Final = 1000
"""Nanoseconds on the axis for a step of a scheduler."""
SLOWEST_GHZ: Final = 1e-3
FASTEST_GHZ: Final = 1e3
"""With clocks beyond these, times are no times any more."""
_STEPS: Final = "1 µs on the axis is 1 step of the scheduler: there is no other time"


OnTraced: TypeAlias = Callable[[int, Traced], None]
"""Gets a tracepoint with its time."""


class ExecutionError(Exception):
    """A run cannot be executed; the text says why."""


class Observer(Protocol):
    """Who watches an execution."""

    def event(self, time: int, event: Event, /) -> None:
        """The next event; `time` in nanoseconds of the axis."""

    def violation(self, time: int, text: str, /) -> None:
        """The event before broke a rule of coherence."""


class Ending(msgspec.Struct, frozen=True):
    """How an execution ended.

    `records`: the last record of the journal, 0 without one. `torn`: bytes of an unfinished last frame. `ended`: the
    run was over; if not, its process was killed. `divergence`: what was not as recorded, "" if all was; the events
    from some time before that on are not those of the run.
    """

    records: int = 0
    torn: int = 0
    ended: bool = True
    divergence: str = ""


class Execution(Protocol):
    """A run that can be watched.

    `title` names the virtual machine; `axis` says what the time is. `ordered`: times never decrease; if not, those of
    one vCPU or host thread do not. `tdp`: its tables of two-dimensional paging.
    """

    title: str
    axis: str
    tdp: Tdp | None

    @property
    def ordered(self) -> bool: ...

    def play(self, observer: Observer, traced: OnTraced | None = None) -> Ending:
        """Executes it, once; `traced` gets the tracepoints that are no events, in order among the events."""


def _title(config: RunConfig) -> str:
    mode = config.mode.value if config.tdp is None else config.tdp.value
    return f"virtual machine ({config.profile}, {mode}, {config.workload.value})"


class _Hits:
    """Tracepoints hit since some events were handed on, each with how many events there were before it."""

    def __init__(self, traced: OnTraced) -> None:
        self._traced = traced
        self._kept: deque[tuple[int, int, Traced]] = deque()

    def put(self, position: int, time: int, hit: Traced) -> None:
        """The next one."""
        self._kept.append((position, time, hit))

    def tell(self, position: int) -> None:
        """Those up to this many events are told."""
        while self._kept and self._kept[0][0] <= position:
            _, time, hit = self._kept.popleft()
            self._traced(time, hit)

    def end(self) -> None:
        """There are no more events: the rest is told."""
        for _, time, hit in self._kept:
            self._traced(time, hit)
        self._kept.clear()


class _Watch:
    """Notes at which step of the machine each event was emitted, and shows it to the observer when it is handed on.

    Tracepoints are kept until then too, so that they come among the events where they were hit.

    What others than the machine emit (the end of the run) counts as of the step that the machine is at.
    """

    def __init__(self, observer: Observer, checker: Checker | None, traced: OnTraced | None) -> None:
        self._observer = observer
        self._checker = checker
        self._hits = None if traced is None else _Hits(traced)
        self._steps: list[int] = []

    def join(self, run: Replayer) -> None:
        """The machine's events come this way from now on; to be called before its first step."""
        self._machine = machine = run.machine
        self._stream = run.events.emit
        run.events.flush()
        self.emit: Callable[[Event], None] = self._emit
        machine.connect(run.choices, self)
        if self._hits is not None:
            machine.kvm.tracepoints = TracepointTexts(self._hit)

    def _emit(self, event: Event) -> None:
        self._steps.append(self._machine.steps)
        self._stream(event)

    def _hit(self, hit: Traced) -> None:
        assert self._hits is not None
        self._hits.put(len(self._steps), self._machine.steps * STEP, hit)

    def listen(self, first: int, events: list[Event], _data: bytes) -> None:
        """The stream's listener."""
        violation = None if self._checker is None else self._checker.feed_all(events)
        at = -1 if violation is None else violation.event_index - first
        steps, self._steps = self._steps, []
        if len(steps) < len(events):
            steps += [self._machine.steps] * (len(events) - len(steps))
        tell, hits = self._observer.event, self._hits
        for index, (step, event) in enumerate(zip(steps, events, strict=True)):
            if hits is not None:
                hits.tell(index)
            tell(step * STEP, event)
            if index == at:
                self._observer.violation(step * STEP, str(violation))
                self._checker = None
        if hits is not None:
            hits.tell(len(events))

    def end(self) -> None:
        """There are no more events."""
        if self._hits is not None:
            self._hits.end()


class JournalExecution:
    """The run in a folder, from its journal.

    `check`: its coherence is checked on the way. Raises JournalError, or OSError if there is none.
    """

    ordered: Final = True

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self._path = folder / JOURNAL_NAME
        self._check = check
        with self._path.open("rb") as source:
            header = next(iter(read_journal(source)))
        assert isinstance(header, Header)  # the reader sees to it
        self.title = _title(header.config)
        self.axis = _STEPS
        self.tdp = header.config.tdp

    def play(self, observer: Observer, traced: OnTraced | None = None) -> Ending:
        """Executes it up to its end, or to where it is seen to be another.

        Raises JournalError, ExecutionError or OSError.
        """
        with self._path.open("rb") as source:
            journal = read_journal(source)
            records = iter(journal)
            header = next(records)
            assert isinstance(header, Header)
            watch = _Watch(observer, Checker() if self._check else None, traced)
            run = self._replayer(header, watch)
            watch.join(run)
            number, difference = 0, None
            for number, record in enumerate(records, start=1):
                try:
                    difference = run.consume(number, record)
                except ChoicesExhaustedError as error:
                    difference = str(error)
                if difference is not None:
                    break
            run.events.flush()
            watch.end()
        divergence = "" if difference is None else f"at record {number}: {difference}"
        return Ending(number, journal.torn, journal.ended, divergence)

    @staticmethod
    def _replayer(header: Header, watch: _Watch) -> Replayer:
        try:
            return Replayer(header, (watch.listen,))
        except KvmError as error:
            raise ExecutionError(f"the journal's configuration: {error}") from error


class TimedExecution:
    """A run in virtual time, on processors of `ghz` cycles per nanosecond.

    `digest`: of the result that it had; another one is a divergence. `check`: its coherence is checked on the way.
    Raises ExecutionError if no processor has such a clock rate.
    """

    ordered: Final = False

    def __init__(
        self, config: TimedConfig, costs: Costs, ghz: float, *, digest: str | None = None, check: bool = True
    ) -> None:
        if not SLOWEST_GHZ <= ghz <= FASTEST_GHZ:
            raise ExecutionError(f"a clock of {ghz:g} GHz")
        self._config = config
        self._costs = costs
        self._ghz = ghz
        self._digest = digest
        self._check = check
        self.title = _title(config.run)
        self.axis = f"virtual time, of processors of {ghz:g} GHz"
        self.tdp = config.run.tdp

    def play(self, observer: Observer, traced: OnTraced | None = None) -> Ending:
        """Executes it. Raises ExecutionError."""
        ghz = self._ghz
        checker = Checker() if self._check else None

        def heard(cycles: int, event: Event) -> None:
            nonlocal checker
            time = int(cycles / ghz)
            observer.event(time, event)
            if checker is not None and (violation := checker.feed(event)) is not None:
                observer.violation(time, str(violation))
                checker = None

        def tracepoints(now: Callable[[], int]) -> Tracepoints:
            assert traced is not None
            return TracepointTexts(lambda hit: traced(int(now() / ghz), hit))

        try:
            result = run_timed(self._config, self._costs, heard, None if traced is None else tracepoints)
        except (KvmError, StuckError, ValueError) as error:
            raise ExecutionError(str(error)) from error
        if self._digest not in (None, result.digest):
            return Ending(divergence=f"its result has digest {result.digest}, not {self._digest}")
        return Ending()


class ReproExecution:
    """A failing execution. Raises ReproError if its scenario cannot be set up any more."""

    ordered: Final = True

    def __init__(self, repro: Repro) -> None:
        replayed = replay_repro(repro)
        self._repro = repro
        self._schedule = replayed.followed.ending.schedule
        self._divergence = "" if replayed.failure is not None else replayed.sameness.value
        self.title = f"virtual machine ({repro.profile}, {repro.scenario.name})"
        self.axis = _STEPS
        self.tdp = repro.scenario.machine.tdp

    def play(self, observer: Observer, traced: OnTraced | None = None) -> Ending:
        """Executes it."""
        steps = 0
        hits = None if traced is None else _Hits(traced)

        def heard(_actor: int, events: list[Event]) -> None:
            for index, event in enumerate(events):
                if hits is not None:
                    hits.tell(index)
                observer.event(steps * STEP, event)
            if hits is not None:
                hits.tell(len(events))

        def tracepoints(events: Sized) -> Tracepoints:
            assert hits is not None
            return TracepointTexts(lambda hit: hits.put(len(events), steps * STEP, hit))

        world = World(
            self._repro.scenario,
            self._repro.profile,
            heard,
            tracepoints=None if traced is None else tracepoints,
        )
        choose = FollowChooser(self._schedule).choose
        try:
            while enabled := world.enabled():
                steps += 1
                world.step(choose(enabled))
            world.end()
        except StepLimitError as error:
            observer.violation(steps * STEP, str(error))
        else:
            if hits is not None:
                hits.end()
            failure = failure_of(world)
            if failure is not None:
                observer.violation(steps * STEP, str(failure.violation or failure.text))
        return Ending(divergence=self._divergence)
