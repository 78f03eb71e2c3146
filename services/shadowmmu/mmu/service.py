"""The MMU service's shell: peers and their sessions around a machine.

Everything that decides is elsewhere: what is legal in `shadowmmu.protocol.session`, what happens in
`shadowmmu.machine`. The shell decodes, checks, submits, lets the machine step, writes the journal, and only then sends.
It gives up peers that have fallen silent, and measures how long answers to kicks take.

A turn of the event loop reads up to 64 messages, then makes up to `STEPS_PER_TURN` steps; so neither starves the other.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog
from hdrh.histogram import HdrHistogram

from shadowmmu.client import Endpoint
from shadowmmu.machine import (
    Attached,
    GivenUp,
    HostAsked,
    HostDone,
    Runner,
    ToVcpu,
    VcpuSent,
    boot_inputs,
)
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.machine.vm_config import welcome
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.peers import Peer, Peers
from shadowmmu.protocol import (
    FROM_MMU,
    GUEST_MODE,
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
PATIENT_TURNS: Final = 4
"""Parked operations wait so many turns for messages that are on their way, before they go on early."""
VERY_PATIENT_TURNS: Final = 100
"""The same for operations at a point at which nothing has fallen yet."""
BOOT_TICKET: Final = 0

_NO_SESSION: Final = (State.DETACHED, State.ENDED)

log = structlog.get_logger(__name__)


class MmuService:
    """One machine served to its peers.

    `config`: the run's; `journal`: where records go; `listeners` hear the events. `on_vcpu_lost(number, text)` is
    called when a vCPU is given up. `endpoint` must be started by the user after `begin_serving`.
    """

    def __init__(
        self,
        config: m.RunConfig,
        journal: JournalFile,
        heartbeat: float,
        *listeners: EventListener,
        on_vcpu_lost: Callable[[int, str], object] = lambda _number, _text: None,
    ) -> None:
        self._config = config
        self._journal = journal
        self._heartbeat = heartbeat
        self._on_vcpu_lost = on_vcpu_lost
        self.runner = Runner(config, journal.write, *listeners)
        self.peers = Peers()
        self.endpoint: Endpoint | None = None
        self.counters: Counter[str] = Counter()
        self.kick_latency = HdrHistogram(1, 60_000_000, 3)
        self._out: list[tuple[Peer, m.Message]] = []
        self._tickets: dict[int, tuple[Peer, int]] = {}
        self._ticket = BOOT_TICKET
        self._started = False
        self._draining = False
        self._blocked = False
        self._turn_due = False
        self._quiet_turns = 0  # turns since a message came
        self._idle = asyncio.Event()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- life ----------------------------------------------------------------------------------------------------

    def start(self, vcpus: int) -> None:
        """The run begins with vCPUs 0 to `vcpus` - 1: loads the guest and lets those enter that have asked."""
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
                self._submit_vcpu(peer, body)
        self._schedule_turn()

    async def drain(self) -> str:
        """No more inputs: ends every session, finishes what is under way. Returns the event stream's digest."""
        self._draining = True
        for peer in self.peers:
            self._end(peer, ErrorCode.FINISHED, "the run is over")
        self._schedule_turn()
        await self._idle.wait()
        digest = self.runner.finish()
        self._journal.close()
        return digest

    def tick(self, now: float) -> None:
        """Heartbeats: sends those that are due, gives up who is silent. Call several times per interval."""
        for peer in self.peers:
            if peer.timer.expired(now):
                self._end(peer, ErrorCode.GIVEN_UP, f"{peer}: silent for {peer.timer.silence:.1f} s")
            elif peer.timer.due(now):
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
            self.endpoint.resume()
            self._schedule_turn()

    # --- messages in ---------------------------------------------------------------------------------------------

    def on_message(self, address: bytes, frames: list[bytes]) -> None:
        """A peer's message."""
        self._quiet_turns = 0
        peer = self.peers.get(address)
        known = peer is not None
        if peer is None:
            peer = Peer(address, HeartbeatTimer(self._heartbeat, time.monotonic()))
        try:
            envelope = TO_MMU.decode(frames)
            if known:
                self._check_contents(peer, envelope)
            act = peer.session.receive(envelope)
            if act and isinstance(envelope.body, m.Attach):
                self._attach(peer, envelope.body)
        except RemoteProtocolError as error:
            self._refuse(peer, error)
            return
        peer.timer.heard(time.monotonic())
        if act:
            self._act(peer, envelope)

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
        place = self.peers.attach(peer, attach)
        if place.vcpu is not None:
            self.runner.submit(Attached(place.vcpu, place.incarnation))
        log.info("attached", peer=attach.name, role=attach.role.value, vcpu=place.vcpu)
        self._out.append((peer, welcome(self._config, place.vcpu, place.incarnation, self._heartbeat)))

    def _refuse(self, peer: Peer, error: RemoteProtocolError) -> None:
        self.counters[f"errors.{error.code.value}"] += 1
        log.warning("refused", peer=str(peer), code=error.code.value, text=error.text)
        assert self.endpoint is not None
        self.endpoint.send(peer.address, FROM_MMU.encode(error_reply(error)))
        if error.info.ends and self.peers.get(peer.address) is peer:
            self._end(peer, error.code, error.text)

    def _act(self, peer: Peer, envelope: Envelope) -> None:
        body = envelope.body
        match body:
            case m.HostRequest():
                self._host_request(peer, body, envelope.seq)
            case m.Detach() if peer.vcpu is None:
                self._end(peer, ErrorCode.DETACHED, "")
            case m.Enter() | m.Detach() if not self._started:
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

    def _host_request(self, peer: Peer, request: m.HostRequest, seq: int) -> None:
        text = self.runner.machine.host_refusal(request.operation)
        if text is not None:
            self._out.append((peer, m.ErrorReply(ErrorCode.BAD_ARGUMENT.value, text, seq)))
            return
        self._ticket += 1
        self._tickets[self._ticket] = (peer, request.request)
        self.runner.submit(HostAsked(self._ticket, request.operation, request.paced))

    # --- sessions' ends ------------------------------------------------------------------------------------------

    def on_peer_lost(self, address: bytes, reason: ErrorCode, undelivered: int) -> None:
        """The transport cannot reach a peer, or its queue is full."""
        peer = self.peers.get(address)
        if peer is not None:
            self._end(peer, reason, f"{peer}: {undelivered} messages could not be delivered")
            self._schedule_turn()

    def _end(self, peer: Peer, code: ErrorCode, text: str) -> None:
        """Ends a session at our wish; of a vCPU, its incarnation too."""
        number = peer.vcpu
        if number is None:
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
            more = not self._blocked and self._step()
            outputs = self.runner.take_outputs()
            self._journal.flush()
            for output in outputs:
                self._deliver(output)
            out, self._out = self._out, []
            for peer, body in out:
                if peer.session.state not in _NO_SESSION:
                    self._send(peer, body)
        except Exception as error:  # noqa: BLE001 - a defect ends the service, loudly, not one callback quietly
            self.fail(error)
            return
        if more:
            self._schedule_turn()
        elif self._draining and not self._blocked:
            self._idle.set()

    def _step(self) -> bool:
        """Makes steps; True if there is more to do. Parked operations go on when no message came for some turns."""
        turns = VERY_PATIENT_TURNS if self.runner.machine.parked_uncovered else PATIENT_TURNS
        patient = self._quiet_turns < turns
        more = self.runner.step(STEPS_PER_TURN, resume_parked=not patient)
        self._quiet_turns += 1
        return more or (patient and self.runner.machine.parked)

    def _deliver(self, output: ToVcpu | HostDone) -> None:
        match output:
            case HostDone():
                asked = self._tickets.pop(output.ticket, None)
                if asked is not None and asked[0].session.attached:
                    self._send(asked[0], m.HostReply(asked[1], output.result, output.gfns))
            case ToVcpu():
                peer = self.peers.vcpu(output.vcpu)
                if peer is None or peer.session.incarnation != output.incarnation:
                    return
                body = output.body
                match body:
                    case m.Kick() if peer.session.state not in GUEST_MODE or peer.session.entry != body.entry:
                        return  # its Exit has come already and waits in the lane: that is the answer
                    case m.Kick():
                        peer.kicked_at = peer.kicked_at or time.monotonic()
                    case m.Ended():
                        self._say_ended(peer, body)
                        return
                    case _:
                        pass
                self._send(peer, body)

    def _send(self, peer: Peer, body: m.Message) -> None:
        assert self.endpoint is not None
        self.endpoint.send(peer.address, FROM_MMU.encode(peer.session.send(body)))
        peer.timer.sent(time.monotonic())
