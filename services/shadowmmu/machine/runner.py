"""A machine with its journal: what a service, an in-process run and a test drive alike.

The runner writes each input to the journal before the machine consumes it, and the choices of the steps that follow
before any message leaves, so that a journal never lacks what others have seen.
"""

from __future__ import annotations

from collections.abc import Callable

from shadowmmu.machine.choices import SeededChoices
from shadowmmu.machine.event_stream import EventListener, EventStream
from shadowmmu.machine.journal import (
    DIGEST_INTERVAL,
    SCHEMA,
    Digest,
    End,
    Header,
    Input,
    JournalWriter,
    Steps,
)
from shadowmmu.machine.machine import Machine, Output
from shadowmmu.machine.version import code_version
from shadowmmu.protocol.events import NoProgress, RunEnded
from shadowmmu.protocol.messages import RunConfig

__all__ = ["Runner"]


class Runner:
    """Runs a machine and journals what it consumes.

    `write` receives the journal's bytes. `machine` is for reading; inputs and steps go through the runner.
    """

    def __init__(
        self, config: RunConfig, write: Callable[[bytes], object], *listeners: EventListener
    ) -> None:
        self._choices = SeededChoices(config.seed)
        self.events = EventStream(*listeners)
        self.machine = Machine(config, self._choices, self.events)
        self._journal = JournalWriter(write)
        self._journal.append(Header(SCHEMA, code_version(), config))
        self._steps = 0
        self._digest_due = DIGEST_INTERVAL

    @property
    def records(self) -> int:
        """Records written so far."""
        return self._journal.records

    def submit(self, item: Input) -> None:
        """Journals an input and lets the machine consume it."""
        self._close_steps()
        self.machine.submit(item, self._journal.append(item))

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
        return True

    def _close_steps(self) -> None:
        if self._steps:
            self._journal.append(Steps(self._steps, self._choices.take()))
            self._steps = 0
        if self._journal.records >= self._digest_due:
            self.events.flush()
            self._journal.append(Digest(self.events.count, self.events.digest()))
            self._digest_due = self._journal.records + DIGEST_INTERVAL

    def take_outputs(self) -> list[Output]:
        """The messages to be sent, all of whose causes are in the journal. Flushes the events too."""
        self._close_steps()
        self.events.flush()
        outputs = self.machine.outputs
        self.machine.outputs = []
        return outputs

    def finish(self, *, stuck: bool = False) -> str:
        """Ends the journal and the event stream; returns the stream's digest.

        `stuck`: the run ends because nothing can go on; the stream says so.
        """
        self._close_steps()
        if stuck:
            self.events.emit(NoProgress(self.machine.waiting()))
        self.events.emit(RunEnded(self._journal.records))
        self.events.flush()
        digest = self.events.digest()
        self._journal.append(End(self.events.count, digest, stuck))
        return digest
