"""Runs in one process whose service is killed while it writes, recovered, and gone on with by the same vCPUs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import Any, cast

import msgspec

from shadowmmu.machine import Admission, Input, Machine, Note, Output, Recovery, Runner
from shadowmmu.machine.inprocess import InProcessRun
from shadowmmu.machine.state_dump import dump_state
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event, encode_events


def fingerprint(machine: Machine) -> str:
    """Of everything that can be seen of a machine from outside."""
    parts = [
        dump_state(machine),
        sorted(machine.all_counters().items()),
        sorted(machine.lock_wait_steps.items()),
        machine.admission,
    ]
    memory = hashlib.blake2b()
    for slot in machine.kvm.memslots:
        memory.update(slot.memory.data)
    return hashlib.blake2b(repr((parts, memory.digest())).encode(), digest_size=8).hexdigest()


class Moment(msgspec.Struct):
    """When a frame had been written: bytes of the journal, inputs and outputs so far, and how the machine looked."""

    offset: int
    consumed: int
    produced: int
    fingerprint: str


class KilledError(Exception):
    """The service dies instead of writing a frame."""


class Stream:
    """The event stream as those have it who stay alive. What is repeated has to be what it was."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.data = bytearray()

    def listen(self, first: int, events: list[Event], data: bytes) -> None:
        assert first <= len(self.events), "events are missing"
        known = min(len(events), len(self.events) - first)
        assert self.events[first : first + known] == events[:known]
        self.events += events[known:]
        self.data += encode_events(events[known:]) if known else data


class _Watched:
    """A runner, and what goes in and comes out."""

    def __init__(self, runner: Runner, consumed: list[Input | Note], produced: list[Output]) -> None:
        self._runner = runner
        self._consumed, self._produced = consumed, produced

    def submit(self, item: Input | Note) -> None:
        self._consumed.append(item)
        self._runner.submit(item)

    def take_outputs(self) -> list[Output]:
        outputs = self._runner.take_outputs()
        self._produced += outputs
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class FaultyRun:
    """A run that is killed instead of writing the frames of those numbers; `torn` bytes of them are written.

    With `snapshot_rounds` a snapshot is taken every so many rounds. `moments` has one for every frame before a kill, and
    for every `moment_frames`-th.
    """

    def __init__(
        self,
        config: m.RunConfig,
        vcpus: int,
        *,
        kills: Iterable[int] = (),
        torn: int = 0,
        snapshot_rounds: int | None = None,
        moment_frames: int | None = None,
    ) -> None:
        self.journal = bytearray()
        self.snapshots: list[bytes] = []  # the newest first
        self.stream = Stream()
        self.consumed: list[Input | Note] = []
        self.produced: list[Output] = []
        self.moments: list[Moment] = []
        self.recoveries = 0
        self._kills = set(kills)
        self._torn = torn
        self._snapshot_rounds = snapshot_rounds
        self._moment_frames = moment_frames
        self._frames = 0
        self._written = 0  # of the inputs
        self.runner = Runner(config, self._write, self.stream.listen)
        self.run = InProcessRun(self._watched(), config, vcpus)

    def _watched(self) -> Runner:
        return cast("Runner", _Watched(self.runner, self.consumed, self.produced))

    def _write(self, frame: bytes) -> None:
        if self._frames in self._kills:
            self._kills.discard(self._frames)
            self.journal += frame[: self._torn]
            raise KilledError
        self.journal += frame
        self._frames += 1
        self._written = len(self.consumed)
        if self._frames in self._kills or (self._moment_frames and self._frames % self._moment_frames == 0):
            self.moments.append(self._moment())

    def _moment(self) -> Moment:
        machine = self.runner.machine
        produced = len(self.produced) + len(machine.outputs)
        return Moment(len(self.journal), len(self.consumed), produced, fingerprint(machine))

    def to_the_end(self) -> str:
        """Returns the event stream's digest."""
        draining = False
        rounds = 0
        while not self.run.ended():
            rounds += 1
            assert rounds < 100_000, "the run does not end"
            try:
                self.run.round()
                if self._snapshot_rounds and rounds % self._snapshot_rounds == 0:
                    self._take_snapshot()
            except KilledError:
                self._recover()
            if not draining and self.run.work_done():
                draining = True
                self.run.drain()
        return self.runner.finish()

    def _take_snapshot(self) -> None:
        self.run.runner.submit(Admission(open=False))
        self.run.round()
        while not self.runner.machine.quiet:
            self.run.round()
        self.snapshots.insert(0, self.runner.snapshot(b"%d" % len(self.stream.events)))
        self.run.runner.submit(Admission(open=True))

    def _recover(self) -> None:
        """A new service recovers; the vCPUs send again what was lost."""
        self.recoveries += 1
        recovery = Recovery(io.BytesIO(self.journal), self.snapshots, self.stream.listen)
        while recovery.advance(100):
            pass
        del self.journal[recovery.position.offset :]
        self.runner = recovery.runner(self._write)
        moment = self.moments[-1]
        assert moment.offset == len(self.journal)
        assert moment.fingerprint == fingerprint(self.runner.machine)
        lost = self.consumed[self._written :]
        del self.consumed[self._written :]
        self.run.runner = self._watched()
        for item in lost:
            self.run.runner.submit(item)
        if not self.runner.machine.admission:
            self.run.runner.submit(Admission(open=True))
