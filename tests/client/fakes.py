"""Small honest services to test clients against: an MMU service without an MMU, a coordinator without a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import zmq

from shadowmmu.client import Endpoint
from shadowmmu.protocol import (
    COORDINATOR,
    FROM_COORDINATOR,
    FROM_MMU,
    MMU,
    TO_COORDINATOR,
    TO_MMU,
    Envelope,
    ErrorCode,
    Message,
    RemoteProtocolError,
    Session,
    Side,
    error_reply,
)
from shadowmmu.protocol import messages as m


class FakeService:
    """A session per peer; `answer(peer, body)` decides what is sent back. Everything accepted is in `taken`."""

    service = MMU
    incoming = TO_MMU
    outgoing = FROM_MMU
    heartbeat = 1.0  # seconds; tests of silence make it shorter

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        self.sessions: dict[bytes, Session] = {}
        self.taken: list[tuple[bytes, Message]] = []
        self.lost: list[tuple[bytes, ErrorCode, int]] = []
        self.silent = False
        options: dict[str, Any] = {} if context is None else {"context": context}
        self.endpoint = Endpoint.router(
            self._on_frames, on_peer_lost=lambda *lost: self.lost.append(lost), **options
        )
        self.address = self.endpoint.bind("tcp://127.0.0.1:*")
        self.answers: dict[type, Callable[[bytes, Any], Message | None]] = {}

    async def __aenter__(self) -> Self:
        self.endpoint.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.endpoint.close()

    @property
    def peer(self) -> bytes:
        """The only peer."""
        (peer,) = self.sessions
        return peer

    def send(self, peer: bytes, body: Message) -> Envelope:
        envelope = self.sessions[peer].send(body)
        self.endpoint.send(peer, self.outgoing.encode(envelope))
        return envelope

    def _on_frames(self, peer: bytes, frames: list[bytes]) -> None:
        session = self.sessions.setdefault(peer, Session(self.service, Side.SERVICE))
        try:
            envelope = self.incoming.decode(frames)
            session.receive(envelope)
        except RemoteProtocolError as error:
            self.endpoint.send(peer, self.outgoing.encode(error_reply(error)))
            if error.info.ends and session.attached:
                self.send(peer, m.Ended(error.code, error.text))
            return
        self.taken.append((peer, envelope.body))
        answer = self.answers.get(type(envelope.body))
        reply = answer(peer, envelope) if answer is not None else self.answer(peer, envelope)
        if reply is not None and not self.silent:
            self.send(peer, reply)

    def answer(self, peer: bytes, envelope: Envelope) -> Message | None:
        raise NotImplementedError


class FakeMmu(FakeService):
    """Walks find the frame `gva >> 12`, except below 1 MiB until a page fault there was taken."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        super().__init__(context)
        self.mapped: set[int] = set()
        self.incarnations = 0

    def answer(self, peer: bytes, envelope: Envelope) -> Message | None:
        session = self.sessions[peer]
        body = envelope.body
        match body:
            case m.Attach():
                self.incarnations += 1
                vcpu = (body.vcpu or 0) if body.role is m.Role.VCPU else None
                return m.Attached(vcpu, self.incarnations, vpid=True, heartbeat=self.heartbeat)
            case m.Enter():
                return m.Entered(session.entry + 1, flush=True)
            case m.Exit():
                if isinstance(body.reason, m.PageFaultExit):
                    self.mapped.add(body.reason.gva >> 12)
                return m.Entered(session.entry + 1)
            case m.Walk():
                page = body.gva >> 12
                if page < 256 and page not in self.mapped:
                    return m.WalkFault(body.entry, body.walk, error_code=2)
                return m.Walked(body.entry, body.walk, page, 1, 0x100)
            case m.Load() | m.Locked():
                return m.Loaded(body.entry, body.access[4])
            case m.Log():
                return m.Applied(1)
            case m.Detach():
                return m.Ended(ErrorCode.DETACHED)
            case m.HostRequest():
                if isinstance(body.operation, m.Unmap) and body.operation.gfn > 4096:
                    return m.ErrorReply(ErrorCode.BAD_ARGUMENT, "no such gfn", envelope.seq)
                return m.HostReply(body.request, 1)
            case m.Heartbeat():
                return m.Heartbeat()
            case _:
                return None


class FakeCoordinator(FakeService):
    service = COORDINATOR
    incoming = TO_COORDINATOR
    outgoing = FROM_COORDINATOR
    config = m.RunConfig()

    def answer(self, peer: bytes, envelope: Envelope) -> Message | None:
        match envelope.body:
            case m.Join():
                return m.Joined(len(self.sessions), self.config, "tcp://127.0.0.1:1", self.heartbeat)
            case m.Heartbeat():
                return m.Heartbeat()
            case _:
                return None
