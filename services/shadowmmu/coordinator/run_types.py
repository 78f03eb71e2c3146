"""What goes into the run's state machine and what comes out of it: settings, phases, outputs."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import TypeAlias

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode

__all__ = [
    "Forget",
    "Output",
    "Phase",
    "Refuse",
    "RunSettings",
    "Send",
    "Stage",
    "StartRule",
    "Stop",
    "TakeIn",
]


class Phase(enum.Enum):
    """Where the run is."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHED = "finished"


class Stage(enum.Enum):
    """Whose reports the draining run waits for."""

    HOSTS = "host agents"
    VCPUS = "vCPU workers"
    MMU = "MMU service"
    CHECKER = "checker"


class StartRule(enum.Enum):
    """Why the run started with the number of vCPUs that it has."""

    EXPECTED = "expected"  # as many as were asked for
    STABLE = "stable"  # their number had been stable for a while
    DEADLINE = "deadline"  # it had not, but the waiting time was over


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a run is conducted. Times in seconds.

    `vcpus`: how many to wait for (None: until their number is stable); `hosts`: how many host agents to wait for.
    `stall_seconds`: longest time without any instruction executed. `drain_seconds`: longest wait for the reports of
    one kind of members; `grace_seconds`: the same once something has gone wrong. `absent_seconds`: how long a member
    that is silent or whose connection is gone may take, in a run that has begun, to join again or to be replaced.
    `window`: event batches on the way.
    """

    config: m.RunConfig
    vcpus: int | None = None
    hosts: int = 0
    wait_seconds: float = 60.0
    stable_seconds: float = 3.0
    start_seconds: float = 30.0
    stall_seconds: float = 60.0
    drain_seconds: float = 60.0
    grace_seconds: float = 15.0
    absent_seconds: float = 30.0
    heartbeat: float = 1.0
    window: int = 16


class Send(msgspec.Struct, frozen=True):
    """Send a message to a member."""

    peer: Hashable
    body: m.CoordinatorMessage


class Refuse(msgspec.Struct, frozen=True):
    """Tell a peer that its message was refused (outside of any numbering)."""

    peer: Hashable
    code: ErrorCode
    text: str


class TakeIn(msgspec.Struct, frozen=True):
    """Give this piece of the event stream to the checker, and say when that is done (`RunState.taken_in`)."""

    batch: m.EventBatch


class Forget(msgspec.Struct, frozen=True):
    """The connection is none of a member's any more: nothing will be sent to it."""

    peer: Hashable


class Stop(msgspec.Struct, frozen=True):
    """The run is over. Nothing follows."""


Output: TypeAlias = Send | Refuse | TakeIn | Forget | Stop
