"""The coordinator's process: a socket, a clock and the checker around the pure run state.

One ROUTER socket; a session per member checks and numbers its messages. The checker works in the same loop, a bounded
slice per turn, so that heartbeats are answered in between and the MMU service, which has work to do, is kept waiting
by credits only.

A coordinator that somebody starts again when it has died keeps what it has received in its run's folder: events before
credit is given for them, the state of the run before anybody is told of a change in it. It goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from shadowmmu.client import Endpoint, Security, User, forbidden
from shadowmmu.coordinator.aggregate import merge_counters
from shadowmmu.coordinator.assemble import assemble_report
from shadowmmu.coordinator.event_store import EventStore
from shadowmmu.coordinator.intake import Intake
from shadowmmu.coordinator.progress import Snapshot, snapshot_of
from shadowmmu.coordinator.report import RunReport, write_report
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_store import RunStore
from shadowmmu.coordinator.run_types import Forget, Output, Phase, Refuse, RunSettings, Send, Stop, TakeIn
from shadowmmu.coordinator.saved_run import SavedRun, restore_run, save_run
from shadowmmu.coordinator.series import Series, sampled_counters
from shadowmmu.protocol import (
    COORDINATOR,
    FROM_COORDINATOR,
    TO_COORDINATOR,
    Envelope,
    ErrorCode,
    LocalProtocolError,
    RemoteProtocolError,
    Session,
    Side,
    State,
    error_reply,
    minor_version,
)
from shadowmmu.protocol import messages as m

__all__ = ["Coordinator", "OnProgress"]

LINGER_SECONDS: Final = 2.0
"""At most this long the last messages may take to leave."""
TICKS_PER_HEARTBEAT: Final = 4

TOKEN_BYTES: Final = 16
_ROUTINE: Final = (m.Heartbeat, m.Progress, m.EventBatch)
"""Messages after which the run's state need not be stored at once."""

OnProgress = Callable[[Snapshot], None]

log = structlog.get_logger("shadowmmu.coordinator")


class Coordinator:
    """Conducts one run. `bind`, then `await run()`; an async context manager that closes the socket.

    `state` and `series` are for others to look at; `started` is when the run began: wall clock, ISO 8601.

    `on_progress` is called a few times per second; `clock` gives seconds and does not go back. `security`: the keys;
    raises KeysError if they cannot be read. `folder`: where to keep what is received, to go on with a run that is there
    and is not finished, and to write the report; raises RunStoreError if that run is another one, and OSError.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        mode: str = "processes",
        on_progress: OnProgress | None = None,
        clock: Callable[[], float] = time.monotonic,
        security: Security = Security(),  # noqa: B008 (it cannot change)
        folder: Path | None = None,
    ) -> None:
        self.state = RunState(settings, clock(), lambda: os.urandom(TOKEN_BYTES))
        self.series = Series(settings.heartbeat / TICKS_PER_HEARTBEAT)
        self._settings = settings
        self._mode = mode
        self._on_progress = on_progress
        self._clock = clock
        self.started = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._intake = Intake(check=settings.config.check)
        self._intake_scheduled = False
        self._sessions: dict[bytes, Session] = {}
        self._owners: dict[bytes, User] = {}  # of the sessions
        self._minors: dict[bytes, int] = {}  # the minor versions that their peers speak
        self._folder = folder
        self._events: EventStore | None = None
        self._store: RunStore | None = None
        self._finished = asyncio.Event()
        self._failure: BaseException | None = None
        self._logged = (Phase.WAITING, 0, 0, 0)
        self.address = ""
        if folder is not None:
            self._open_folder(folder)
        self._endpoint = Endpoint.router(
            self._message,
            on_peer_lost=self._peer_lost,
            on_failure=self._endpoint_failed,
            hard_limit=TO_COORDINATOR.hard_limit,
            security=security.server(COORDINATOR),
        )

    def _open_folder(self, folder: Path) -> None:
        self._store = RunStore(folder)
        saved = self._store.unfinished(self._settings)
        if saved is None and self._store.holds_finished_run:
            log.warning("a new run takes the place of the finished one that is there", folder=str(folder))
        self._events = EventStore(folder, fresh=saved is None)
        if saved is not None:
            self._go_on(saved, self._events)

    def _go_on(self, saved: SavedRun, events: EventStore) -> None:
        self.started = saved.started
        restore_run(self.state, saved, self._clock())
        for batch in events.batches():
            self.state.stream.restore(batch)
        self._intake.put_stored(events.batches())
        self._logged = (
            self.state.phase,
            len(self.state.problems),
            len(self.state.notes),
            len(self.state.recoveries),
        )
        log.info("goes on with the run", phase=self.state.phase.value, events=self.state.events)

    def bind(self, address: str) -> str:
        """Listens there; returns the real address."""
        self.address = self._endpoint.bind(address)
        log.info("listening", address=self.address)
        return self.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._endpoint.close()
        if self._events is not None:
            self._events.close()

    async def run(self) -> RunReport:
        """Conducts the run to its end: every wait in it is bounded. The last messages have left when it returns."""
        self._endpoint.start()
        self._schedule_intake()
        ticker = asyncio.create_task(self._tick())
        try:
            await self._finished.wait()
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker
        if self._failure is not None:
            raise self._failure
        report = assemble_report(self.state, self.started, self._mode, self.series)
        if self._folder is not None:
            write_report(report, self._folder)
        self._save()  # finished: only now, since who finds that starts a new run
        await self._endpoint.close(linger=LINGER_SECONDS)
        return report

    def fail(self, text: str) -> None:
        """Something outside went wrong (a process died, somebody pressed Ctrl-C): the run ends in order, as unknown."""
        self._react(self.state.failed(text, self._clock()))

    def process_ended(self, name: str, text: str) -> None:
        """The process of the members of that name has ended: they may be replaced."""
        self._react(self.state.ended(name, text, self._clock()))

    def now(self) -> float:
        """The time by the clock of `state`, in seconds."""
        return self._clock()

    @property
    def finished(self) -> bool:
        """The verdict is out."""
        return self.state.phase is Phase.FINISHED

    # --- time ---------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._settings.heartbeat / TICKS_PER_HEARTBEAT)
                self._react(self.state.tick(self._clock()))
                self._sample()
                if self._on_progress is not None:
                    self._on_progress(snapshot_of(self.state, self._clock()))
        except Exception as error:  # noqa: BLE001 - of whatever kind: it ends the run
            self._endpoint_failed(error)

    def _sample(self) -> None:
        started = self.state.started_at
        if started is not None and self.series.due(seconds := self._clock() - started):
            counters = merge_counters(member.counters for member in self.state.members)
            self.series.add(seconds, sampled_counters(counters))

    # --- messages -----------------------------------------------------------------------------------------------

    def _message(self, peer: bytes, frames: list[bytes]) -> None:
        session = self._sessions.get(peer)
        stranger = session is None
        if session is None:
            session = Session(COORDINATOR, Side.SERVICE)
        try:
            sender = self._check_sender(peer)
            envelope = TO_COORDINATOR.decode(frames)
            if isinstance(envelope.body, m.Join):
                self._forbid(forbidden(sender, COORDINATOR, opens=envelope.body.role))
            act = session.receive(envelope)
        except RemoteProtocolError as error:
            self._refused(peer, error)
            return
        if stranger:
            self._minors[peer] = minor_version(frames)
            self._sessions[peer] = session
            self._owners[peer] = sender
        if act:
            assert isinstance(envelope.body, m.MemberMessage)
            phase = self.state.phase
            outputs = self.state.receive(peer, envelope.body, self._clock())
            if isinstance(envelope.body, _ROUTINE) and self.state.phase is phase:
                self._carry_out(outputs)
            else:
                self._react(outputs)

    def _check_sender(self, peer: bytes) -> User:
        """Whose message it is. Raises RemoteProtocolError if it comes with another key than the session it is for."""
        sender = self._endpoint.sender
        text = forbidden(sender, COORDINATOR, owner=self._owners.get(peer))
        if sender is None and peer in self._owners:
            self._react(self.state.gone(peer, str(text), self._clock()))
        self._forbid(text)
        assert sender is not None
        return sender

    @staticmethod
    def _forbid(text: str | None) -> None:
        if text is not None:
            raise RemoteProtocolError(ErrorCode.FORBIDDEN, text)

    def _refused(self, peer: bytes, error: RemoteProtocolError) -> None:
        log.warning("refused", peer=peer.hex(), code=error.code.value, text=error.text)
        self._transmit(peer, error_reply(error))
        if error.info.ends:
            self._react(self.state.gone(peer, str(error), self._clock()))

    def _peer_lost(self, peer: bytes, code: ErrorCode, undelivered: int) -> None:
        text = (
            "its connection is gone"
            if code is ErrorCode.UNREACHABLE
            else "it does not read what is sent to it"
        )
        self._react(self.state.gone(peer, f"{text} ({undelivered} messages not delivered)", self._clock()))

    def _endpoint_failed(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._finished.set()

    # --- outputs ------------------------------------------------------------------------------------------------

    def _react(self, outputs: list[Output]) -> None:
        """The state has changed in more than its counters: it is stored before anybody hears of it."""
        if self.state.phase is not Phase.FINISHED:
            self._save()
        self._carry_out(outputs)

    def _save(self) -> None:
        if self._store is not None:
            self._store.save(save_run(self.state, self.started, self._clock()))

    def _carry_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Send(peer, body):
                    assert isinstance(peer, bytes)
                    self._send(peer, body)
                    if isinstance(body, m.Joined):
                        log.info("welcomed", member=body.member, next_event=body.next_event)
                case Refuse(peer, code, text):
                    assert isinstance(peer, bytes)
                    self._refuse(peer, code, text)
                case TakeIn(batch):
                    if self._events is not None:
                        self._events.append(batch)
                    self._intake.put(batch)
                    self._schedule_intake()
                case Forget(peer):
                    assert isinstance(peer, bytes)
                    self._forget(peer)
                case Stop():
                    self._finished.set()
        self._log_changes()

    def _send(self, peer: bytes, body: m.CoordinatorMessage) -> None:
        if isinstance(body, m.Joined) and not self._minors[peer]:
            # Version 1.0 refuses fields that it does not know.
            body = m.Joined(body.member, body.config, body.mmu_endpoint, body.heartbeat)
        try:
            envelope = self._sessions[peer].send(body)
        except LocalProtocolError as error:
            # The member's session is over already, or the member is not where it should be: it hears no more of us.
            log.warning("not sent", peer=peer.hex(), message=type(body).__name__, reason=str(error))
            return
        self._transmit(peer, envelope)

    def _forget(self, peer: bytes) -> None:
        self._sessions.pop(peer, None)
        self._owners.pop(peer, None)
        self._minors.pop(peer, None)

    def _refuse(self, peer: bytes, code: ErrorCode, text: str) -> None:
        session = self._sessions[peer]
        if session.state is State.ATTACHING:
            self._transmit(peer, session.send(m.ErrorReply(code.value, text)))
            self._forget(peer)
        else:
            self._transmit(
                peer, error_reply(RemoteProtocolError(code, text, incarnation=session.incarnation))
            )

    def _transmit(self, peer: bytes, envelope: Envelope) -> None:
        with contextlib.suppress(ConnectionError):  # closed: there is nobody to talk to any more
            self._endpoint.send(peer, FROM_COORDINATOR.encode(envelope))

    # --- events -------------------------------------------------------------------------------------------------

    def _schedule_intake(self) -> None:
        if not self._intake_scheduled and self._intake.pending:
            self._intake_scheduled = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        self._intake_scheduled = False
        try:
            piece = self._intake.work()
            now = self._clock()
            if piece.violation is not None:
                log.error("violated", text=str(piece.violation), blame=piece.violation.blame)
                self._react(self.state.violated(piece.violation, now))
            if piece.error is not None:
                self._react(self.state.failed(piece.error, now))
            if piece.batches:
                self._carry_out(self.state.taken_in(piece.batches, now))
        except Exception as error:  # noqa: BLE001 - of whatever kind: it ends the run
            self._endpoint_failed(error)
            return
        self._schedule_intake()

    # --- the log ------------------------------------------------------------------------------------------------

    def _log_changes(self) -> None:
        state = self.state
        phase, problems, notes, recoveries = self._logged
        for note in state.notes[notes:]:
            log.info("note", text=note)
        for problem in state.problems[problems:]:
            log.warning("problem", text=problem)
        for recovery in state.recoveries[recoveries:]:
            log.warning("absent", member=recovery.member, name=recovery.name, reason=recovery.reason)
        if state.phase is not phase:
            log.info("phase", phase=state.phase.value, vcpus=state.vcpus)
            if state.phase is Phase.FINISHED:
                log.info("finished", verdict=state.verdict.value, text=state.text)
        self._logged = (state.phase, len(state.problems), len(state.notes), len(state.recoveries))
