"""The peers of an MMU service: one session each, and who is which vCPU.

Nothing is kept of a sender that has not attached; so strangers cost nothing. Incarnations are numbered over all
peers, from 1. A peer that can resume stays one when its connection is lost, until it comes back or is given up.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Final

from shadowmmu.client import User
from shadowmmu.protocol import MMU, ErrorCode, HeartbeatTimer, RemoteProtocolError, Session, Side
from shadowmmu.protocol import messages as m

__all__ = ["MAX_HOST_AGENTS", "Peer", "Peers", "Place"]

MAX_HOST_AGENTS: Final = 8
MAX_PROBES: Final = 64


class Peer:
    """An attached sender.

    `address` is its routing id, None while it has no connection; `held` what it asked for before the run began.
    `user`: whose key it opened its session with; None if nobody's who is authorised.
    """

    __slots__ = ("address", "held", "kicked_at", "name", "session", "timer", "user")

    def __init__(self, address: bytes | None, timer: HeartbeatTimer, user: User | None) -> None:
        self.address = address
        self.user = user
        self.session = Session(MMU, Side.SERVICE)
        self.timer = timer
        self.name = ""
        self.held: list[m.Enter | m.Detach | m.HostRequest] = []
        self.kicked_at: float | None = None

    @property
    def vcpu(self) -> int | None:
        return self.session.vcpu

    @property
    def resumable(self) -> bool:
        """Whether it can go on over another connection."""
        return bool(self.session.token)

    def __str__(self) -> str:
        role = self.session.role
        what = "peer" if role is None else f"vCPU {self.vcpu}" if role is m.Role.VCPU else role.value
        return f"{what} ({self.name})"


class Place:
    """What an attaching peer gets: the number of a vCPU (None for others), and whether its program goes on (`resume`).

    `replaced`: the peer that is this vCPU until now.
    """

    __slots__ = ("replaced", "resume", "vcpu")

    def __init__(self, vcpu: int | None, *, resume: bool = False, replaced: Peer | None = None) -> None:
        self.vcpu = vcpu
        self.resume = resume
        self.replaced = replaced


class Peers:
    """All peers by routing id and by incarnation, and the vCPUs by number.

    `vcpus_max`: how many vCPUs the machine may have; None before that is known.
    """

    def __init__(self) -> None:
        self._by_address: dict[bytes, Peer] = {}
        self._by_incarnation: dict[int, Peer] = {}
        self._by_vcpu: dict[int, Peer] = {}
        # By vCPU, of its last incarnation, ended or not. The one before is good until something was heard of that.
        self._tokens: dict[int, bytes] = {}
        self._tokens_before: dict[int, bytes] = {}
        self._incarnations = 0
        self.vcpus_max: int | None = None

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_incarnation.values()))

    def get(self, address: bytes) -> Peer | None:
        """The peer that sends from there, if one is attached."""
        return self._by_address.get(address)

    def vcpu(self, number: int) -> Peer | None:
        """The peer that is vCPU `number`."""
        return self._by_vcpu.get(number)

    def incarnation(self, number: int) -> Peer | None:
        """The peer of that incarnation, if it is not over."""
        return self._by_incarnation.get(number)

    @property
    def vcpus(self) -> list[int]:
        """The numbers of the vCPUs that are attached."""
        return sorted(self._by_vcpu)

    @property
    def tokens(self) -> list[tuple[int, bytes]]:
        """(vCPU, token) of each vCPU that somebody may go on with."""
        return [(vcpu, token) for vcpu, token in sorted(self._tokens.items()) if token]

    # --- coming --------------------------------------------------------------------------------------------------

    def place(self, attach: m.Attach) -> Place:
        """Where an attaching peer belongs. Raises RemoteProtocolError if there is no place."""
        match attach.role:
            case m.Role.HOST | m.Role.PROBE:
                limit = MAX_HOST_AGENTS if attach.role is m.Role.HOST else MAX_PROBES
                if sum(peer.session.role is attach.role for peer in self) >= limit:
                    raise RemoteProtocolError(
                        ErrorCode.RUN_FULL, f"{limit} {attach.role.value}s are attached"
                    )
                return Place(None)
            case _:
                return self._vcpu_place(attach)

    def _vcpu_place(self, attach: m.Attach) -> Place:
        limit = 256 if self.vcpus_max is None else self.vcpus_max
        wanted = attach.vcpu
        if wanted is None:
            free = next((number for number in range(limit) if number not in self._by_vcpu), None)
            if free is None:
                raise RemoteProtocolError(ErrorCode.RUN_FULL, f"all {limit} vCPUs are attached")
            return Place(free)
        if wanted >= limit:
            raise RemoteProtocolError(ErrorCode.UNKNOWN_VCPU, f"vCPU {wanted}; there are {limit}")
        if attach.token:
            if not self._is_token_of(wanted, attach.token):
                raise RemoteProtocolError(ErrorCode.NOT_RESUMABLE, f"that is not the token of vCPU {wanted}")
            return Place(wanted, resume=True, replaced=self._by_vcpu.get(wanted))
        if wanted in self._by_vcpu:
            raise RemoteProtocolError(ErrorCode.VCPU_TAKEN, f"vCPU {wanted} is attached")
        return Place(wanted)

    def _is_token_of(self, vcpu: int, token: bytes) -> bool:
        """Whether its owner may take the vCPU's place. A worker may not have heard of the last incarnation's."""
        tokens = [self._tokens.get(vcpu, b"")]
        peer = self._by_vcpu.get(vcpu)
        if peer is None or not peer.session.continuity.received:
            tokens.append(self._tokens_before.get(vcpu, b""))
        return any(known and hmac.compare_digest(known, token) for known in tokens)

    def next_incarnation(self) -> int:
        """The number for the next peer."""
        return self._incarnations + 1

    def add(self, peer: Peer, incarnation: int, vcpu: int | None, token: bytes) -> None:
        """An attached peer takes its place; whoever was there has been removed."""
        self._incarnations = max(self._incarnations, incarnation)
        self._by_incarnation[incarnation] = peer
        if peer.address is not None:
            self._by_address[peer.address] = peer
        if vcpu is not None:
            self._by_vcpu[vcpu] = peer
            if vcpu in self._tokens:
                self._tokens_before[vcpu] = self._tokens[vcpu]
            self._tokens[vcpu] = token

    # --- going ---------------------------------------------------------------------------------------------------

    def move(self, peer: Peer, address: bytes | None) -> None:
        """The peer sends from another address now; None: from nowhere."""
        if peer.address is not None and self._by_address.get(peer.address) is peer:
            del self._by_address[peer.address]
        peer.address = address
        if address is not None:
            self._by_address[address] = peer

    def remove(self, peer: Peer) -> None:
        """Forgets a peer whose session has ended, or is about to."""
        if (
            peer.vcpu is not None
            and peer.session.continuity.received
            and self._by_vcpu.get(peer.vcpu) is peer
        ):
            self._tokens_before.pop(peer.vcpu, None)
        self.move(peer, None)
        for by_number, number in (
            (self._by_incarnation, peer.session.incarnation),
            (self._by_vcpu, peer.vcpu),
        ):
            if number is not None and by_number.get(number) is peer:
                del by_number[number]
