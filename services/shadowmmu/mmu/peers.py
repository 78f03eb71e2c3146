"""The peers of an MMU service: one session each, and who is which vCPU.

Nothing is kept of a sender that has not attached; so strangers cost nothing. Incarnations are numbered over all
peers, from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shadowmmu.protocol import MMU, ErrorCode, HeartbeatTimer, RemoteProtocolError, Session, Side
from shadowmmu.protocol import messages as m

__all__ = ["MAX_HOST_AGENTS", "Peer", "Peers"]

MAX_HOST_AGENTS: Final = 8
MAX_PROBES: Final = 64


class Peer:
    """An attached sender. `address` is its routing id; `held` what it asked for before the run began."""

    __slots__ = ("address", "held", "kicked_at", "name", "session", "timer")

    def __init__(self, address: bytes, timer: HeartbeatTimer) -> None:
        self.address = address
        self.session = Session(MMU, Side.SERVICE)
        self.timer = timer
        self.name = ""
        self.held: list[m.Enter | m.Detach] = []
        self.kicked_at: float | None = None

    @property
    def vcpu(self) -> int | None:
        return self.session.vcpu

    def __str__(self) -> str:
        role = self.session.role
        what = "peer" if role is None else f"vCPU {self.vcpu}" if role is m.Role.VCPU else role.value
        return f"{what} ({self.name})"


class Peers:
    """All peers by routing id, and the vCPUs by number.

    `vcpus_max`: how many vCPUs the machine may have; None before that is known.
    """

    def __init__(self) -> None:
        self._by_address: dict[bytes, Peer] = {}
        self._by_vcpu: dict[int, Peer] = {}
        self._incarnations = 0
        self.vcpus_max: int | None = None

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_address.values()))

    def get(self, address: bytes) -> Peer | None:
        """The peer that sends from there, if one is attached."""
        return self._by_address.get(address)

    def vcpu(self, number: int) -> Peer | None:
        """The peer that is vCPU `number`."""
        return self._by_vcpu.get(number)

    @property
    def vcpus(self) -> list[int]:
        """The numbers of the vCPUs that are attached."""
        return sorted(self._by_vcpu)

    def attach(self, peer: Peer, attach: m.Attach) -> m.Attached:
        """Gives an attaching peer its place: the number of a vCPU.

        Raises RemoteProtocolError if there is no place. The other fields are for the caller to set.
        """
        vcpu = self._place(attach)
        self._incarnations += 1
        self._by_address[peer.address] = peer
        peer.name = attach.name
        if vcpu is not None:
            self._by_vcpu[vcpu] = peer
        return m.Attached(vcpu, self._incarnations, vpid=False, heartbeat=0.0)

    def _place(self, attach: m.Attach) -> int | None:
        match attach.role:
            case m.Role.HOST | m.Role.PROBE:
                limit = MAX_HOST_AGENTS if attach.role is m.Role.HOST else MAX_PROBES
                if sum(peer.session.role is attach.role for peer in self) >= limit:
                    raise RemoteProtocolError(
                        ErrorCode.RUN_FULL, f"{limit} {attach.role.value}s are attached"
                    )
                return None
            case _:
                return self._vcpu_number(attach.vcpu)

    def _vcpu_number(self, wanted: int | None) -> int:
        limit = 256 if self.vcpus_max is None else self.vcpus_max
        if wanted is None:
            free = next((number for number in range(limit) if number not in self._by_vcpu), None)
            if free is None:
                raise RemoteProtocolError(ErrorCode.RUN_FULL, f"all {limit} vCPUs are attached")
            return free
        if wanted >= limit:
            raise RemoteProtocolError(ErrorCode.UNKNOWN_VCPU, f"vCPU {wanted}; there are {limit}")
        if wanted in self._by_vcpu:
            raise RemoteProtocolError(ErrorCode.VCPU_TAKEN, f"vCPU {wanted} is attached")
        return wanted

    def remove(self, peer: Peer) -> None:
        """Forgets a peer whose session has ended."""
        self._by_address.pop(peer.address, None)
        if peer.vcpu is not None and self._by_vcpu.get(peer.vcpu) is peer:
            del self._by_vcpu[peer.vcpu]
