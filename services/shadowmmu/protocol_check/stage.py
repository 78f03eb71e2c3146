"""One scene played to one client: the sockets, the machine behind them, and the session in between.

Relies on `shadowmmu.machine` for real answers, on `Session` for what is legal, on `Judge` for the rest. It knows no
processes: `check_client` starts the client and asks the stage how far it is.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

import msgspec

from shadowmmu.client import Endpoint
from shadowmmu.kvm import Kvm
from shadowmmu.machine import Attached, GivenUp, HostAsked, Runner, ToVcpu, VcpuSent, boot_inputs, welcome
from shadowmmu.protocol import (
    GUEST_MODE,
    MMU,
    TO_MMU,
    Envelope,
    ErrorCode,
    RemoteProtocolError,
    Session,
    Side,
    State,
    error_reply,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.heartbeat import HeartbeatTimer
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.judge import Judge, Verdicts
from shadowmmu.protocol_check.scene import Scene

__all__ = ["TICK_SECONDS", "Stage"]

TICK_SECONDS: Final = 0.02
CROSSING_SECONDS: Final = 1.0
"""How long messages of an ended session may still arrive that were on their way."""
FIRST_INCARNATION: Final = 70_001
"""An incarnation is any number; this one needs more than a byte."""
STEPS: Final = 256
VCPU: Final = 0
BOOT_TICKET: Final = 0
TOKEN_BYTES: Final = 16
RESUME_INTERVALS: Final = 12
"""How long a client may take to see that its connection is lost, and to resume."""

_BLAMED: Final = {
    ErrorCode.MALFORMED: ClientCheck.FRAMING,
    ErrorCode.TOO_LARGE: ClientCheck.FRAMING,
    ErrorCode.BAD_PART_COUNT: ClientCheck.FRAMING,
    ErrorCode.UNSUPPORTED_VERSION: ClientCheck.FRAMING,
    ErrorCode.UNEXPECTED_MESSAGE: ClientCheck.ORDER,
    ErrorCode.ALREADY_ATTACHED: ClientCheck.ORDER,
    ErrorCode.NOT_ATTACHED: ClientCheck.ORDER,
    ErrorCode.STALE_INCARNATION: ClientCheck.NUMBERS,
    ErrorCode.SEQUENCE_GAP: ClientCheck.NUMBERS,
    ErrorCode.STALE_ENTRY: ClientCheck.ENTRIES,
    ErrorCode.UNKNOWN_ENTRY: ClientCheck.ENTRIES,
    ErrorCode.UNKNOWN_REQUEST: ClientCheck.WALKS,
    ErrorCode.CREDIT_EXCEEDED: ClientCheck.CREDITS,
    ErrorCode.UNKNOWN_FRAME: ClientCheck.TRANSLATIONS,
}


class _Peer(msgspec.Struct):
    """Who sends from one connection."""

    address: bytes
    session: Session
    timer: HeartbeatTimer | None = None
    ended_at: float | None = None
    lost_at: float | None = None  # when its connection was lost


class _BadContentsError(RemoteProtocolError):
    """A message that could be read, but says what no vCPU can say."""


class Stage:
    """Serves whoever connects to `address`; the first that attaches as a vCPU is the client. Use in a running loop.

    `attempts`: Attach messages seen; `attached_at`: when the first was answered; `left`: the client has detached in
    order; `ended_at`: when we ended its session; `reattached`: it attached again after that; `kinds`: the types of
    the messages taken, and `messages` how many they were, without heartbeats.
    """

    def __init__(self, scene: Scene, verdicts: Verdicts, kick_seconds: float) -> None:
        self.scene = scene
        self.judge = Judge(scene.name, verdicts, kick_seconds)
        self.attempts = 0
        self.attached_at: float | None = None
        self.ended_at: float | None = None
        self.left = False
        self.reattached = False
        self.kinds: set[type] = set()
        self.messages = 0
        self._runner = Runner(scene.config, lambda _data: None)
        self._peers: dict[bytes, _Peer] = {}
        self._taken: dict[int, m.Message] = {}  # what the client has said on this connection, by number
        self._gone: set[bytes] = set()  # connections that were lost
        self._client: _Peer | None = None
        self._incarnation = FIRST_INCARNATION - 1
        self._turning = False
        self._loop = asyncio.get_running_loop()
        self._ticker: asyncio.TimerHandle | None = None
        self.failure: Exception | None = None
        """A defect of the kit, to be raised by whoever watches."""
        self._endpoint = Endpoint.router(
            self._on_message, on_failure=self._failed, hard_limit=TO_MMU.hard_limit
        )
        self.address = self._endpoint.bind("tcp://127.0.0.1:*")
        self._boot()
        self._endpoint.start()
        self._tick()

    def _boot(self) -> None:
        self._runner.submit(Attached(VCPU, BOOT_TICKET))
        for item in boot_inputs(self.scene.config, 1):
            self._runner.submit(item)
            while self._runner.step(STEPS):
                pass
        self._runner.take_outputs()

    async def close(self) -> None:
        """Closes the socket."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self._endpoint.close()

    def _failed(self, error: Exception) -> None:
        self.failure = error
        if self._ticker is not None:
            self._ticker.cancel()

    def leave(self) -> None:
        """Ends the client's session in good order, if it has one."""
        if self._client is not None and self._client.session.attached:
            self.end(ErrorCode.FINISHED.value, "the scene is over")

    @property
    def attached(self) -> bool:
        """The client has a session."""
        return self._client is not None and self._client.session.attached

    # --- the scene's hand ----------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self._loop.time()

    @property
    def session(self) -> Session:
        assert self._client is not None
        return self._client.session

    @property
    def kvm(self) -> Kvm:
        return self._runner.machine.kvm

    def fail(self, check: ClientCheck, text: str) -> None:
        self.judge.fail(check, text)

    def exercise(self, *checks: ClientCheck) -> None:
        self.judge.exercise(*checks)

    def submit(self, body: m.VcpuMessage) -> None:
        assert not isinstance(body, m.Attach | m.Resume | m.Heartbeat | m.HostRequest)
        self._runner.submit(VcpuSent(VCPU, body))
        self._turn()

    def host(self, operation: m.HostOperation) -> None:
        if self._runner.machine.host_refusal(operation) is None:
            self._runner.submit(HostAsked(1, operation))
            self._turn()

    def send(self, body: m.MmuMessage, *, late: bool = False) -> None:
        peer = self._client
        if peer is None or not (peer.session.attached or isinstance(body, m.Attached)):
            return
        if isinstance(body, m.Kick) and not self._kickable(body):
            return
        self._transmit(peer, peer.session.send(body))
        self.judge.sent(body, self.now, late=late)
        if isinstance(body, m.Ended):
            peer.ended_at = self.now
            if body.code == ErrorCode.DETACHED.value:
                self.left = True
            else:
                self.ended_at = self.now
        self.scene.after(self, body)

    def send_crossing(self, body: m.MmuMessage) -> None:
        session = self.session
        envelope = Envelope(session.incarnation, session.send_seq, body)
        session.send_seq += 1
        assert self._client is not None
        self._transmit(self._client, envelope)

    def end(self, code: str, text: str) -> None:
        # The machine knows the registry's codes only.
        self._runner.submit(GivenUp(VCPU, ErrorCode.GIVEN_UP.value, text))
        self._runner.take_outputs()
        self.send(m.Ended(code, text))

    def _kickable(self, kick: m.Kick) -> bool:
        return self.session.state in GUEST_MODE and self.session.entry == kick.entry

    # --- messages ------------------------------------------------------------------------------------------------

    def lose_connection(self) -> None:
        peer = self._client
        assert peer is not None
        peer.lost_at = self.now

    def _transmit(self, peer: _Peer, envelope: Envelope) -> None:
        if peer.lost_at is None:
            for _ in range(self.scene.times(envelope)):
                self._endpoint.send(peer.address, self.scene.frames(envelope))
        if peer.timer is not None:
            peer.timer.sent(self.now)

    def _on_message(self, address: bytes, frames: list[bytes]) -> None:
        peer = self._peers.get(address)
        if address in self._gone or (peer is not None and peer.lost_at is not None):
            self.judge.refused(self.now)  # it lives; what it says is lost
            return
        if peer is None:
            peer = self._peers[address] = _Peer(address, Session(MMU, Side.SERVICE))
        try:
            envelope = TO_MMU.decode(frames)
            if isinstance(envelope.body, m.Resume):
                self._resume(peer, envelope, envelope.body)
                return
            repeated = peer.session.repeated(envelope)
            if isinstance(envelope.body, m.Attach) and self._refuses(peer):
                return
            if peer is self._client and peer.session.attached and not repeated:
                self._check_contents(envelope)
            acts = peer.session.receive(envelope)
        except RemoteProtocolError as error:
            self._refuse(peer, error)
            return
        if isinstance(envelope.body, m.Attach):
            self._attach(peer, envelope.body)
        elif repeated:
            if self._taken.get(envelope.seq) not in (None, envelope.body):
                self.fail(ClientCheck.NUMBERS, f"number {envelope.seq} was given to two messages")
            answer = peer.session.answer(envelope.seq)
            if answer is not None:
                self._transmit(peer, answer)
        elif peer is self._client:
            self._taken[envelope.seq] = envelope.body
            self._heard(envelope.body, acts=acts)
        elif isinstance(envelope.body, m.Detach):
            self._transmit(peer, peer.session.send(m.Ended(ErrorCode.DETACHED.value)))

    def _resume(self, stranger: _Peer, envelope: Envelope, body: m.Resume) -> None:
        """The client goes on over another connection."""
        peer = self._client
        if peer is None or stranger is peer:
            stranger.session.receive(envelope)  # which refuses it
            return
        if self.left and not peer.session.attached and envelope.incarnation == peer.session.incarnation:
            # Its Ended was lost with the connection.
            code = ErrorCode.STALE_INCARNATION
            over = RemoteProtocolError(code, "it has left", incarnation=envelope.incarnation)
            self._transmit(stranger, error_reply(over))
            return
        peer.session.receive(envelope)
        del self._peers[peer.address]
        self._gone.add(peer.address)
        peer.address = stranger.address
        self._peers[peer.address] = peer
        peer.lost_at = None
        self._taken.clear()
        self.exercise(ClientCheck.RESUME)
        self.judge.resumed(self.now)
        for again in peer.session.resume(body):
            self._transmit(peer, again)

    def _check_contents(self, envelope: Envelope) -> None:
        refusal = self._runner.machine.refusal(VCPU, envelope.body)
        if refusal is None:
            return
        code, text = refusal
        kind = _BadContentsError if code is ErrorCode.MALFORMED else RemoteProtocolError
        raise kind(code, text, incarnation=envelope.incarnation, seq=envelope.seq)

    def _refuses(self, peer: _Peer) -> bool:
        self.attempts += 1
        refusal = self.scene.refuses_attach(self.attempts)
        if refusal is None:
            return False
        self._transmit(peer, Envelope(0, 0, refusal))
        self.attached_at = self.ended_at = self.now
        return True

    def _refuse(self, peer: _Peer, error: RemoteProtocolError) -> None:
        self._transmit(peer, error_reply(error))
        self.judge.refused(self.now)
        if peer.ended_at is not None and error.code in (ErrorCode.NOT_ATTACHED, ErrorCode.STALE_INCARNATION):
            # What was on its way may come even after an Attach over another connection.
            if self.now - peer.ended_at > CROSSING_SECONDS:
                self.fail(ClientCheck.ENDED, f"a message of a session that has ended: {error.text}")
        elif not self.attempts or peer.session.state is State.ATTACHING:
            check = _BLAMED.get(error.code, ClientCheck.ATTACH)
            check = ClientCheck.FRAMING if check is ClientCheck.FRAMING else ClientCheck.ATTACH
            self.fail(check, f"its first message was refused: {error}")
        elif error.code is ErrorCode.NOT_RESUMABLE:
            self.fail(ClientCheck.RESUME, f"its Resume was refused: {error.text}")
        elif error.code is ErrorCode.STALE_INCARNATION and not error.incarnation:
            self.fail(ClientCheck.ATTACH, f"a message without an incarnation, besides Attach: {error.text}")
        else:
            self.fail(self._blamed(error), f"message {error.seq} was refused: {error}")
        if error.info.ends and peer.session.attached:
            if peer is self._client:
                self.end(error.code.value, error.text)
            else:
                self._transmit(peer, peer.session.send(m.Ended(error.code.value, error.text)))

    def _blamed(self, error: RemoteProtocolError) -> ClientCheck:
        if self.scene.blame in (ClientCheck.REPEATED, ClientCheck.RESUME):
            return self.scene.blame  # what is done twice or not at all shows in numbers of all kinds
        return (
            ClientCheck.ACCESSES
            if isinstance(error, _BadContentsError)
            else _BLAMED.get(error.code, ClientCheck.ATTACH)
        )

    def _attach(self, peer: _Peer, attach: m.Attach) -> None:
        if attach.role is not m.Role.VCPU:
            self._welcome_other(peer, attach)
            return
        before = self._client
        taken = before is not None and before is not peer and before.session.attached
        if taken and before is not None and before.lost_at is not None:
            self.fail(ClientCheck.RESUME, "it attached anew in the place of resuming, as it said that it can")
        if taken or attach.vcpu not in (None, VCPU):
            code = ErrorCode.UNKNOWN_VCPU if attach.vcpu not in (None, VCPU) else ErrorCode.RUN_FULL
            self._transmit(peer, peer.session.send(m.ErrorReply(code.value, "there is one vCPU, number 0")))
            return
        self.exercise(ClientCheck.ATTACH)
        self.reattached = self.ended_at is not None
        self._client = peer
        self._taken.clear()
        peer.ended_at = None
        if self.attached_at is None:
            self.attached_at = self.now
        self._incarnation += 1
        self._runner.submit(Attached(VCPU, self._incarnation))
        peer.timer = HeartbeatTimer(self.scene.heartbeat, self.now)
        token = os.urandom(TOKEN_BYTES) if attach.resumable else b""
        self.send(welcome(self.scene.config, VCPU, self._incarnation, self.scene.heartbeat, token))

    def _welcome_other(self, peer: _Peer, attach: m.Attach) -> None:
        """Probes are welcome; a host agent is nobody's client here."""
        if attach.role is m.Role.PROBE:
            self._incarnation += 1
            body = m.Attached(None, self._incarnation, vpid=True, heartbeat=self.scene.heartbeat)
            self._transmit(peer, peer.session.send(body))
        else:
            refusal = m.ErrorReply(ErrorCode.RUN_FULL.value, "no host agents here")
            self._transmit(peer, peer.session.send(refusal))

    def _heard(self, body: m.Message, *, acts: bool) -> None:
        self.exercise(ClientCheck.FRAMING, ClientCheck.NUMBERS, ClientCheck.ORDER)
        assert isinstance(body, m.VcpuMessage)
        self.judge.heard(body, self.now)
        if not isinstance(body, m.Heartbeat):
            self.kinds.add(type(body))
            self.messages += 1
        handled = self.scene.heard(self, body)
        if acts and not handled and not isinstance(body, m.Heartbeat):
            self.submit(body)

    # --- the machine ---------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Lets the machine go on until it waits for somebody, and delivers what it says."""
        if self._turning:
            return  # by way of a scene that reacts to what is being delivered
        self._turning = True
        try:
            delivered = True
            while delivered:
                while self._runner.step(STEPS):
                    pass
                outputs = self._runner.take_outputs()
                delivered = bool(outputs)
                for output in outputs:
                    if isinstance(output, ToVcpu):
                        self._deliver(output)
        finally:
            self._turning = False

    def _deliver(self, output: ToVcpu) -> None:
        peer = self._client
        if peer is None or peer.session.incarnation != output.incarnation:
            return
        for body in self.scene.outgoing(self, output.body):
            self.send(body)

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)
        now = self.now
        self.judge.tick(now)
        for peer in self._peers.values():
            silent = 0.0 if peer.lost_at is None or not peer.session.attached else now - peer.lost_at
            if silent > RESUME_INTERVALS * self.scene.heartbeat:
                peer.lost_at = None
                self.fail(
                    ClientCheck.RESUME,
                    f"it did not resume within {RESUME_INTERVALS} heartbeat intervals without a connection",
                )
            if peer.timer is not None and peer.session.attached and peer.timer.due(now):
                self._transmit(peer, peer.session.send(m.Heartbeat()))
        if self.attached:
            self.scene.tick(self)
