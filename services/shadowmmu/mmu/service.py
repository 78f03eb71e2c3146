"""The MMU service's shell: peers and their sessions around a machine.

Everything that decides is elsewhere: what is legal in `shadowmmu.protocol.session`, what happens in
`shadowmmu.machine`. The shell decodes, checks, submits, lets the machine step, writes the journal, and only then sends.
It gives up peers that have fallen silent, and measures how long answers to kicks take.

A peer that has a token and loses its connection goes on when it resumes on another one; what is sent to it meanwhile is
kept by its session. A message that comes twice is answered again, and nothing else.

A turn of the event loop reads up to 64 messages, then makes up to `STEPS_PER_TURN` steps; so neither starves the other.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog
from hdrh.histogram import HdrHistogram

from shadowmmu.client import Endpoint, User, forbidden
from shadowmmu.machine import (
    Admission,
    Attached,
    GivenUp,
    HostAttached,
    HostDone,
    HostEnded,
    HostRefused,
    Output,
    ToVcpu,
    VcpuSent,
    boot_inputs,
)
from shadowmmu.machine.vm_config import welcome
from shadowmmu.mmu.fairness import Fairness
from shadowmmu.mmu.host_requests import HostRequests
from shadowmmu.mmu.options import SNAPSHOT_RECORDS
from shadowmmu.mmu.patience import PATIENCE_SECONDS, Patience, worker_next
from shadowmmu.mmu.peers import Peer, Peers
from shadowmmu.mmu.recovered import freeze, late_kick
from shadowmmu.mmu.snapshot_files import SnapshotFiles
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import (
    FROM_MMU,
    MMU,
    TO_MMU,
    Envelope,
    ErrorCode,
    HeartbeatTimer,
    RemoteProtocolError,
    State,
    error_reply,
)
from shadowmmu.protocol import messages as m

__all__ = ["MmuService"]

STEPS_PER_TURN: Final = 256
WAITING_SECONDS: Final = 0.005
"""How often host requests beyond their agent's share of the time are looked at, if nothing else happens."""
TOKEN_BYTES: Final = 16
KICK_SECONDS: Final = 15.0
"""A vCPU that shows signs of life, but does not answer a kick for so long, is given up."""
SHORTEST_HEARTBEAT: Final = 0.1
LONGEST_HEARTBEAT: Final = 30.0
"""A peer may wish for an interval between these, in seconds."""

_NO_SESSION: Final = (State.DETACHED, State.ENDED)

log = structlog.get_logger(__name__)


class MmuService:
    """One machine served to its peers.

    `prepared`: the machine with its journal, and the peers of an earlier process if it was recovered. `heartbeat`:
    seconds. `on_vcpu_attached()` is called when a vCPU has got a token, `on_vcpu_lost(number, text)` when one is given
    up. `endpoint` is the user's, who starts it when the service is to hear. A snapshot is taken about every
    `snapshot_records` records. `patience`: seconds that parked operations wait for workers (`Patience`).
    """

    def __init__(
        self,
        prepared: Prepared,
        heartbeat: float,
        *,
        snapshot_records: int = SNAPSHOT_RECORDS,
        patience: float = PATIENCE_SECONDS,
        on_vcpu_attached: Callable[[], object] = lambda: None,
        on_vcpu_lost: Callable[[int, str], object] = lambda _number, _text: None,
    ) -> None:
        self._journal = prepared.journal
        self._snapshots = prepared.snapshots
        self._heartbeat = heartbeat
        self._on_vcpu_attached = on_vcpu_attached
        self._on_vcpu_lost = on_vcpu_lost
        self.runner = prepared.runner
        self._config = prepared.runner.machine.config
        recovered = prepared.recovered
        self.peers = Peers() if recovered is None else recovered.peers
        self.endpoint: Endpoint | None = None
        self.counters: Counter[str] = Counter()
        self.kick_latency = HdrHistogram(1, 60_000_000, 3)
        self._out: list[tuple[Peer, m.Message]] = []
        self._started = recovered is not None and recovered.started
        if self._started:
            self.peers.vcpus_max = len(self.runner.machine.lanes)
        self._ended = prepared.ended
        self._snapshot_records = snapshot_records
        self._snapshot_due = self.runner.records + snapshot_records
        self._admitting = self.runner.machine.admission
        self._draining = False
        self._blocked = False
        self._turn_due = False
        self._patience = Patience(time.monotonic(), patience)
        self._look_again: asyncio.TimerHandle | None = None  # of the last wait for workers
        self._fairness = Fairness(time.monotonic())
        tickets, last_ticket = (None, 0) if recovered is None else (recovered.tickets, recovered.last_ticket)
        self._hosts = HostRequests(self.runner, self.peers, self._fairness, tickets, last_ticket)
        self._idle = asyncio.Event()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- life ----------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """The guest is loaded."""
        return self._started

    def start(self, vcpus: int) -> None:
        """The run begins with vCPUs 0 to `vcpus` - 1: loads the guest and lets those enter that have asked. Of a run
        that has begun already it is no news.
        """
        if self._started:
            return
        missing = [number for number in range(vcpus) if self.peers.vcpu(number) is None]
        self.peers.vcpus_max = vcpus
        for number in missing:
            # A machine has all its vCPUs from the start; one that nobody is yet can attach later.
            self.runner.submit(Attached(number, 0))
        for item in boot_inputs(self._config, vcpus):
            self.runner.submit(item)
            while self.runner.step(STEPS_PER_TURN):
                pass
        self.runner.take_outputs()
        self._started = True
        for peer in self.peers:
            held, peer.held = peer.held, []
            for body in held:
                if isinstance(body, m.HostRequest):
                    self._hosts.ask(peer.session.incarnation, body)
                else:
                    self._submit_vcpu(peer, body)
        self._schedule_turn()

    async def drain(self) -> str:
        """No more inputs: ends every session, finishes what is under way. Returns the event stream's digest."""
        self._draining = True
        if self._ended:
            return self.runner.events.digest()
        for peer in self.peers:
            self._end(peer, ErrorCode.FINISHED, "the run is over")
        self._admit()
        self._schedule_turn()
        await self._idle.wait()
        if self._look_again is not None:
            self._look_again.cancel()
        digest = self.runner.finish()
        self._journal.close()
        return digest

    def tick(self, now: float) -> None:
        """Heartbeats: sends those that are due, gives up who is silent. Call several times per interval."""
        for peer in self.peers:
            if peer.timer.expired(now):
                self._end(peer, ErrorCode.GIVEN_UP, f"{peer}: silent for {peer.timer.silence:.1f} s")
            elif peer.kicked_at is not None and now - peer.kicked_at >= KICK_SECONDS and not self._blocked:
                # It lives, and others wait for it: in a remote TLB flush, with what they hold.
                self._end(peer, ErrorCode.GIVEN_UP, f"{peer}: no answer to a kick for {KICK_SECONDS:g} s")
            elif peer.timer.due(now) and peer.address is not None:
                self._out.append((peer, m.Heartbeat()))
        self._schedule_turn()

    def fail(self, error: Exception) -> None:
        """The service cannot go on: its journal cannot be written, or it has a defect. Whoever runs it ends it."""
        if not self.failure.done():
            self.failure.set_exception(error)

    def set_blocked(self, blocked: bool) -> None:
        """Back-pressure: while blocked, nothing is read and no step is made."""
        if blocked == self._blocked or self.endpoint is None:
            return
        self._blocked = blocked
        self.counters["backpressure"] += blocked
        if blocked:
            self.endpoint.pause()
        else:
            now = time.monotonic()
            for peer in self.peers:
                peer.kicked_at = None if peer.kicked_at is None else now  # its answer may wait in the socket
            self.endpoint.resume()
            self._schedule_turn()

    # --- messages in ---------------------------------------------------------------------------------------------

    def on_message(self, address: bytes, frames: list[bytes]) -> None:
        """A peer's message."""
        assert self.endpoint is not None
        now = time.monotonic()
        if self._fairness.is_dropped(address, now):
            self.counters["flooding.dropped"] += 1
            self._end_reading()
            return
        peer = self.peers.get(address)
        known = peer is not None
        sender = self.endpoint.sender
        if peer is None:
            peer = Peer(address, HeartbeatTimer(self._heartbeat, time.monotonic()), sender)
        try:
            self._check_sender(peer, sender)
            envelope = TO_MMU.decode(frames)
            if isinstance(envelope.body, m.Resume):
                self._resume(address, sender, envelope, envelope.body)
                return
            repeated = peer.session.repeated(envelope)
            if known and not repeated:
                self._check_contents(peer, envelope)
            act = peer.session.receive(envelope)
            if act and isinstance(envelope.body, m.Attach):
                self._attach(peer, envelope.body)
        except RemoteProtocolError as error:
            self._refuse(peer, error)
            return
        peer.timer.heard(now)
        if (repeated or isinstance(envelope.body, m.Heartbeat)) and not self._allows_idle(peer):
            return
        if repeated:
            self._answer_again(peer, envelope.seq)
        elif act:
            self._act(peer, envelope)

    def _answer_again(self, peer: Peer, seq: int) -> None:
        """A message came twice: the same answer, if it has been given."""
        self.counters["repeated"] += 1
        answer = peer.session.answer(seq)
        if answer is not None:
            self._transmit(peer, answer)

    def _resume(self, address: bytes, sender: User | None, envelope: Envelope, body: m.Resume) -> None:
        """A peer goes on over another connection."""
        peer = self.peers.incarnation(envelope.incarnation)
        if peer is not None and peer.address == address:
            self._allows_idle(peer)  # it came twice
            return
        if peer is None:
            text = f"incarnation {envelope.incarnation} is not under way"
            raise RemoteProtocolError(
                ErrorCode.STALE_INCARNATION, text, incarnation=envelope.incarnation, seq=envelope.seq
            )
        text_or_none = forbidden(sender, MMU, opens=peer.session.role)
        if text_or_none is not None:
            raise RemoteProtocolError(ErrorCode.FORBIDDEN, text_or_none)
        peer.session.receive(envelope)
        other = self.peers.get(address)
        if other is not None and other is not peer:
            raise RemoteProtocolError(ErrorCode.ALREADY_ATTACHED, "this connection is another session's")
        self.peers.move(peer, address)
        peer.user = sender
        peer.timer.heard(time.monotonic())
        self.counters["resumed"] += 1
        log.info("resumed", peer=str(peer), incarnation=envelope.incarnation, received=body.received)
        # All of it is in the journal already: it was given before, or is kept since.
        for again in peer.session.resume(body):
            self._transmit(peer, again)
        self._schedule_turn()

    def _check_sender(self, peer: Peer, sender: User | None) -> None:
        """A session is its user's: another key that has taken over its routing id gets nothing of it.

        One whose key has been revoked ends.
        """
        text = forbidden(sender, MMU, owner=peer.user)
        if text is None:
            return
        if sender is None and peer.address is not None and self.peers.get(peer.address) is peer:
            self._end(peer, ErrorCode.FORBIDDEN, text)
        raise RemoteProtocolError(ErrorCode.FORBIDDEN, text)

    def _check_contents(self, peer: Peer, envelope: Envelope) -> None:
        refusal = None if peer.vcpu is None else self.runner.machine.refusal(peer.vcpu, envelope.body)
        if refusal is not None:
            code, text = refusal
            raise RemoteProtocolError(code, text, incarnation=envelope.incarnation, seq=envelope.seq)
        if self._draining:
            raise RemoteProtocolError(
                ErrorCode.DRAINING,
                "the run is being ended",
                incarnation=envelope.incarnation,
                seq=envelope.seq,
            )

    def _attach(self, peer: Peer, attach: m.Attach) -> None:
        if self._draining:
            raise RemoteProtocolError(ErrorCode.DRAINING, "the run is being ended")
        text = forbidden(peer.user, MMU, opens=attach.role)
        if text is not None:
            raise RemoteProtocolError(ErrorCode.FORBIDDEN, text)
        place = self.peers.place(attach)
        if place.replaced is not None:
            self._replace(place.replaced)
        incarnation = self.peers.next_incarnation()
        token = os.urandom(TOKEN_BYTES) if attach.resumable else b""
        peer.name = attach.name
        self.peers.add(peer, incarnation, place.vcpu, token)
        if place.vcpu is not None:
            self.runner.submit(Attached(place.vcpu, incarnation, place.resume, token))
            self._on_vcpu_attached()
        elif attach.role is m.Role.HOST:
            self.runner.submit(HostAttached(incarnation, token))
        heartbeat = self._heartbeat
        if attach.heartbeat is not None and SHORTEST_HEARTBEAT <= attach.heartbeat <= LONGEST_HEARTBEAT:
            heartbeat = attach.heartbeat
            peer.timer = HeartbeatTimer(heartbeat, time.monotonic())
        log.info("attached", peer=attach.name, role=attach.role.value, vcpu=place.vcpu, resume=place.resume)
        self._out.append((peer, welcome(self._config, place.vcpu, incarnation, heartbeat, token)))

    def _replace(self, peer: Peer) -> None:
        """Another connection attaches as this vCPU: it is not there any more for the messages of the machine."""
        assert peer.vcpu is not None
        text = "another connection attached as this vCPU"
        log.warning("replaced", peer=str(peer))
        address = peer.address
        self.peers.remove(peer)
        peer.address = address  # there it is told, at the end of the turn
        self._out.append((peer, m.Ended(ErrorCode.REPLACED.value, text)))
        self.runner.submit(GivenUp(peer.vcpu, ErrorCode.REPLACED.value, text))

    def _allows_idle(self, peer: Peer) -> bool:
        """Counts a message that moves nothing forward; ends the session of a peer that floods."""
        assert peer.address is not None
        attached = self.peers.get(peer.address) is peer
        allowed = self._fairness.allows_idle(peer.address, time.monotonic(), stranger=not attached)
        if not allowed:
            self.counters["flooding"] += 1
            if attached:
                self._end(peer, ErrorCode.FLOODING, f"{peer}: too many messages that move nothing forward")
        self._end_reading()
        return allowed

    def _end_reading(self) -> None:
        """Has the endpoint read no more in this turn, if there were idle messages enough: others come sooner."""
        assert self.endpoint is not None
        if self._fairness.turn_is_over:
            self.endpoint.pause()
            self._schedule_turn()

    def _read_on(self) -> None:
        """At the end of a turn: the endpoint reads again; requests that wait for their share are looked at soon."""
        if self._fairness.turn_is_over and self.endpoint is not None and not self._blocked:
            self.endpoint.resume()
        self._fairness.begin_turn()
        if self._hosts.waiting and not self._turn_due:
            asyncio.get_running_loop().call_later(WAITING_SECONDS, self._schedule_turn)

    def _refuse(self, peer: Peer, error: RemoteProtocolError) -> None:
        self.counters[f"errors.{error.code.value}"] += 1
        if not self._allows_idle(peer):
            return
        log.warning("refused", peer=str(peer), code=error.code.value, text=error.text)
        self._transmit(peer, error_reply(error))
        if error.info.ends and peer.address is not None and self.peers.get(peer.address) is peer:
            self._end(peer, error.code, error.text)

    def _act(self, peer: Peer, envelope: Envelope) -> None:
        body = envelope.body
        if not isinstance(body, m.Heartbeat):
            self._patience.heard(time.monotonic())
        match body:
            case m.HostRequest() if self._started:
                self._hosts.ask(peer.session.incarnation, body)
            case m.Detach() if peer.vcpu is None:
                self._end(peer, ErrorCode.DETACHED, "")
            case m.Enter() | m.Detach() | m.HostRequest() if not self._started:
                peer.held.append(body)
            case m.Exit():
                if peer.kicked_at is not None:
                    self.kick_latency.record_value(max(1, int((time.monotonic() - peer.kicked_at) * 1e6)))
                    peer.kicked_at = None
                self._submit_vcpu(peer, body)
            case m.Enter() | m.Log() | m.Walk() | m.Load() | m.Locked() | m.Detach():
                self._submit_vcpu(peer, body)
            case _:
                pass  # a heartbeat, or an attach that has been dealt with
        self._schedule_turn()

    def _submit_vcpu(
        self, peer: Peer, body: m.Enter | m.Log | m.Walk | m.Load | m.Locked | m.Exit | m.Detach
    ) -> None:
        assert peer.vcpu is not None
        self.runner.submit(VcpuSent(peer.vcpu, body))

    # --- sessions' ends ------------------------------------------------------------------------------------------

    def on_peer_lost(self, address: bytes, reason: ErrorCode, undelivered: int) -> None:
        """The transport cannot reach a peer, or its queue is full. One that can resume has until it is given up."""
        peer = self.peers.get(address)
        if peer is not None and peer.resumable and reason is ErrorCode.UNREACHABLE:
            self.peers.move(peer, None)
        elif peer is not None:
            self._end(peer, reason, f"{peer}: {undelivered} messages could not be delivered")
            self._schedule_turn()

    def _end(self, peer: Peer, code: ErrorCode, text: str) -> None:
        """Ends a session at our wish; of a vCPU, its incarnation too."""
        number = peer.vcpu
        if number is None:
            if peer.session.role is m.Role.HOST:
                self.runner.submit(HostEnded(peer.session.incarnation))
            self._say_ended(peer, m.Ended(code.value, text))
            return
        # The machine says Ended, in its place among the outputs; see `_deliver`.
        self._schedule_turn()
        self.runner.submit(GivenUp(number, code.value, text))
        if code is not ErrorCode.FINISHED:
            log.warning("gave a vCPU up", vcpu=number, code=code.value, text=text)
            self._on_vcpu_lost(number, text or code.value)

    def _say_ended(self, peer: Peer, ended: m.Ended) -> None:
        if peer.session.attached:
            self._send(peer, ended)
        self.peers.remove(peer)

    # --- turns ---------------------------------------------------------------------------------------------------

    def _schedule_turn(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def on_batch(self) -> None:
        """The endpoint has handed over what came: takes the turn at once, so that answers leave with this batch."""
        if self._turn_due:
            self._turn()

    def _turn(self) -> None:
        if not self._turn_due:
            return  # taken already, with the batch
        self._turn_due = False
        try:
            if self._hosts.waiting:
                self._hosts.begin()
            more = not self._blocked and self._step()
            outputs = self.runner.take_outputs()
            self._journal.flush(time.monotonic())
            for output in outputs:
                self._deliver(output)
            out, self._out = self._out, []
            for peer, body in out:
                if peer.session.state not in _NO_SESSION:
                    self._send(peer, body)
            self._look_at_snapshot()
            self._read_on()
        except Exception as error:  # noqa: BLE001 - a defect ends the service, loudly, not one callback quietly
            self.fail(error)
            return
        if more:
            self._schedule_turn()
        elif self._draining and not self._blocked:
            self._idle.set()

    def _step(self) -> bool:
        """Makes steps; True if there is more to do now. Parked operations go on when no message came for a while."""
        machine = self.runner.machine
        left = self._patience.left(time.monotonic(), worker_next=worker_next(machine))
        patient = left is not None and self._admitting
        more = self.runner.step(STEPS_PER_TURN, resume_parked=not patient)
        if more or not patient or not machine.parked:
            return more
        if not left or self._draining:
            return True
        self._look_again_in(left)
        return False

    def _look_again_in(self, seconds: float) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        self._look_again = asyncio.get_running_loop().call_later(seconds, self._schedule_turn)

    # --- snapshots -----------------------------------------------------------------------------------------------

    def _look_at_snapshot(self) -> None:
        """At the end of a turn, when everything that was answered is sent, or kept: if a snapshot is due, stops
        admission, waits until nothing is under way, takes it, and goes on.
        """
        if self._snapshots is None or not self._started or self._draining:
            return
        runner = self.runner
        if self._admitting and runner.records >= self._snapshot_due:
            self._admitting = False
            runner.submit(Admission(open=False))
            self._schedule_turn()
        elif not self._admitting and runner.machine.quiet and not self._hosts.waiting:
            self._take_snapshot(self._snapshots)
            self._admit()

    def _take_snapshot(self, files: SnapshotFiles) -> None:
        began = time.monotonic()
        sessions = freeze(self.peers, self._hosts.tickets, self._hosts.last, started=self._started)
        data = self.runner.snapshot(sessions)
        try:
            files.write(self.runner.records, data)
        except OSError as error:
            # The run can do without; a recovery takes longer.
            log.warning("no snapshot can be kept", error=str(error))
            self._snapshots = None
            return
        self.counters["snapshots"] += 1
        milliseconds = round(1000 * (time.monotonic() - began), 1)
        log.info("snapshot", record=self.runner.records, bytes=len(data), milliseconds=milliseconds)

    def _admit(self) -> None:
        if not self._admitting:
            self._admitting = True
            self._snapshot_due = self.runner.records + self._snapshot_records
            self.runner.submit(Admission(open=True))
            self._schedule_turn()

    # --- messages out --------------------------------------------------------------------------------------------

    def _deliver(self, output: Output) -> None:
        match output:
            case HostDone() | HostRefused():
                told = self._hosts.answered(output)
                if told is not None:
                    self._send(*told)
            case ToVcpu():
                peer = self.peers.vcpu(output.vcpu)
                if peer is None or peer.session.incarnation != output.incarnation:
                    return
                body = output.body
                if late_kick(peer.session, body):
                    return
                match body:
                    case m.Kick():
                        peer.kicked_at = peer.kicked_at or time.monotonic()
                    case m.Ended():
                        self._say_ended(peer, body)
                        return
                    case _:
                        pass
                self._send(peer, body)

    def _send(self, peer: Peer, body: m.Message) -> None:
        self._transmit(peer, peer.session.send(body))
        peer.timer.sent(time.monotonic())

    def _transmit(self, peer: Peer, envelope: Envelope) -> None:
        """To where the peer is; to one without a connection nothing goes: its session keeps what counts."""
        assert self.endpoint is not None
        if peer.address is not None:
            self.endpoint.send(peer.address, FROM_MMU.encode(envelope))
