"""A machine with its journal: what a service, an in-process run and a test drive alike.

The runner journals each input before the machine consumes it, and the choices of the steps that follow. It writes
them, as one frame, when the outputs are taken, so that a journal never lacks what others have seen.

At a moment at which nothing is under way a runner can be copied (`snapshot`); `shadowmmu.machine.recovery` makes one
from such a copy and the journal behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shadowmmu.machine.choices import SeededChoices
from shadowmmu.machine.event_stream import EventListener, EventStream
from shadowmmu.machine.journal import (
    DIGEST_INTERVAL,
    SCHEMA,
    Digest,
    End,
    Header,
    HostAttached,
    HostEnded,
    Input,
    JournalWriter,
    Note,
    Recovered,
    Steps,
)
from shadowmmu.machine.machine import Machine, Output
from shadowmmu.machine.snapshot import RunnerState, Snapshot
from shadowmmu.machine.version import code_version
from shadowmmu.protocol.events import NoProgress, RunEnded
from shadowmmu.protocol.messages import RunConfig

__all__ = ["Runner"]

MOST_STEPS: Final = 1024
"""In one record, so that executing one never takes long."""


class Runner:
    """Runs a machine and journals what it consumes.

    It begins with a configuration, or where another has stopped, the journal of which `write` then appends to. `write`
    receives frames. `machine` is for reading; inputs and steps go through the runner. `run`: which run it is, for the
    header.
    """

    def __init__(
        self,
        begin: RunConfig | RunnerState,
        write: Callable[[bytes], object],
        *listeners: EventListener,
        run: bytes = b"",
    ) -> None:
        self._steps = 0
        if isinstance(begin, RunnerState):
            self._choices = begin.choices
            self.events = EventStream(*listeners, count=begin.events, digest=begin.stream_digest)
            self.machine = begin.machine
            self.machine.connect(self._choices, self.events)
            self._journal = JournalWriter(write, begin.position)
            self._digest_due = begin.digest_due
        else:
            self._choices = SeededChoices(begin.seed)
            self.events = EventStream(*listeners)
            self.machine = Machine(begin, self._choices, self.events)
            self._journal = JournalWriter(write)
            self._journal.append(Header(SCHEMA, code_version(), begin, run))
            self._digest_due = DIGEST_INTERVAL

    @property
    def records(self) -> int:
        """Records so far."""
        return self._journal.records

    def note_recovery(self) -> None:
        """Journals that the machine was recovered, with the digest of what that gave."""
        self._journal.append(Recovered(self.events.count, self.events.digest()))

    def submit(self, item: Input | Note) -> None:
        """Journals an input and lets the machine consume it; a note is only journalled."""
        self._close_steps()
        number = self._journal.append(item)
        if not isinstance(item, HostAttached | HostEnded):
            self.machine.submit(item, number)

    def step(self, limit: int, *, resume_parked: bool = True) -> bool:
        """Up to `limit` steps; False if the machine has nothing left to do until the next input.

        `resume_parked` as in `Machine.step`.
        """
        step = self.machine.step
        for done in range(limit):
            if not step(resume_parked=resume_parked):
                self._steps += done
                return False
        self._steps += limit
        if self._steps >= MOST_STEPS:
            self._close_steps()
        return True

    def _close_steps(self) -> None:
        if self._steps:
            self._journal.append(Steps(self._steps, self._choices.take()))
            self._steps = 0
        if self._journal.records >= self._digest_due:
            self.events.gather()
            self._journal.append(Digest(self.events.count, self.events.digest()))
            self._digest_due = self._journal.records + DIGEST_INTERVAL

    def _flush(self) -> None:
        """Writes what has happened, and only then tells those who listen."""
        self._close_steps()
        self._journal.flush()
        self.events.flush()

    def take_outputs(self) -> list[Output]:
        """The messages to be sent, all of whose causes have been written. Flushes the events too."""
        self._flush()
        outputs = self.machine.outputs
        self.machine.outputs = []
        return outputs

    def snapshot(self, service: bytes = b"") -> bytes:
        """All that is needed to go on from here, as a file; call right after `take_outputs`.

        `service` is what the caller wants to find in it. Raises ValueError unless admission is closed, the machine
        quiet and every output taken.
        """
        machine = self.machine
        if machine.admission or not machine.quiet:
            raise ValueError("a snapshot needs closed admission and a machine with nothing under way")
        if machine.outputs:
            raise ValueError("there are outputs that were not taken")
        self._flush()
        state = RunnerState(
            machine=machine,
            choices=self._choices,
            events=self.events.count,
            stream_digest=self.events.stream_digest,
            position=self._journal.position,
            digest_due=self._digest_due,
        )
        return Snapshot.take(state, service).encode()

    def finish(self, *, stuck: bool = False) -> str:
        """Ends the journal and the event stream; returns the stream's digest.

        `stuck`: the run ends because nothing can go on; the stream says so.
        """
        self._close_steps()
        if stuck:
            self.events.emit(NoProgress(self.machine.waiting()))
        self.events.emit(RunEnded(self._journal.records))
        self.events.gather()
        digest = self.events.digest()
        self._journal.append(End(self.events.count, digest, stuck))
        self._journal.flush()
        self.events.flush()
        return digest
