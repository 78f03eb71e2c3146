"""Who takes part in a run, and what the coordinator knows of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import msgspec

from shadowmmu.protocol.heartbeat import HeartbeatTimer
from shadowmmu.protocol.messages import Report, Role

__all__ = ["Member", "Recovery"]

_ROLE_NAMES = {
    Role.MMU: "MMU service",
    Role.VCPU: "vCPU worker",
    Role.HOST: "host agent",
    Role.PROBE: "probe",
}


class Member(msgspec.Struct, kw_only=True):
    """A place in the run, from its first Join to the end of the run; processes may follow one another in it.

    `number` counts the joins from 1; `peer` is what the transport knows its present connection by (None: it has none,
    the member is *absent*, for `absent_for` seconds so far, because of `absent_reason`). `token` ties the present
    process to the place; `vcpu_token` is the one that the MMU service gave it. `lost` says why it is not a member any
    more, `lost_at` when (seconds, the clock of `RunState`). `earlier`: counters of the processes before this one.

    Of the present connection: `welcomed` (it was sent Joined), `start_sent`, `drain_sent`.
    """

    number: int
    peer: Hashable | None
    role: Role
    name: str
    endpoint: str
    token: bytes
    timer: HeartbeatTimer
    welcomed: bool = False
    start_sent: bool = False
    drain_sent: bool = False
    ready: bool = False
    vcpu: int | None = None
    vcpu_token: bytes = b""
    started: bool = False
    done: bool = False
    drained: bool = False
    counters: dict[str, int] = {}
    earlier: dict[str, int] = {}
    report: Report | None = None
    absent_for: float = 0.0
    absent_reason: str = ""
    lost: str | None = None
    lost_at: float = 0.0

    @property
    def live(self) -> bool:
        """Still has its place, present or not."""
        return self.lost is None

    @property
    def present(self) -> bool:
        """Live, and connected."""
        return self.live and self.peer is not None

    @property
    def absent(self) -> bool:
        """Live, and not connected: it may join again, or be replaced."""
        return self.live and self.peer is None

    def count(self, told: Mapping[str, int]) -> None:
        """Its process told its counters.

        Those of a host agent begin with 0 in each process and are added to those of the processes before. A vCPU's go
        on with its program, except that a replacement knows of them only when it has been entered. The MMU service's
        follow from its journal.
        """
        if self.role is Role.MMU:
            self.counters = dict(told)
        else:
            both = max if self.role is Role.VCPU else int.__add__
            names = self.earlier.keys() | told.keys()
            self.counters = {name: both(self.earlier.get(name, 0), told.get(name, 0)) for name in names}

    def connect(self, peer: Hashable, timer: HeartbeatTimer) -> None:
        """The member is here, on a new connection."""
        self.peer = peer
        self.timer = timer
        self.welcomed = self.start_sent = self.drain_sent = False
        self.absent_for = 0.0
        self.absent_reason = ""

    def replace(self, name: str, endpoint: str, token: bytes) -> None:
        """Another process takes the place."""
        self.name = name
        self.endpoint = endpoint
        self.token = token
        self.earlier = self.counters
        self.ready = False

    def __str__(self) -> str:
        """For people: "vCPU worker 3 (vCPU 1, vcpu-worker-77)"."""
        details = self.name if self.vcpu is None else f"vCPU {self.vcpu}, {self.name}"
        return f"{_ROLE_NAMES[self.role]} {self.number} ({details})"


class Recovery(msgspec.Struct, kw_only=True):
    """A member was absent, since `lost_at`, because of `reason`; `back_at` is None if it did not come back.

    `replaced_by`: the name of another process that took its place; None: it was the same one. Times in seconds, the
    clock of `RunState`.
    """

    member: int
    role: Role
    name: str
    vcpu: int | None
    reason: str
    lost_at: float
    back_at: float | None = None
    replaced_by: str | None = None
