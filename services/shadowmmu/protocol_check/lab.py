"""The clients that a check of a service works with, and what is known of the service.

`Lab` makes peers, keeps all of them alive while one is waited for, and takes them away again at the end of a check.
`Vcpu` and `Host` can do what a vCPU and a host agent do: the vCPU without a TLB, as the specification permits.
"""

from __future__ import annotations

import os
import random
import time
from typing import Final, TypeVar

import zmq

from shadowmmu.protocol import FROM_MMU, ErrorCode, ProtocolError, State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import CheckFailed, CheckSkipped, require

__all__ = ["DATA", "SMALL_GFN", "USED", "WRITE", "Host", "Lab", "Vcpu", "gva_of"]

DIRECT_MAP: Final = 0xFFFF_8000_0000_0000
DATA: Final = DIRECT_MAP + 0xC0_0000
"""From here to 0xffff800000ffffff a client that is alone may store as it likes, in a guest of the default size."""
SMALL_GFN: Final = 3000
"""From here on some frames that the host backs with small pages, and that no guest program uses which is not there."""
WRITE: Final = int(AccessFlag.WRITE)
USED: Final = int(AccessFlag.USED)
LOCKED: Final = int(AccessFlag.WRITE | AccessFlag.USED | AccessFlag.LOCKED)
MOST_FAULTS: Final = 16
"""An access that faults so often in a row is served by nobody."""
RETRY_SECONDS: Final = 0.05

P = TypeVar("P", bound=Peer)


def gva_of(gfn: int) -> int:
    """Where the guest that the service boots maps a frame of its memory."""
    return DIRECT_MAP + (gfn << 12)


class Vcpu(Peer):
    """A vCPU without a TLB. `answers`: while another peer is waited for, it answers kicks."""

    answers = True
    answered = 0
    """So many kicks it has answered without looking for the entry after it."""

    def settle(self) -> None:
        """If a kick was answered meanwhile: waits until guest mode is entered again."""
        while self.answered:
            self.answered -= 1
            self.expect(m.Entered)

    def enter(self) -> m.Entered:
        """The first entry of the incarnation."""
        self.send(m.Enter())
        return self.expect(m.Entered)

    def exit(self, reason: m.ExitReason) -> m.Entered:
        """Leaves guest mode, and enters it again."""
        self.settle()
        self.send(m.Exit(self.session.entry, reason))
        return self.expect(m.Entered)

    def walk(self, gva: int, flags: int = 0) -> m.Walked | m.WalkFault:
        """Walks the tables once."""
        self.settle()
        self.send(m.Walk(self.session.entry, self.session.walk + 1, gva, flags))
        while True:
            body = self.next("the answer to a walk").body
            if isinstance(body, m.Walked | m.WalkFault):
                asked = (self.session.entry, self.session.walk)
                require(
                    (body.entry, body.walk) == asked, f"{body!r} answers walk {asked[1]} of entry {asked[0]}"
                )
                return body
            require(isinstance(body, m.Kick), f"{self.name}: {body!r} instead of the answer to a walk")

    def answer_kick(self) -> bool:
        """Leaves the entry if it was told to."""
        self.settle()
        self.drain()
        if self.kicked != self.session.entry or self.session.state is not State.IN_GUEST:
            return False
        self.exit(m.ExternalInterruptExit())
        return True

    def map(self, gva: int, flags: int = 0) -> m.Walked:
        """Takes the page faults that it needs until a walk finds a translation."""
        for _ in range(MOST_FAULTS):
            self.answer_kick()
            answer = self.walk(gva, flags)
            if isinstance(answer, m.Walked):
                self._check_rights(answer, flags)
                return answer
            self.exit(m.PageFaultExit(gva, answer.error_code, m.Instruction(flags)))
        raise CheckFailed(f"{self.name}: {gva:#x} still faults after {MOST_FAULTS} page faults")

    def _check_rights(self, walked: m.Walked, flags: int) -> None:
        need = AccessFlag.MAY_WRITE | AccessFlag.DIRTY if flags & WRITE else 0
        require(
            walked.flags & need == need,
            f"{walked!r} does not permit the access {flags:#x} that was walked for",
        )

    def access(self, gva: int, flags: int = 0, value: int = 0, size: int = 8) -> m.LoggedAccess:
        """An access by a translation that a walk gives: to be used before anybody else is waited for."""
        walked = self.map(gva, flags)
        offset = (gva >> 12) & ((1 << 9 * (walked.level - 1)) - 1)
        return flags | walked.flags, gva, walked.pfn + offset, size, value

    def log(self, *accesses: m.LoggedAccess) -> None:
        """Ships a log."""
        while not self.session.log_credits:
            self.lab.look_after(self)
            self.await_applied()
        self.send(m.Log(self.session.entry, list(accesses)))

    def await_applied(self, logs: int = 0) -> None:
        """Waits until at most so many logs are not applied."""
        until = time.monotonic() + self.lab.patience
        before = self.session.logs
        while self.session.logs > logs and (logs or self.session.logs == before):
            require(
                time.monotonic() < until, f"{self.name}: Applied did not come within {self.lab.patience:g} s"
            )
            self.lab.look_after(self)
            self._take(RETRY_SECONDS)

    def all_applied(self) -> None:
        """Waits until all logs are applied."""
        while self.session.logs:
            self.await_applied()

    def store(self, gva: int, value: int, size: int = 8) -> None:
        """Stores, by way of a log."""
        self.log(self.access(gva, WRITE, value, size))

    def load(self, gva: int, size: int = 8) -> int:
        """Loads a value."""
        access = self.access(gva, USED, size=size)
        self.send(m.Load(self.session.entry, access))
        return self.expect(m.Loaded).value

    def locked(self, gva: int, op: m.LockedOp, value: int, expected: int = 0, size: int = 8) -> int:
        """A locked operation; returns the old value."""
        access = self.access(gva, LOCKED, value, size)
        self.send(m.Locked(self.session.entry, access, op, expected))
        return self.expect(m.Loaded).value


class Host(Peer):
    """A host agent."""

    def ask(self, operation: m.HostOperation, *, paced: bool = False) -> int:
        """Sends a request; returns its number."""
        number = self.session.request + 1
        self.send(m.HostRequest(number, operation, paced))
        return number

    def request(self, operation: m.HostOperation) -> m.HostReply:
        """A request and its answer."""
        number = self.ask(operation)
        reply = self.expect(m.HostReply)
        require(reply.request == number, f"{reply!r} answers request {number}")
        return reply


class Lab:
    """Peers for one service at `address`.

    `patience`: seconds that an answer may take; `seed` and `budget` (seconds): of the random clients.
    """

    def __init__(self, address: str, patience: float, seed: int, budget: float) -> None:
        self.address = address
        self.patience = patience
        self.random = random.Random(seed)
        self.heartbeat = 1.0
        self.budget = budget
        self.vcpus = 0
        """How many vCPUs the service has, as `census` found."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._peers: list[Peer] = []
        self._made = 0

    # --- peers ---------------------------------------------------------------------------------------------------

    def socket(self, *, receive_queue: int = 1000) -> zmq.Socket[bytes]:
        """A connected DEALER with a routing id of its own."""
        socket = self._context.socket(zmq.SocketType.DEALER)
        self._made += 1
        socket.setsockopt(zmq.ROUTING_ID, b"check-" + os.urandom(8))
        socket.setsockopt(zmq.MAXMSGSIZE, FROM_MMU.hard_limit)
        socket.setsockopt(zmq.RCVHWM, receive_queue)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.address)
        return socket

    def _made_peer(self, kind: type[P], what: str) -> P:
        peer = kind(self, self.socket(), f"{what} {self._made}")
        self._peers.append(peer)
        return peer

    def stranger(self) -> Peer:
        """Somebody who is connected and has not attached."""
        return self._made_peer(Peer, "stranger")

    def vcpu(self, number: int | None = None, *, resumable: bool = False) -> Vcpu:
        """A vCPU that is attached. Waits for a place if one is about to become free. Raises CheckSkipped without."""
        if (
            len([peer for peer in self._peers if peer.session.attached and peer.session.vcpu is not None])
            >= self.vcpus
            > 0
        ):
            raise CheckSkipped(f"the service has {self.vcpus} vCPU{'s' if self.vcpus > 1 else ''} only")
        peer = self._made_peer(Vcpu, "vCPU")
        until = time.monotonic() + self.patience
        while True:
            peer.send(m.Attach(m.Role.VCPU, peer.name, number, resumable=resumable))
            answer = peer.next("Attached").body
            if isinstance(answer, m.Attached):
                return peer
            require(
                isinstance(answer, m.ErrorReply)
                and answer.code in (ErrorCode.RUN_FULL.value, ErrorCode.VCPU_TAKEN.value)
                and time.monotonic() < until,
                f"{peer.name}: {answer!r} instead of Attached",
            )
            peer.socket.poll(round(RETRY_SECONDS * 1000))

    def guest(self, number: int | None = None, *, resumable: bool = False) -> Vcpu:
        """A vCPU in guest mode."""
        vcpu = self.vcpu(number, resumable=resumable)
        vcpu.enter()
        return vcpu

    def newcomer(self) -> Vcpu:
        """A vCPU that has not attached."""
        return self._made_peer(Vcpu, "vCPU")

    def host(self, *, resumable: bool = False) -> Host:
        """A host agent that is attached."""
        host = self._made_peer(Host, "host agent")
        host.attach(m.Role.HOST, resumable=resumable)
        return host

    def probe(self) -> Peer:
        """A probe that is attached."""
        peer = self._made_peer(Peer, "probe")
        peer.attach(m.Role.PROBE)
        return peer

    def barrier(self) -> None:
        """Somebody attaches and leaves: by then the service has taken what came before, and acted on it."""
        for _ in range(2):
            peer = self._made_peer(Peer, "probe")
            peer.attach(m.Role.PROBE)
            self.dismiss(peer)

    def census(self) -> None:
        """Finds out how many vCPUs there are: attaches them until one is refused."""
        while self.vcpus < 256:
            peer = self._made_peer(Vcpu, "vCPU")
            peer.send(m.Attach(m.Role.VCPU, peer.name))
            answer = peer.next("Attached").body
            if not isinstance(answer, m.Attached):
                break
            self.heartbeat = answer.heartbeat
            self.vcpus += 1
        self.clear()

    # --- life ----------------------------------------------------------------------------------------------------

    def look_after(self, waiting: Peer) -> None:
        """While `waiting` waits: everybody's heartbeats, and answers to kicks."""
        for peer in list(self._peers):
            peer.beat()
            if peer is waiting or not isinstance(peer, Vcpu) or not peer.answers or not peer.session.attached:
                continue
            peer.drain()
            if peer.kicked == peer.session.entry and peer.session.state is State.IN_GUEST:
                peer.send(m.Exit(peer.session.entry, m.ExternalInterruptExit()))
                peer.answered += 1

    def dismiss(self, peer: Peer) -> None:
        """Detaches a peer, and closes its socket, whatever state it is in."""
        try:
            peer.drain()
            if peer.session.attached and peer.session.state is not State.LEAVING:
                if peer.session.state is State.WAITING_VALUE:
                    peer.expect(m.Loaded)
                peer.detach()
        except (CheckFailed, ProtocolError):
            pass  # whoever breaks the rules said so before
        finally:
            peer.socket.close(linger=0)
            self.forget(peer)

    def forget(self, peer: Peer) -> None:
        """Looks after a peer no more."""
        if peer in self._peers:
            self._peers.remove(peer)

    def clear(self) -> None:
        """Dismisses the peers of a check."""
        for peer in list(self._peers):
            self.dismiss(peer)

    def close(self) -> None:
        """Dismisses everybody."""
        self.clear()
        self._context.destroy(linger=0)
