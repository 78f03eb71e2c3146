"""A coordinator and an MMU service for tests of workers: as little as a worker needs, every message checked.

Both run in the test's event loop on loopback sockets. The MMU service walks by arithmetic (the host frame of an address
is the address), applies accesses to a dictionary, and enters again at once; no KVM is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from shadowmmu.client import Endpoint
from shadowmmu.protocol import (
    COORDINATOR,
    FROM_COORDINATOR,
    FROM_MMU,
    MMU,
    TO_COORDINATOR,
    TO_MMU,
    Direction,
    LocalProtocolError,
    ProtocolError,
    Service,
    Session,
    Side,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.states import GUEST_MODE, State

LIMIT = 30.0  # seconds: for any one thing to happen
HEARTBEAT = 0.2
ALL_RIGHTS = int(AccessFlag.MAY_WRITE | AccessFlag.MAY_USER | AccessFlag.MAY_FETCH | AccessFlag.DIRTY)

VCPU_SCRIPT = Path(__file__).with_name("simple_program.py")


class Peer:
    """One connection of a fake service."""

    def __init__(self, service: Service, routing_id: bytes) -> None:
        self.id = routing_id
        self.session = Session(service, Side.SERVICE)
        self.heard: list[m.Message] = []
        self.entered = 0
        self.paced: list[m.HostRequest] = []

    def all(self, kind: type) -> list[m.Message]:
        return [body for body in self.heard if isinstance(body, kind)]

    def count(self, kind: type) -> int:
        return len(self.all(kind))


class FakeService:
    """A ROUTER with a session per peer. A message that is not legal is kept in `refused`, not answered."""

    service: Service
    incoming: Direction
    outgoing: Direction

    def __init__(self, heartbeat: float) -> None:
        self.heartbeat = heartbeat
        self.peers: dict[bytes, Peer] = {}
        self.refused: list[str] = []
        self.silent = False  # sends nothing, not even heartbeats
        self.beats = 0
        self._changed = asyncio.Event()
        self._endpoint = Endpoint.router(self._on_message, hard_limit=self.incoming.hard_limit)
        self.address = self._endpoint.bind("tcp://127.0.0.1:*")
        self._beat_handle: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._endpoint.start()
        self._beat()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._beat_handle is not None:
            self._beat_handle.cancel()
        await self._endpoint.close()

    def _beat(self) -> None:
        for peer in self.peers.values():
            if peer.session.attached and peer.session.incarnation:
                with contextlib.suppress(LocalProtocolError):  # not in every state
                    self.send(peer, m.Heartbeat())
        self.beats += 1
        self._changed.set()
        self._beat_handle = asyncio.get_running_loop().call_later(self.heartbeat, self._beat)

    def _on_message(self, routing_id: bytes, frames: list[bytes]) -> None:
        peer = self.peers.setdefault(routing_id, Peer(self.service, routing_id))
        try:
            envelope = self.incoming.decode(frames)
            act = peer.session.receive(envelope)
        except ProtocolError as error:  # the test looks at it
            self.refused.append(repr(error))
        else:
            peer.heard.append(envelope.body)
            if act:
                self.handle(peer, envelope.body)
        self._changed.set()

    def handle(self, peer: Peer, body: m.Message) -> None:
        raise NotImplementedError

    def send(self, peer: Peer, body: m.Message) -> None:
        if not self.silent:
            self._endpoint.send(peer.id, self.outgoing.encode(peer.session.send(body)))

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds, which is asked after each message and each heartbeat."""
        async with asyncio.timeout(LIMIT):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class FakeCoordinator(FakeService):
    """Welcomes members at once; the test says when the run starts, drains, finishes."""

    service, incoming, outgoing = COORDINATOR, TO_COORDINATOR, FROM_COORDINATOR

    def __init__(self, config: m.RunConfig, mmu_endpoint: str, heartbeat: float = HEARTBEAT) -> None:
        super().__init__(heartbeat)
        self.config = config
        self.mmu_endpoint = mmu_endpoint
        self.members: list[Peer] = []

    def handle(self, peer: Peer, body: m.Message) -> None:
        if isinstance(body, m.Join):
            self.members.append(peer)
            self.send(peer, m.Joined(len(self.members), self.config, self.mmu_endpoint, self.heartbeat))

    @property
    def member(self) -> Peer:
        """The only one."""
        (peer,) = self.members
        return peer

    async def ready(self, members: int = 1) -> None:
        await self.until(lambda: sum(peer.session.state is State.READY for peer in self.members) == members)

    def start(self, vcpus: int | None = None) -> None:
        for peer in self.members:
            self.send(peer, m.Start(vcpus or len(self.members)))

    async def reports(self) -> list[m.Report]:
        """Waits for all members' reports."""
        await self.until(lambda: self.members and all(peer.count(m.Report) for peer in self.members))
        return [body for peer in self.members for body in peer.heard if isinstance(body, m.Report)]

    def drain(self) -> None:
        for peer in self.members:
            self.send(peer, m.Drain())

    def finish(self, verdict: m.Verdict = m.Verdict.PASS) -> None:
        for peer in self.members:
            self.send(peer, m.Finished(verdict, "that was it"))


class FakeMmu(FakeService):
    """Serves vCPUs and host agents. `holding`: kinds of messages that are not answered while they are in it."""

    service, incoming, outgoing = MMU, TO_MMU, FROM_MMU

    def __init__(self, heartbeat: float = HEARTBEAT) -> None:
        super().__init__(heartbeat)
        self.holding: set[type] = set()
        self.halted: dict[int, Peer] = {}
        self.memory: dict[tuple[int, int], int] = defaultdict(int)
        self.counts: Counter[str] = Counter()
        self._incarnations = 0

    def vcpu(self, number: int = 0) -> Peer:
        """The peer that is (or was) this vCPU."""
        return next(peer for peer in self.peers.values() if peer.session.vcpu == number)

    @property
    def host(self) -> Peer:
        return next(peer for peer in self.peers.values() if peer.session.role is m.Role.HOST)

    def kick(self, peer: Peer) -> bool:
        """Kicks, if the vCPU is in guest mode."""
        if peer.session.state not in GUEST_MODE:
            return False
        self.send(peer, m.Kick(peer.session.entry))
        return True

    def end(self, peer: Peer, code: str, text: str = "") -> None:
        """Ends the incarnation."""
        self.send(peer, m.Ended(code, text))

    def handle(self, peer: Peer, body: m.Message) -> None:
        self.counts[type(body).__name__] += 1
        if type(body) in self.holding:
            return
        match body:
            case m.Attach():
                number = None
                if body.role is m.Role.VCPU:
                    taken = {other.session.vcpu for other in self.peers.values() if other.session.attached}
                    number = min(set(range(256)) - taken)
                self._incarnations += 1
                self.send(peer, m.Attached(number, self._incarnations, vpid=True, heartbeat=self.heartbeat))
            case m.Enter():
                self._enter(peer)
            case m.Log():
                for flags, _, pfn, _, value in body.accesses:
                    self._access(pfn, body.accesses[0][1], flags, value)
                self.send(peer, m.Applied(1))
            case m.Walk():
                pfn = body.gva >> 12 & (1 << 36) - 1
                self.send(peer, m.Walked(body.entry, body.walk, pfn, 1, ALL_RIGHTS))
            case m.Load():
                _, gva, pfn, _, _ = body.access
                self.send(peer, m.Loaded(body.entry, self.memory[pfn, gva & 0xFFF]))
            case m.Locked():
                self.send(peer, m.Loaded(body.entry, self._locked(body)))
            case m.Exit():
                self._exited(peer, body.reason)
            case m.HostRequest():
                self._host_request(peer, body)
            case m.Detach():
                self.end(peer, "detached")
            case _:
                pass

    def _enter(self, peer: Peer, interrupts: Sequence[int] = ()) -> None:
        peer.entered += 1
        self.send(peer, m.Entered(peer.entered, interrupts=list(interrupts)))

    def _access(self, pfn: int, gva: int, flags: int, value: int) -> None:
        if flags & AccessFlag.WRITE:
            self.memory[pfn, gva & 0xFFF] = value

    def _locked(self, body: m.Locked) -> int:
        _, gva, pfn, _, operand = body.access
        cell = pfn, gva & 0xFFF
        old = self.memory[cell]
        match body.op:
            case m.LockedOp.XCHG:
                self.memory[cell] = operand
            case m.LockedOp.XADD:
                self.memory[cell] = (old + operand) & (1 << 64) - 1
            case m.LockedOp.CMPXCHG if old == body.expected:
                self.memory[cell] = operand
            case _:
                pass
        return old

    def _exited(self, peer: Peer, reason: m.ExitReason) -> None:
        match reason:
            case m.HaltExit():
                assert peer.session.vcpu is not None
                self.halted[peer.session.vcpu] = peer
                return
            case m.SendIpiExit():
                for target in reason.targets:
                    halted = self.halted.pop(target, None)
                    if halted is not None:
                        self._enter(halted, [reason.vector])
            case _:
                pass
        self._enter(peer)

    def _host_request(self, peer: Peer, body: m.HostRequest) -> None:
        peer.paced.append(body)
        if not body.paced:
            self.start_paced(peer)

    def start_paced(self, peer: Peer, count: int | None = None) -> None:
        """The guest has come far enough for so many more requests (None: all)."""
        due, peer.paced = peer.paced[:count], [] if count is None else peer.paced[count:]
        for request in due:
            self.send(peer, m.HostReply(request.request, 1))


class Child:
    """A worker as a real process. Use as an async context manager: it never outlives it."""

    def __init__(self, script: Path, coordinator: str, **options: object) -> None:
        self._arguments = [str(script), coordinator, json.dumps(options)]
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await asyncio.wait_for(self.process.communicate(), LIMIT)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    @property
    def stopped(self) -> bool:
        """By SIGSTOP."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    async def ended(self) -> tuple[int, str]:
        """Its exit status and what it said."""
        output, _ = await asyncio.wait_for(self.process.communicate(), LIMIT)
        assert self.process.returncode is not None
        return self.process.returncode, output.decode()
