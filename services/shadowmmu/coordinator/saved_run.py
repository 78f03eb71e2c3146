"""The part of a run's state that outlives the coordinator's process. Pure.

Of a member everything but its connection is kept; of the run everything but the violation, which the checker finds
again in the stored events. Times are kept as ages (seconds before the moment of saving), because clocks start anew.
"""

from __future__ import annotations

import msgspec

from shadowmmu.coordinator.members import Member, Recovery
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import Phase, RunSettings, Stage, StartRule
from shadowmmu.protocol.heartbeat import HeartbeatTimer
from shadowmmu.protocol.messages import Report, Role

__all__ = ["SavedMember", "SavedRun", "restore_run", "save_run"]

_RESTARTED = "the coordinator was started again"


class SavedMember(msgspec.Struct, frozen=True, kw_only=True):
    """A `Member` without its connection. `absent_for`: seconds; `lost_ago`: likewise, None if it is not lost."""

    number: int
    role: Role
    name: str
    endpoint: str
    token: bytes
    ready: bool
    vcpu: int | None
    vcpu_token: bytes
    started: bool
    done: bool
    drained: bool
    counters: dict[str, int]
    earlier: dict[str, int]
    report: Report | None
    present: bool
    absent_for: float
    lost: str | None
    lost_ago: float

    @property
    def missed(self) -> bool:
        """It is absent, and somebody waits for it."""
        return not self.present and self.lost is None and self.report is None


class SavedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run at a moment. `began_ago` and so on: seconds before that moment."""

    settings: RunSettings
    run_id: bytes
    started: str  # when the run began: wall clock, ISO 8601
    phase: Phase
    stage: Stage | None
    start_rule: StartRule | None
    vcpus: int
    instructions: int
    problems: list[str]
    notes: list[str]
    members: list[SavedMember]
    recoveries: list[Recovery]
    began_ago: float
    started_ago: float | None
    drained_ago: float | None
    deadline_in: float


def save_run(state: RunState, started: str, now: float) -> SavedRun:
    """What is to be kept of a run now."""
    return SavedRun(
        settings=state.settings,
        run_id=state.run_id,
        started=started,
        phase=state.phase,
        stage=state.stage,
        start_rule=state.start_rule,
        vcpus=state.vcpus,
        instructions=state.instructions,
        problems=state.problems,
        notes=state.notes,
        members=[_save_member(member, now) for member in state.members],
        recoveries=[_shifted(one, now, -1) for one in state.recoveries],
        began_ago=now - state.began_at,
        started_ago=None if state.started_at is None else now - state.started_at,
        drained_ago=None if state.drained_at is None else now - state.drained_at,
        deadline_in=state.deadline - now,
    )


def restore_run(state: RunState, saved: SavedRun, now: float) -> None:
    """Brings a new state to where the saved one was: everybody who had a place is absent.

    The event stream is restored separately, batch by batch (`StreamState.restore`).
    """
    state.run_id = saved.run_id
    state.phase = saved.phase
    state.stage = saved.stage
    state.start_rule = saved.start_rule
    state.vcpus = saved.vcpus
    state.instructions = saved.instructions
    state.problems.extend(saved.problems)
    state.notes.extend(saved.notes)
    state.began_at = now - saved.began_ago
    state.started_at = None if saved.started_ago is None else now - saved.started_ago
    state.drained_at = None if saved.drained_ago is None else now - saved.drained_ago
    state.deadline = now + max(saved.deadline_in, 0.0)
    state.recoveries.extend(_shifted(one, now, 1) for one in saved.recoveries)
    for one in saved.members:
        member = _restore_member(one, saved.settings.heartbeat, now)
        state.roster.restore(member)
        if one.present and one.report is None:
            state.roster.disconnect(member, _RESTARTED, now)


def _save_member(member: Member, now: float) -> SavedMember:
    return SavedMember(
        number=member.number,
        role=member.role,
        name=member.name,
        endpoint=member.endpoint,
        token=member.token,
        ready=member.ready,
        vcpu=member.vcpu,
        vcpu_token=member.vcpu_token,
        started=member.started,
        done=member.done,
        drained=member.drained,
        counters=member.counters,
        earlier=member.earlier,
        report=member.report,
        present=member.present,
        absent_for=member.absent_for,
        lost=member.lost,
        lost_ago=now - member.lost_at,
    )


def _restore_member(one: SavedMember, heartbeat: float, now: float) -> Member:
    return Member(
        number=one.number,
        peer=None,
        role=one.role,
        name=one.name,
        endpoint=one.endpoint,
        token=one.token,
        timer=HeartbeatTimer(heartbeat, now),
        ready=one.ready,
        vcpu=one.vcpu,
        vcpu_token=one.vcpu_token,
        started=one.started,
        done=one.done,
        drained=one.drained,
        counters=one.counters,
        earlier=one.earlier,
        report=one.report,
        absent_for=one.absent_for,
        absent_reason=_RESTARTED,
        lost=one.lost,
        lost_at=now - one.lost_ago,
    )


def _shifted(recovery: Recovery, now: float, sign: int) -> Recovery:
    """With times relative to now (-1), or back (1)."""
    back = None if recovery.back_at is None else sign * now + recovery.back_at
    return msgspec.structs.replace(recovery, lost_at=sign * now + recovery.lost_at, back_at=back)
