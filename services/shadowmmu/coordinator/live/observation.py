"""A run at a moment, as the live page and Prometheus see it. Pure.

Built from the coordinator's state machine; nothing here is kept, and nothing is changed by looking.
"""

from __future__ import annotations

import enum
from importlib.metadata import version

import msgspec

from shadowmmu.coordinator.aggregate import merge_counters
from shadowmmu.coordinator.coverage import Coverage, coverage_of
from shadowmmu.coordinator.members import Member
from shadowmmu.coordinator.progress import snapshot_of
from shadowmmu.coordinator.report import throughput_of
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import Phase
from shadowmmu.coordinator.series import Sample, sampled_counters
from shadowmmu.protocol.messages import Role, RunConfig, Verdict

__all__ = ["LiveMember", "LiveRun", "MemberState", "Observation", "observe"]


class MemberState(enum.Enum):
    """How a member of the run is."""

    JOINED = "joined"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    ABSENT = "absent"
    REPORTED = "reported"
    LOST = "lost"


class LiveMember(msgspec.Struct, frozen=True):
    """A member of the run. `text`: why it is absent or lost. The counts are a vCPU's own, so far."""

    member: int
    role: Role
    name: str
    vcpu: int | None
    state: MemberState
    text: str
    instructions: int
    tlb_hits: int
    tlb_misses: int


class LiveRun(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run, in the words of docs/REPORT.md.

    `run` is made from the run's number: the same after a restart of the coordinator. `verdict` is None until there is
    one. `sample`: what the next sample of the series would be; its `seconds` are 0 before the guests have started.
    """

    run: str
    version: str
    started: str
    phase: Phase
    detail: str
    verdict: Verdict | None
    text: str
    violation: str | None
    config: RunConfig
    vcpus: int
    instructions: int
    sample: Sample
    throughput: dict[str, float]
    coverage: Coverage
    problems: list[str]
    notes: list[str]
    members: list[LiveMember]


class Observation(msgspec.Struct, frozen=True):
    """A `LiveRun`, all counters of the run, and those of each vCPU."""

    run: LiveRun
    counters: dict[str, int]
    vcpus: dict[int, dict[str, int]]


def observe(state: RunState, name: str, started: str, now: float) -> Observation:
    """The run now, by the state's clock. `name`: of the run; `started`: see `LiveRun`."""
    counters = merge_counters(member.counters for member in state.members)
    progress = snapshot_of(state, state.finished_at or now)
    violation = state.violation
    run = LiveRun(
        run=name,
        version=version("shadowmmu"),
        started=started,
        phase=state.phase,
        detail=progress.detail,
        verdict=state.verdict if state.phase is Phase.FINISHED else None,
        text=state.text,
        violation=None
        if violation is None
        else f"Rule {violation.rule.value}, {violation.name}: {violation.text}",
        config=state.settings.config,
        vcpus=state.vcpus,
        instructions=state.instructions,
        sample=Sample(round(progress.seconds, 3), sampled_counters(counters)),
        throughput=throughput_of(counters, progress.seconds),
        coverage=coverage_of(counters),
        problems=list(state.problems),
        notes=list(state.notes),
        members=[_live_member(member) for member in state.members],
    )
    vcpus: dict[int, dict[str, int]] = {}
    for member in state.members:
        if member.role is Role.VCPU and member.vcpu is not None:
            vcpus[member.vcpu] = merge_counters([vcpus.get(member.vcpu, {}), member.counters])
    return Observation(run, counters, vcpus)


def _live_member(member: Member) -> LiveMember:
    return LiveMember(
        member=member.number,
        role=member.role,
        name=member.name,
        vcpu=member.vcpu,
        state=_state_of(member),
        text=member.lost or (member.absent_reason if member.absent else ""),
        instructions=member.counters.get("vcpu.instructions", 0),
        tlb_hits=member.counters.get("vcpu.tlb_hits", 0),
        tlb_misses=member.counters.get("vcpu.tlb_misses", 0),
    )


def _state_of(member: Member) -> MemberState:
    if member.report is not None:
        return MemberState.REPORTED
    if not member.live:
        return MemberState.LOST
    if member.absent:
        return MemberState.ABSENT
    if member.done:
        return MemberState.DONE
    if member.started:
        return MemberState.RUNNING
    return MemberState.READY if member.ready else MemberState.JOINED
