"""Who takes part in a run, and what the coordinator knows of each."""

from __future__ import annotations

from collections.abc import Hashable

import msgspec

from shadowmmu.protocol.heartbeat import HeartbeatTimer
from shadowmmu.protocol.messages import Report, Role

__all__ = ["Member"]

_ROLE_NAMES = {
    Role.MMU: "MMU service",
    Role.VCPU: "vCPU worker",
    Role.HOST: "host agent",
    Role.PROBE: "probe",
}


class Member(msgspec.Struct, kw_only=True):
    """A process of the run, from its Join to the end of the run.

    `number` counts the joins from 1; `peer` is what the transport knows it by. `lost` says why it is not a member any
    more, `lost_at` when (seconds, the clock of `RunState`).
    """

    number: int
    peer: Hashable
    role: Role
    name: str
    endpoint: str
    timer: HeartbeatTimer
    welcomed: bool = False
    ready: bool = False
    vcpu: int | None = None
    started: bool = False
    done: bool = False
    drained: bool = False
    counters: dict[str, int] = {}
    report: Report | None = None
    lost: str | None = None
    lost_at: float = 0.0

    @property
    def live(self) -> bool:
        """Still taking part."""
        return self.lost is None

    def __str__(self) -> str:
        """For people: "vCPU worker 3 (vCPU 1, vcpu-worker-77)"."""
        details = self.name if self.vcpu is None else f"vCPU {self.vcpu}, {self.name}"
        return f"{_ROLE_NAMES[self.role]} {self.number} ({details})"
