"""What a run in virtual time is, and what came of it, as data.

A run is its configuration: executed again, on any machine, it gives the same result, so that nothing else needs to be
kept of it.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from shadowmmu.cpu.loads import LoadConfig
from shadowmmu.protocol.messages import RunConfig

__all__ = ["Cause", "HostActor", "HostActorKind", "Latencies", "TimedConfig", "TimedResult", "VcpuTime"]

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class HostActorKind(enum.Enum):
    """What a host thread does again and again."""

    DIRTY_LOG = "dirty-log"
    """Reads and clears the dirty log of every memory slot, as live migration does."""
    UNMAP = "unmap"
    """Takes a page of the working frames away (invalidate_page), one after the other; the guest gets it back."""
    AGE = "age"
    """Asks whether a page was used, and forgets it (clear_flush_young), one after the other."""
    MIXED = "mixed"
    """The host agent's program of stress runs."""


class HostActor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A thread of the host, on its own processor: an operation every `interval` cycles, or right after the last."""

    kind: HostActorKind
    interval: Positive


class TimedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run in virtual time.

    `load`: the guest's program; None means the workload of `run`, to the end of its `ops`. With a load each vCPU
    executes it until all have done `warmup` and then `iterations` iterations, but at most twice as many. Of `run` what
    belongs to schedulers and journals has no meaning here (park_rate, park_steps, host_rate, audit, mutant, check).
    `start_spread`: each vCPU begins at a time drawn, by the run's seed, from so many cycles. It makes runs of programs
    that draw nothing themselves differ, as runs of a real machine do. `oos_shadow`: as KVM's.
    """

    run: RunConfig
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    load: LoadConfig | None = None
    warmup: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1
    iterations: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 10
    start_spread: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)] = 100_000
    oos_shadow: bool = True
    host: tuple[HostActor, ...] = ()


class Cause(enum.Enum):
    """What a vCPU's time was spent on."""

    GUEST = "guest"  # its program: accesses that hit the TLB, and its own work
    TLB_MISS = "tlb_miss"
    FAULT_DELIVERY = "fault_delivery"
    EXIT = "exit"  # exits and entries, with their flushes and injections
    HANDLER = "handler"  # KVM's work
    LOCK = "lock"  # taking mmu_lock, and its way between processors
    LOCK_WAIT = "lock_wait"
    KICK = "kick"  # sending kicks and taking answers
    KICK_WAIT = "kick_wait"
    INTERRUPTED = "interrupted"  # taking kicks, beside the exit
    WAIT = "wait"  # for other operations: on the same host page, on memory slots
    IDLE = "idle"


class Latencies(msgspec.Struct, frozen=True):
    """A distribution of cycles; `encoded`: the whole HdrHistogram (V2, base64)."""

    count: int
    mean: float
    p50: int
    p99: int
    max: int
    encoded: str


class VcpuTime(msgspec.Struct, frozen=True):
    """One vCPU: its clock at the end, cycles by cause, and the clock at the end of each iteration."""

    cycles: int
    causes: dict[str, int]
    iterations: list[int]


class TimedResult(msgspec.Struct, frozen=True):
    """What came of a run. Times are cycles of the cost model's processors.

    `cycles`: the clock when the last vCPU was done. `iteration_cycles`: of all iterations after the warm-up, the mean
    (0 without a load). `lock_held`: time for which somebody had mmu_lock. `steps`: of the simulator.
    """

    cycles: int
    iteration_cycles: float
    vcpus: list[VcpuTime]
    causes: dict[str, int]
    lock_held: int
    counters: dict[str, int]
    latencies: dict[str, Latencies]
    steps: int
    digest: str
    """Of all of the above."""
