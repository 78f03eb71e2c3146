"""The sessions of a service that was killed, made again from its journal.

A session's state is a function of the messages that count. Their bodies stand in the journal or come out of the
replay, in the order in which the service took and gave them; so the same sessions arise as there were, without
connections: each waits for its peer to resume. Heartbeats are in no journal, but numbers begin anew when a peer
resumes.
"""

from __future__ import annotations

import pickle

import msgspec

from shadowmmu.client.access import ANYBODY
from shadowmmu.machine import (
    Attached,
    GivenUp,
    HostAsked,
    HostAttached,
    HostDone,
    HostEnded,
    HostRefused,
    Output,
    ToVcpu,
    VcpuSent,
    welcome,
)
from shadowmmu.machine.journal import Record
from shadowmmu.mmu.peers import Peer, Peers
from shadowmmu.protocol import GUEST_MODE, Envelope, ErrorCode, HeartbeatTimer, Session
from shadowmmu.protocol import messages as m

__all__ = ["RecoveredSessions", "freeze", "host_answer", "late_kick"]


def late_kick(session: Session, body: m.Message) -> bool:
    """A kick of an entry whose Exit has come already and waits in the lane: that is the answer, so it is not sent."""
    return isinstance(body, m.Kick) and (session.state not in GUEST_MODE or session.entry != body.entry)


def host_answer(session: Session, request: int, output: HostDone | HostRefused) -> m.HostReply | m.ErrorReply:
    """What a host agent is told of its request."""
    if isinstance(output, HostRefused):
        seq = session.requests.get(request, 0)
        # Who has no token may be of version 1.0, which knows of no number but the message's.
        return m.ErrorReply(ErrorCode.BAD_ARGUMENT.value, output.text, seq, request if session.token else 0)
    return m.HostReply(request, output.result, output.gfns)


class _Frozen(msgspec.Struct, frozen=True):
    peers: Peers
    tickets: dict[int, tuple[int, int]]
    last_ticket: int
    started: bool


def freeze(peers: Peers, tickets: dict[int, tuple[int, int]], last_ticket: int, *, started: bool) -> bytes:
    """What a service adds to a snapshot, to be thawed by RecoveredSessions."""
    return pickle.dumps(_Frozen(peers, tickets, last_ticket, started), pickle.HIGHEST_PROTOCOL)


class RecoveredSessions:
    """Takes the records and outputs of a replay, in order; `peers` and `tickets` are then the service's.

    `heartbeat`: the interval, in seconds; `now`: when the peers' silence begins. `tickets`: by ticket, the incarnation
    of the host agent and its number for the request. `started`: the run has begun; `last_ticket`: the highest so far.
    """

    def __init__(self, config: m.RunConfig, heartbeat: float, now: float) -> None:
        self.peers = Peers()
        self.tickets: dict[int, tuple[int, int]] = {}
        self.last_ticket = 0
        self.started = False
        self._config = config
        self._heartbeat = heartbeat
        self._now = now

    def thaw(self, frozen: bytes) -> None:
        """Begins with what a service had put into a snapshot (`freeze`)."""
        state = pickle.loads(frozen)  # noqa: S301 - our own, as the snapshot around it
        assert isinstance(state, _Frozen)
        self.peers, self.tickets, self.last_ticket, self.started = (
            state.peers,
            state.tickets,
            state.last_ticket,
            state.started,
        )
        for peer in self.peers:
            self.peers.move(peer, None)

    def wake(self, now: float) -> None:
        """The replay is over: the peers' silence begins."""
        for peer in self.peers:
            peer.timer = HeartbeatTimer(peer.timer.interval, now)

    def on_input(self, record: Record) -> None:
        """The service consumed this."""
        match record:
            case Attached(incarnation=0):
                pass  # a vCPU that nobody was yet
            case Attached():
                replaced = self.peers.vcpu(record.vcpu)
                if replaced is not None:
                    self.peers.remove(replaced)
                self._attached(m.Role.VCPU, record.vcpu, record.incarnation, record.token)
            case HostAttached():
                self._attached(m.Role.HOST, None, record.incarnation, record.token)
            case HostEnded():
                peer = self.peers.incarnation(record.incarnation)
                if peer is not None:
                    self.peers.remove(peer)
            case VcpuSent():
                self._took(self.peers.vcpu(record.vcpu), record.body)
            case HostAsked(incarnation=0):
                self.started = True  # the guest's boot is asked for by the service itself
            case HostAsked():
                self.last_ticket = max(self.last_ticket, record.ticket)
                self.tickets[record.ticket] = (record.incarnation, record.request)
                request = m.HostRequest(record.request, record.operation, record.paced)
                self._took(self.peers.incarnation(record.incarnation), request)
            case GivenUp(code=ErrorCode.REPLACED.value):
                peer = self.peers.vcpu(record.vcpu)
                if peer is not None:
                    self.peers.remove(peer)
            case _:
                pass

    def on_output(self, output: Output) -> None:
        """The machine answered this."""
        match output:
            case ToVcpu():
                peer = self.peers.vcpu(output.vcpu)
                if peer is None or peer.session.incarnation != output.incarnation:
                    return
                if isinstance(output.body, m.Ended):
                    self.peers.remove(peer)
                elif not late_kick(peer.session, output.body):
                    peer.session.send(output.body)
            case HostDone() | HostRefused():
                asked = self.tickets.pop(output.ticket, None)
                peer = None if asked is None else self.peers.incarnation(asked[0])
                if asked is not None and peer is not None:
                    peer.session.send(host_answer(peer.session, asked[1], output))

    def _attached(self, role: m.Role, vcpu: int | None, incarnation: int, token: bytes) -> None:
        peer = Peer(None, HeartbeatTimer(self._heartbeat, self._now), ANYBODY)
        peer.name = role.value
        peer.session.receive(Envelope(0, 0, m.Attach(role, peer.name, vcpu, resumable=bool(token))))
        peer.session.send(welcome(self._config, vcpu, incarnation, self._heartbeat, token))
        self.peers.add(peer, incarnation, vcpu, token)

    @staticmethod
    def _took(peer: Peer | None, body: m.VcpuMessage) -> None:
        if peer is not None:
            session = peer.session
            session.receive(Envelope(session.incarnation, session.receive_seq, body))
