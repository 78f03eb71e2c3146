"""Puts a run's report together from what its state machine and its members know."""

from __future__ import annotations

from importlib.metadata import version

from shadowmmu.coordinator.aggregate import merge_counters, merge_histograms
from shadowmmu.coordinator.coverage import coverage_of
from shadowmmu.coordinator.page_faults import page_faults_of
from shadowmmu.coordinator.report import (
    EXIT_STATUS,
    Durations,
    LostMember,
    MemberReport,
    RecoveryReport,
    RunReport,
    StreamReport,
    throughput_of,
    violation_report,
)
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.series import Series, sampled_counters
from shadowmmu.protocol.messages import Report, Role

__all__ = ["assemble_report"]


def assemble_report(state: RunState, started: str, mode: str, series: Series) -> RunReport:
    """The report of a finished run. `started`: wall-clock time, ISO 8601; `mode`: see docs/REPORT.md.

    `series` gets its last sample: the counters of the report.
    """
    counters = merge_counters(member.counters for member in state.members)
    if state.started_at is not None and state.finished_at is not None:
        series.add(state.finished_at - state.started_at, sampled_counters(counters))
    histograms, complaints = merge_histograms(
        (str(member), member.report.histograms) for member in state.members if member.report is not None
    )
    seconds = _durations(state)
    mmu = next((member for member in state.members if member.role is Role.MMU and member.report), None)
    told = Report({}) if mmu is None or mmu.report is None else mmu.report
    return RunReport(
        verdict=state.verdict,
        exit_status=EXIT_STATUS[state.verdict],
        text=state.text,
        version=version("shadowmmu"),
        started=started,
        mode=mode,
        vcpus=state.vcpus,
        start_rule=None if state.start_rule is None else state.start_rule.value,
        config=state.settings.config,
        seconds=seconds,
        violation=None if state.violation is None else violation_report(state.violation),
        problems=state.problems,
        notes=state.notes + complaints,
        lost=_lost_members(state),
        recoveries=_recoveries(state),
        stream=StreamReport(
            events=state.events,
            records=told.counters.get("records", 0),
            events_digest=told.info.get("events_digest", ""),
            journal_digest=told.info.get("journal_digest", ""),
        ),
        throughput=throughput_of(counters, seconds.running),
        counters=counters,
        histograms=histograms,
        coverage=coverage_of(counters),
        page_faults=page_faults_of(state.settings.config, counters),
        series=series.samples,
        members=_member_reports(state),
    )


def _durations(state: RunState) -> Durations:
    end = state.began_at if state.finished_at is None else state.finished_at
    started = end if state.started_at is None else state.started_at
    drained = end if state.drained_at is None else state.drained_at
    return Durations(
        waiting=round(started - state.began_at, 3),
        running=round(drained - started, 3),
        draining=round(end - drained, 3),
    )


def _lost_members(state: RunState) -> list[LostMember]:
    return [
        LostMember(
            member=member.number,
            role=member.role,
            name=member.name,
            vcpu=member.vcpu,
            seconds=None if state.started_at is None else round(member.lost_at - state.started_at, 3),
            reason=member.lost,
        )
        for member in state.members
        if member.lost is not None
    ]


def _recoveries(state: RunState) -> list[RecoveryReport]:
    start = state.began_at if state.started_at is None else state.started_at
    return [
        RecoveryReport(
            member=one.member,
            role=one.role,
            name=one.name,
            vcpu=one.vcpu,
            reason=one.reason,
            lost=round(one.lost_at - start, 3),
            back=None if one.back_at is None else round(one.back_at - start, 3),
            replaced_by=one.replaced_by,
        )
        for one in state.recoveries
    ]


def _member_reports(state: RunState) -> list[MemberReport]:
    return [
        MemberReport(
            member=member.number,
            role=member.role,
            name=member.name,
            vcpu=member.vcpu,
            reported=member.report is not None,
            counters=dict(sorted(member.counters.items())),
            info={} if member.report is None else member.report.info,
        )
        for member in state.members
    ]
