"""A run executed again from its journal, without processes, sockets or chance.

The machine gets the recorded inputs and choices in the recorded order; it must give the same events. Where it does
not, the code has changed since, or it is not deterministic: the digests in the journal say from which thousand
records on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from shadowmmu.machine.choices import ChoicesExhaustedError, RecordedChoices
from shadowmmu.machine.event_stream import EventListener, EventStream
from shadowmmu.machine.journal import (
    Admission,
    Attached,
    Digest,
    End,
    GivenUp,
    Header,
    HostAsked,
    HostAttached,
    HostEnded,
    JournalError,
    Record,
    Recovered,
    Steps,
    VcpuSent,
    read_journal,
)
from shadowmmu.machine.machine import Machine, Output
from shadowmmu.machine.snapshot import RunnerState
from shadowmmu.machine.state_dump import dump_state
from shadowmmu.protocol.events import NoProgress, RunEnded

__all__ = ["JOURNAL_NAME", "ReplayResult", "Replayer", "replay", "replay_records"]

JOURNAL_NAME = "journal"
"""The journal's file in a run's folder."""


class ReplayResult(msgspec.Struct, frozen=True):
    """What a replay found.

    `records`: the number of the last record executed. `digest`: of the events they gave. `recorded_digest`: what the
    journal's end says; None if the run did not end in order, or the replay stopped before. `diverged_at`: the record
    at which it was seen that the replay differs. `state`: the machine's state, if asked to stop at a record. `torn`:
    the bytes of an unfinished last frame, which counts for nothing.
    """

    records: int
    digest: str
    recorded_digest: str | None
    diverged_at: int | None
    divergence: str = ""
    state: dict[str, object] | None = None
    torn: int = 0


class Replayer:
    """A machine that consumes the records of a journal; `machine` is for reading.

    It begins with a header, or as a snapshot says. `on_output` gets what the machine leaves, in order.
    """

    def __init__(
        self,
        begin: Header | RunnerState,
        listeners: tuple[EventListener, ...] = (),
        on_output: Callable[[Output], object] = lambda _output: None,
    ) -> None:
        self.choices = RecordedChoices()
        self.recorded_digest: str | None = None
        self._on_output = on_output
        if isinstance(begin, Header):
            self.events = EventStream(*listeners)
            self.machine = Machine(begin.config, self.choices, self.events)
        else:
            self.events = EventStream(*listeners, count=begin.events, digest=begin.stream_digest)
            self.machine = begin.machine
            self.machine.connect(self.choices, self.events)

    def consume(self, number: int, record: Record) -> str | None:
        """Executes a record; says what differs, or None."""
        match record:
            case Attached() | GivenUp() | VcpuSent() | HostAsked() | Admission():
                self.machine.submit(record, number)
            case HostAttached() | HostEnded():
                pass
            case Steps():
                self.choices.load(record.choices)
                for done in range(record.count):
                    if not self.machine.step():
                        return f"after {done} of {record.count} steps nothing was ready"
                self.events.flush()
            case Digest() | Recovered():
                return self._compare(record.events, record.events_digest)
            case End():
                if record.stuck:
                    self.events.emit(NoProgress(self.machine.waiting()))
                self.events.emit(RunEnded(number))
                self.recorded_digest = record.events_digest
                return self._compare(record.events, record.events_digest)
            case Header():
                raise JournalError(f"record {number}: a second header")
        for output in self.machine.outputs:
            self._on_output(output)
        self.machine.outputs.clear()
        return None

    def _compare(self, events: int, digest: str) -> str | None:
        self.events.flush()
        if (self.events.count, self.events.digest()) == (events, digest):
            return None
        return (
            f"{self.events.count} events with digest {self.events.digest()}, recorded: {events} with {digest}"
        )


def replay_records(records: Iterable[Record], until: int | None, *listeners: EventListener) -> ReplayResult:
    """Replays records, the header first, up to record number `until` (None: all).

    Raises JournalError if they are not a journal.
    """
    source = iter(records)
    header = next(source, None)
    if not isinstance(header, Header):
        raise JournalError("record 0: a header is expected")
    run = Replayer(header, listeners)
    number = 0
    diverged_at, divergence = None, ""
    for number, record in enumerate(source, start=1):
        if until is not None and number > until:
            number -= 1  # noqa: PLW2901 - the record is not executed
            break
        try:
            difference = run.consume(number, record)
        except ChoicesExhaustedError as error:
            difference = str(error)
        if difference is not None:
            diverged_at, divergence = number, difference
            break
    run.events.flush()
    return ReplayResult(
        records=number,
        digest=run.events.digest(),
        recorded_digest=run.recorded_digest,
        diverged_at=diverged_at,
        divergence=divergence,
        state=None if until is None else dump_state(run.machine),
    )


def replay(directory: Path, until: int | None, *listeners: EventListener) -> ReplayResult:
    """Replays the journal in a run's folder. Raises JournalError, or OSError if there is none."""
    with (directory / JOURNAL_NAME).open("rb") as source:
        journal = read_journal(source)
        result = replay_records(journal, until, *listeners)
        return msgspec.structs.replace(result, torn=journal.torn)
