"""Fuzz target `service`: the whole MMU service without sockets, two hostile peers and a vCPU that is honest.

The input says what the hostile ones send (legal messages, well-formed ones out of place, raw bytes), when the
service takes its turns, how time goes by, and when connections are lost. Promised: no exception; a message that is refused
reaches neither machine nor journal; the honest vCPU is only sent what is legal and is refused nothing; it goes on at the latest
when the hostile ones are gone; mmu_audit finds nothing; what is kept for peers is bounded.

A guest whose vCPUs or host break its memory may be shut down: that much they may do, as on real machines.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, get_args

import structlog

from shadowmmu.kvm import mmu_audit
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.peers import MAX_HOST_AGENTS, MAX_PROBES
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import (
    FROM_MMU,
    HOST_CREDITS,
    MMU,
    TO_MMU,
    VERSION_FRAME,
    Envelope,
    ErrorCode,
    LocalProtocolError,
    RemoteProtocolError,
    Session,
    Side,
    error_info,
)
from shadowmmu.protocol import messages as m
from tests.fuzz.honest import FIRST_PAGE, HonestVcpu
from tests.fuzz.post import Post
from tests.fuzz.steering import Hints, Steering, build

__all__ = ["run"]

CONFIG: Final = m.RunConfig(
    park_rate=0.1, park_steps=20, host_rate=0.0, audit=m.Audit.NEVER, memory_pages=1024, mmu_pages=64
)
VCPUS: Final = 3
HONEST: Final = b"honest"
HOSTILE: Final = (b"hostile 0", b"hostile 1")
FIRST_PFN: Final = 0x100000
MOST_ACTS: Final = 150
PATIENCE: Final = 4000
"""Turns in which the honest vCPU must get an answer once it is alone. A parked operation waits 100 at most."""
ROUNDS: Final = 12
"""Answers that it must get then."""

UP: Final[tuple[type, ...]] = get_args(m.VcpuMessage)
EVERYTHING: Final[tuple[type, ...]] = get_args(m.Message)
GVAS: Final = tuple((0xFFFF8800 << 32) + (page << 12) for page in (0, 1, 2, 3, FIRST_PAGE, FIRST_PAGE + 1))


class _Hostile:
    """One that sends anything. Its session knows what would be legal, as far as it can."""

    def __init__(self, address: bytes) -> None:
        self.address = address
        self.session = Session(MMU, Side.PEER)

    def hints(self) -> Hints:
        session = self.session
        return {
            "entry": [session.entry, session.entry, session.entry + 1],
            "walk": [session.walk + 1, session.walk + 1, session.walk],
            "request": [session.request + 1],
            "gva": GVAS,
            "gpa": [0, 8, 0x1000, 0x3000, FIRST_PAGE << 12],
            "pfn": [FIRST_PFN + page for page in (0, 1, 2, 3, 4, FIRST_PAGE, FIRST_PAGE + 1)],
            "gfn": [0, 1, 2, 3, 512, FIRST_PAGE, FIRST_PAGE + 1],
            "gfns": [0, 1, 2, 512, FIRST_PAGE],
            "npages": [0, 1, 2, 512],
            "slot": [0, 1, 2],
            "vcpu": [0, 1, 2],
            "targets": [0, 1, 2],
            "size": [8, 4, 1],
            "flags": [0, 1, 2, 4],
            "error_code": [0, 2, 3],
        }

    def legal(self, body: Any) -> list[bytes]:
        """The message numbered as it should be; if it is not legal at all, as if it were."""
        try:
            envelope = self.session.send(body)
        except LocalProtocolError:
            envelope = Envelope(self.session.incarnation, self.session.send_seq, body)
        return TO_MMU.encode(envelope)

    def hear(self, frames: list[bytes]) -> Envelope:
        envelope = FROM_MMU.decode(frames)
        with suppress(RemoteProtocolError):  # it has broken its own session
            self.session.receive(envelope)
        return envelope


class _World:
    """The service and its peers."""

    def __init__(self) -> None:
        self.post = Post()
        journal = JournalFile(None)
        self.service = MmuService(Prepared(Runner(CONFIG, journal.write), journal), 1.0, patience=0.0)
        self.service.endpoint = self.post  # type: ignore[assignment]
        self.service.start(VCPUS)
        self.now = 0.0
        self.hostile = [_Hostile(address) for address in HOSTILE]
        self.honest = HonestVcpu("honest")
        self.over = False  # the run ends: nobody says anything any more

    async def turn(self) -> None:
        """The honest vCPU's messages go in; the service takes a turn; what it says is delivered."""
        outbox, self.honest.outbox = self.honest.outbox, []
        for frames in outbox if not self.over else ():
            self.service.on_message(HONEST, frames)
        self.service.on_batch()
        await asyncio.sleep(0)
        if self.service.failure.done():
            self.service.failure.result()
        for frames in self.post.fetch(HONEST):
            self.honest.receive(frames)
        for peer in self.hostile:
            for frames in self.post.fetch(peer.address):
                peer.hear(frames)
        if self.honest.ends and not self.honest.session.attached and not self.honest.shut_down:
            assert self.honest.ends[-1] in ("given-up", "finished"), self.honest.ends
            if self.honest.ends[-1] == "given-up":
                self.honest.attach()

    async def attack(self, peer: _Hostile, frames: Sequence[bytes]) -> None:
        """A message of a hostile peer; if it is refused, nothing has happened."""
        for box in self.post.fetch(peer.address):
            peer.hear(box)
        records = self.service.runner.records
        peers = len(list(self.service.peers))
        self.service.on_message(peer.address, list(frames))
        answers = self.post.fetch(peer.address)
        for answer in answers:
            envelope = peer.hear(answer)
            body = envelope.body
            if isinstance(body, m.ErrorReply) and not envelope.seq:
                info = error_info(body.code)
                assert info is not None
                if not info.ends:
                    assert self.service.runner.records == records, (
                        f"refused with {body}, and yet in the journal"
                    )
                    assert len(list(self.service.peers)) == peers, f"refused with {body}, and yet a peer"

    def lose(self, peer: _Hostile, reason: ErrorCode) -> None:
        """Its connection is lost; it may come back."""
        self.service.on_peer_lost(peer.address, reason, 1)
        peer.session = Session(MMU, Side.PEER)

    async def resume(self, peer: _Hostile, missing: int) -> None:
        """Its connection is lost, and it goes on over another one; it is honest about what it has if `missing` is 0."""
        self.service.on_peer_lost(peer.address, ErrorCode.UNREACHABLE, 1)
        session = peer.session
        peer.address += b"'"
        resume = m.Resume(session.token, max(session.continuity.received - missing, 0))
        await self.attack(peer, TO_MMU.encode(Envelope(session.incarnation, 0, resume)))

    def end_others(self) -> None:
        """All but the honest vCPU are gone for good."""
        for peer in self.service.peers:
            if peer.address != HONEST:
                self.service._end(peer, ErrorCode.GIVEN_UP, "silent")

    def tick(self, seconds: float) -> None:
        """Time goes by; the honest vCPU lives."""
        self.now += seconds
        self.service.tick(self.now)
        self.honest.beat()

    def check_bounds(self) -> None:
        service = self.service
        # Peers that can resume stay for a while when their connection is lost; there are so many places.
        assert len(list(service.peers)) <= VCPUS + MAX_HOST_AGENTS + MAX_PROBES
        assert len(service._hosts.tickets) <= HOST_CREDITS * MAX_HOST_AGENTS
        for lane in service.runner.machine.lanes:
            assert len(lane.queue) <= m.LOG_CREDITS + 2
        known = {code.value for code in ErrorCode}
        assert all(name.removeprefix("errors.") in known for name in service.counters if "errors." in name)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    return asyncio.new_event_loop()


def run(data: bytes) -> None:
    """One input; raises AssertionError, or whatever escaped, on a finding."""
    _loop().run_until_complete(_run(Steering(data)))


async def _run(steering: Steering) -> None:
    world = _World()
    while world.honest.answers < 4:
        await world.turn()
    for _ in range(MOST_ACTS):
        if steering.done:
            break
        await _act(world, steering)
    world.check_bounds()
    world.end_others()
    await _goes_on(world)
    await _finish(world)


async def _act(world: _World, steering: Steering) -> None:
    what = steering.byte()
    peer = world.hostile[what & 1]
    match what >> 1 & 15:
        case 0 | 1 | 2 | 3 | 4 | 5:
            await world.attack(peer, peer.legal(build(steering.pick(UP), steering, peer.hints())))
        case 6:
            role = steering.pick((m.Role.VCPU, m.Role.HOST, m.Role.VCPU, m.Role.PROBE))
            await world.attack(peer, peer.legal(m.Attach(role, "x", resumable=bool(steering.below(2)))))
            await world.turn()
        case 7:
            await world.attack(peer, peer.legal(m.Enter()))
            await world.turn()
        case 8:
            host: Any = build(m.HostRequest, steering, peer.hints())
            await world.attack(peer, peer.legal(host))
        case 9:
            exit_: Any = build(m.Exit, steering, peer.hints())
            await world.attack(peer, peer.legal(exit_))
        case 10:
            body: Any = build(steering.pick(EVERYTHING), steering, peer.hints())
            numbers = steering.integer(0, 1 << 63), steering.integer(0, 1 << 63)
            frames = [VERSION_FRAME, *TO_MMU.encode(Envelope(*numbers, body))[1:]]
            await world.attack(peer, frames)
        case 11:
            frames = [steering.take(steering.below(32)) for _ in range(steering.below(4))]
            await world.attack(peer, frames)
        case 12 if steering.below(2):
            world.lose(peer, steering.pick((ErrorCode.UNREACHABLE, ErrorCode.SLOW_CONSUMER)))
        case 12:
            await world.resume(peer, steering.below(3))
        case 13:
            world.tick(steering.below(16) / 4)
        case _:
            for _ in range(1 + steering.below(8)):
                await world.turn()


async def _goes_on(world: _World) -> None:
    """Alone, the honest vCPU is served, unless its guest was broken."""
    wanted = world.honest.answers + ROUNDS
    for _ in range(PATIENCE):
        if world.honest.answers >= wanted or world.honest.shut_down:
            return
        await world.turn()
    raise AssertionError(
        f"the honest vCPU stands still in state {world.honest.session.state}: {world.service.runner.machine.waiting()}"
    )


async def _finish(world: _World) -> None:
    """What is under way comes to its end, and the structures of the MMU agree with each other."""
    machine = world.service.runner.machine
    world.over = True
    drained = asyncio.ensure_future(world.service.drain())
    for _ in range(PATIENCE):
        if drained.done():
            break
        await world.turn()
    assert drained.done(), f"the service does not come to its end: {machine.waiting()}"
    await drained
    if not machine.tasks():
        assert not list(mmu_audit(machine.kvm))
