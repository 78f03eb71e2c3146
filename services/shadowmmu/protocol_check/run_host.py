"""A coordinator for a client that takes part in runs: as much as a worker needs to get to its MMU service.

Joined, Start with one vCPU, Drain when it has done its share, Finished. What the client says here has to be legal, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shadowmmu.client import Endpoint
from shadowmmu.protocol import (
    COORDINATOR,
    FROM_COORDINATOR,
    TO_COORDINATOR,
    Envelope,
    LocalProtocolError,
    RemoteProtocolError,
    Session,
    Side,
    State,
    error_reply,
)
from shadowmmu.protocol import messages as m

__all__ = ["RunHost"]


class RunHost:
    """The coordinator of a run with one worker, in the running loop. `refused(text)` is called for what is illegal."""

    def __init__(
        self, config: m.RunConfig, mmu_address: str, heartbeat: float, refused: Callable[[str], object]
    ) -> None:
        self._config = config
        self._mmu_address = mmu_address
        self._heartbeat = heartbeat
        self._refused = refused
        self._peers: dict[bytes, Session] = {}
        self._members = 0
        self._endpoint = Endpoint.router(self._on_message, hard_limit=TO_COORDINATOR.hard_limit)
        self.address = self._endpoint.bind("tcp://127.0.0.1:*")
        self._endpoint.start()
        self._loop = asyncio.get_running_loop()
        self._ticker = self._loop.call_later(heartbeat, self._tick)

    async def close(self) -> None:
        """Closes the socket."""
        self._ticker.cancel()
        await self._endpoint.close(linger=0.1)

    @property
    def used(self) -> bool:
        """Somebody has joined."""
        return bool(self._peers)

    def drain(self) -> None:
        """Tells every member to execute nothing more."""
        for address, session in self._peers.items():
            if session.state in (State.JOINED, State.READY, State.RUNNING):
                self._send(address, m.Drain())

    def _send(self, address: bytes, body: m.CoordinatorMessage) -> None:
        self._endpoint.send(address, FROM_COORDINATOR.encode(self._peers[address].send(body)))

    def _on_message(self, address: bytes, frames: list[bytes]) -> None:
        session = self._peers.setdefault(address, Session(COORDINATOR, Side.SERVICE))
        try:
            envelope = TO_COORDINATOR.decode(frames)
            session.receive(envelope)
        except RemoteProtocolError as error:
            self._refused(f"to the coordinator: {error}")
            self._endpoint.send(address, FROM_COORDINATOR.encode(error_reply(error)))
            return
        self._act(address, session, envelope)

    def _act(self, address: bytes, session: Session, envelope: Envelope) -> None:
        match envelope.body:
            case m.Join():
                self._members += 1
                self._send(address, m.Joined(self._members, self._config, self._mmu_address, self._heartbeat))
            case m.Ready() if session.state is State.READY:
                self._send(address, m.Start(1))
            case m.Progress(done=True) if session.state is State.RUNNING:
                self._send(address, m.Drain())
            case m.Report():
                self._send(address, m.Finished(m.Verdict.PASS))
            case _:
                pass

    def _tick(self) -> None:
        self._ticker = self._loop.call_later(self._heartbeat, self._tick)
        for address, session in self._peers.items():
            if session.attached:
                try:
                    self._send(address, m.Heartbeat())
                except LocalProtocolError:
                    continue  # between Join and Joined
