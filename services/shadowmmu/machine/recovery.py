"""A run that goes on after its service was killed: from the newest usable snapshot, or else the header, by replay.

The records are executed a few at a time, so that whoever recovers can do something else in between. It hears every
input and output on the way, and so comes to know again what it had told whom. At the end there is a runner that appends
to the journal, once that has been cut off at `position`.

Relies on the replay; does no I/O but reading the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import BinaryIO, TypeAlias

from shadowmmu.machine.choices import ChoicesExhaustedError, SeededChoices
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.machine.journal import (
    DIGEST_INTERVAL,
    Digest,
    End,
    Header,
    Input,
    JournalError,
    JournalPosition,
    JournalReader,
    Note,
    Record,
    Recovered,
    Steps,
)
from shadowmmu.machine.machine import Output
from shadowmmu.machine.replay import Replayer
from shadowmmu.machine.runner import Runner
from shadowmmu.machine.snapshot import RunnerState, Snapshot, SnapshotError
from shadowmmu.protocol.messages import RunConfig

__all__ = ["Recovery"]

Consumed: TypeAlias = Input | Note


class Recovery:
    """The recovery of a run from its journal.

    `journal` is the file, which is not changed. `snapshots` are files of snapshots, the newest first; one that cannot
    be used is left out, for which `skipped` has the reasons. `events_from`: somebody wants all events from that number
    on, so that a later snapshot would be of no use; None if nobody misses any. `listeners` hear the events, each under
    the number that it had. `on_input` gets what was consumed, before the machine consumes it, and `on_output` what came
    of it.

    `service` is what the service has put into the snapshot, None without one. Raises JournalError if the journal
    cannot be used (EmptyJournalError: nothing had happened yet).
    """

    def __init__(
        self,
        journal: BinaryIO,
        snapshots: Iterable[bytes] = (),
        *listeners: EventListener,
        events_from: int | None = None,
        on_input: Callable[[Consumed], object] = lambda _item: None,
        on_output: Callable[[Output], object] = lambda _output: None,
    ) -> None:
        self._on_input = on_input
        self._listeners = listeners
        self.skipped: list[str] = []
        self.service: bytes | None = None
        snapshot = self._choose(journal, snapshots, events_from)
        if snapshot is None:
            self._reader = JournalReader(journal)
            self._records = iter(self._reader)
            header = next(self._records)
            assert isinstance(header, Header)
            self._replayer = Replayer(header, listeners, on_output)
            self._number = 1
            self._digest_due = DIGEST_INTERVAL
        else:
            state = snapshot.restore()
            self.service = snapshot.service
            self._reader = JournalReader(journal, state.position)
            self._records = iter(self._reader)
            self._replayer = Replayer(state, listeners, on_output)
            self._number = state.position.record
            self._digest_due = state.digest_due
        self.first_record = self._number
        self._done = False

    def _choose(
        self, journal: BinaryIO, snapshots: Iterable[bytes], events_from: int | None
    ) -> Snapshot | None:
        for data in snapshots:
            try:
                snapshot = Snapshot.decode(data)
                JournalReader(journal, snapshot.position).check()
            except (SnapshotError, JournalError) as error:
                self.skipped.append(str(error))
                continue
            if events_from is None or snapshot.events <= events_from:
                return snapshot
            self.skipped.append(f"events from {events_from} on are wanted; it was taken at {snapshot.events}")
        return None

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return self._replayer.machine.config

    @property
    def records(self) -> int:
        """The number of the next record: how far the recovery has come."""
        return self._number

    @property
    def ended(self) -> bool:
        """The run had ended in order: there is nothing to go on with. Known at the end."""
        return self._reader.ended

    @property
    def position(self) -> JournalPosition:
        """Where the journal is to be cut off. Known at the end."""
        return self._reader.position

    @property
    def torn(self) -> int:
        """The bytes that are cut off. Known at the end."""
        return self._reader.torn

    def advance(self, records: int) -> bool:
        """Executes up to `records` records; False at the end.

        Raises JournalError if the journal is damaged, or what happens is not what was recorded.
        """
        for _ in range(records):
            record = next(self._records, None)
            if record is None:
                self._finish()
                return False
            self._execute(record)
            self._number += 1
        return True

    def _execute(self, record: Record) -> None:
        number = self._number
        if not isinstance(record, Header | Steps | Digest | Recovered | End):
            self._on_input(record)
        try:
            difference = self._replayer.consume(number, record)
        except ChoicesExhaustedError as error:
            difference = str(error)
        if difference is not None:
            raise JournalError(f"record {number}: the replay diverged: {difference}")
        if isinstance(record, Digest):
            self._digest_due = number + 1 + DIGEST_INTERVAL

    def _finish(self) -> None:
        if self._done:
            return
        try:
            self._replayer.choices.finish()
        except ChoicesExhaustedError as error:
            raise JournalError(f"record {self._number - 1}: the replay diverged: {error}") from error
        self._replayer.events.flush()
        self._done = True

    def runner(self, write: Callable[[bytes], object]) -> Runner:
        """A runner that goes on, after `advance` has returned False; call once.

        `write` appends to the journal, which has been cut off at `position`. Admission is as it was. A run that has
        ended has a runner only to be looked at: nothing may be submitted to it.
        """
        if not self._done:
            raise ValueError("the recovery is not at its end")
        machine, events = self._replayer.machine, self._replayer.events
        at = self._reader.position
        state = RunnerState(
            machine=machine,
            choices=SeededChoices(machine.config.seed, at.record),
            events=events.count,
            stream_digest=events.stream_digest,
            position=at,
            digest_due=self._digest_due,
        )
        runner = Runner(state, write, *self._listeners)
        if not self.ended:
            runner.note_recovery()
        return runner
