"""The run as a pure state machine: who may start, when it ends, and what the verdict is.

No sockets and no clock: the user hands in messages and the time (seconds, of any clock that does not go back) and
carries out the outputs. Every wait has a deadline, so a run always ends.

    waiting   --enough vCPUs are ready-------------> starting   the MMU service gets Start
    starting  --the MMU service's first Progress---> running    workers and host agents get Start, together
    running   --all vCPUs done, violation, loss----> draining   host agents, then vCPU workers, then the MMU service
                                                                get Drain, and answer with Report
    draining  --everybody reported, events checked-> finished   everybody gets Finished

From each state a failure leads to `finished` as well: before the run has begun directly, later by way of `draining`,
to collect what is to be had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from shadowmmu.checker import Violation
from shadowmmu.coordinator.members import Member
from shadowmmu.coordinator.run_types import (
    Output,
    Phase,
    Refuse,
    RunSettings,
    Send,
    Stage,
    StartRule,
    Stop,
    TakeIn,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.heartbeat import MISSED_LIMIT, HeartbeatTimer

__all__ = [
    "Output",
    "Phase",
    "Refuse",
    "RunSettings",
    "RunState",
    "Send",
    "Stage",
    "StartRule",
    "Stop",
    "TakeIn",
]

TEXT_LIMIT = 1000
"""Longest text that goes into a message (the protocol allows 1,024 characters)."""


class RunState:
    """One run. Each input returns the outputs that it causes, to be carried out in order."""

    def __init__(self, settings: RunSettings, now: float) -> None:
        self.settings = settings
        self.phase = Phase.WAITING
        self.stage: Stage | None = None
        self.members: list[Member] = []  # everybody who ever joined, probes excepted
        self.problems: list[str] = []  # why the verdict cannot be "pass"
        self.notes: list[str] = []
        self.violation: Violation | None = None
        self.verdict = m.Verdict.UNKNOWN
        self.text = ""
        self.start_rule: StartRule | None = None
        self.vcpus = 0  # that the run started with
        self.began_at = now
        self.started_at: float | None = None
        self.drained_at: float | None = None
        self.finished_at: float | None = None
        self.events = 0  # received
        self.batches = 0  # received
        self._batches_taken = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._numbers = 0  # of members and probes, given out so far
        self._peers: dict[Hashable, Member] = {}
        self._deadline = now + settings.wait_seconds
        self._stable_since = now
        self._stable_count = (0, 0)
        self._instructions = 0
        self._moved_at = now  # when instructions were last executed
        self._out: list[Output] = []

    # --- inputs -------------------------------------------------------------------------------------------------

    def receive(self, peer: Hashable, body: m.MemberMessage, now: float) -> list[Output]:
        """A message from a peer."""
        if isinstance(body, m.Join):
            self._join(peer, body, now)
        elif peer not in self._peers:
            self._refuse(peer, ErrorCode.NOT_ATTACHED, "join first")
        else:
            member = self._peers[peer]
            member.timer.heard(now)
            if not member.live:
                self._refuse(peer, ErrorCode.GIVEN_UP, f"not a member of the run any more: {member.lost}")
            elif self.phase is Phase.FINISHED:
                self._refuse(peer, ErrorCode.RUN_FINISHED, self.text)
            else:
                self._message(member, body, now)
        return self._advance(now)

    def taken_in(self, batches: int, now: float) -> list[Output]:
        """The checker has worked off so many event batches more."""
        self._batches_taken += batches
        mmu = self._mmu
        if mmu is not None and self.phase is not Phase.FINISHED and mmu.report is None:
            self._send(mmu, m.EventCredit(batches), now)
        return self._advance(now)

    def violated(self, violation: Violation, now: float) -> list[Output]:
        """The checker found a violation: the first ends the run."""
        if self.violation is None:
            self.violation = violation
            self._end_run(now)
        return self._advance(now)

    def failed(self, text: str, now: float) -> list[Output]:
        """Something went wrong that makes the verdict unknown: the run ends in order."""
        self._problem(text, now)
        return self._advance(now)

    def gone(self, peer: Hashable, text: str, now: float) -> list[Output]:
        """The transport says that nothing more can come from or go to this peer."""
        member = self._peers.get(peer)
        if member is not None and member.live:
            self._lose(member, text, now)
        return self._advance(now)

    def tick(self, now: float) -> list[Output]:
        """Time passes; to be called a few times per heartbeat interval."""
        if self.phase is not Phase.FINISHED:
            for member in self._live():
                if not member.welcomed:
                    continue  # heartbeats begin with the welcome
                if member.timer.expired(now):
                    self._lose(member, f"nothing was heard of it for {member.timer.silence:.1f} s", now)
                elif member.timer.due(now):
                    self._send(member, m.Heartbeat(), now)
            self._check_deadlines(now)
        return self._advance(now)

    # --- what it knows ------------------------------------------------------------------------------------------

    @property
    def mmu_joined(self) -> bool:
        return self._mmu is not None

    @property
    def instructions(self) -> int:
        """Guest instructions executed, as far as is known."""
        return self._instructions

    @property
    def backlog(self) -> int:
        """Event batches that the checker has not worked off."""
        return self.batches - self._batches_taken

    def count(self, role: m.Role, *, ready: bool = False) -> int:
        """Live members of that role; only those that are ready, if asked so."""
        return sum(member.role is role and (member.ready or not ready) for member in self._live())

    def _live(self, *roles: m.Role) -> list[Member]:
        return [member for member in self.members if member.live and (not roles or member.role in roles)]

    @property
    def _mmu(self) -> Member | None:
        return next(iter(self._live(m.Role.MMU)), None)

    # --- outputs ------------------------------------------------------------------------------------------------

    def _send(self, member: Member, body: m.CoordinatorMessage, now: float) -> None:
        member.timer.sent(now)
        self._out.append(Send(member.peer, body))

    def _refuse(self, peer: Hashable, code: ErrorCode, text: str) -> None:
        self._out.append(Refuse(peer, code, text[:TEXT_LIMIT]))

    # --- messages -----------------------------------------------------------------------------------------------

    def _join(self, peer: Hashable, join: m.Join, now: float) -> None:
        if join.role is m.Role.PROBE:
            self._numbers += 1
            endpoint = "" if self._mmu is None else self._mmu.endpoint
            joined = m.Joined(self._numbers, self.settings.config, endpoint, self.settings.heartbeat)
            self._out.append(Send(peer, joined))
            return
        refusal = self._join_refusal(peer, join)
        if refusal is not None:
            self._refuse(peer, *refusal)
            return
        self._numbers += 1
        member = Member(
            number=self._numbers,
            peer=peer,
            role=join.role,
            name=join.name,
            endpoint=join.endpoint,
            timer=HeartbeatTimer(self.settings.heartbeat, now, missed=MISSED_LIMIT),
        )
        self.members.append(member)
        self._peers[peer] = member

    def _join_refusal(self, peer: Hashable, join: m.Join) -> tuple[ErrorCode, str] | None:
        known = self._peers.get(peer)
        if known is not None and known.live:
            return ErrorCode.ALREADY_ATTACHED, "this connection has joined already"
        if self.phase is Phase.FINISHED:
            return ErrorCode.RUN_FINISHED, self.text
        if self.phase is Phase.DRAINING:
            return ErrorCode.DRAINING, "the run is being drained"
        match join.role:
            case m.Role.MMU if self._mmu is not None:
                return ErrorCode.RUN_FULL, f"the run has its {self._mmu} already"
            case m.Role.MMU if not join.endpoint:
                return (
                    ErrorCode.BAD_ARGUMENT,
                    "an MMU service has to say at which endpoint it is to be reached",
                )
            case m.Role.VCPU if self.phase is not Phase.WAITING:
                return ErrorCode.RUN_FULL, f"the run has started with {self.vcpus} vCPUs"
            case m.Role.VCPU if self.count(m.Role.VCPU) == (self.settings.vcpus or 256):
                return ErrorCode.RUN_FULL, f"the run has its {self.count(m.Role.VCPU)} vCPUs"
            case _:
                return None

    def _message(self, member: Member, body: m.MemberMessage, now: float) -> None:
        match body:
            case m.Heartbeat() | m.Join():
                pass
            case m.Ready():
                member.ready = True
                member.vcpu = body.vcpu
            case m.Progress():
                self._progress(member, body, now)
            case m.EventBatch() if member.role is m.Role.MMU:
                self._event_batch(body, now)
            case m.VcpuLost() if member.role is m.Role.MMU:
                self._vcpu_lost(body, now)
            case m.Report():
                self._report(member, body, now)
            case _:
                text = f"a {type(body).__name__} is not for a {member.role.value} to send"
                self._refuse(member.peer, ErrorCode.UNEXPECTED_MESSAGE, text)

    def _progress(self, member: Member, progress: m.Progress, now: float) -> None:
        member.counters = progress.counters
        if member.role is m.Role.MMU and self.phase is Phase.STARTING:
            member.started = True  # it has taken in the Start: workers may begin
        if member.role is m.Role.VCPU:
            member.done = member.done or progress.done
            self._count_instructions(now)

    def _count_instructions(self, now: float) -> None:
        total = sum(
            member.counters.get("vcpu.instructions", 0)
            for member in self.members
            if member.role is m.Role.VCPU
        )
        if total > self._instructions:
            self._instructions = total
            self._moved_at = now

    def _event_batch(self, batch: m.EventBatch, now: float) -> None:
        self.batches += 1
        if batch.first != self.events:
            text = f"the event stream has a gap: event {self.events} should come next, and {batch.first} came"
            self._batches_taken += 1
            self._problem(text, now)
            return
        if self.backlog > self.settings.window:
            text = f"the MMU service sent more event batches than the {self.settings.window} it may"
            self._batches_taken += 1
            self._problem(text, now)
            return
        self.events += batch.count
        self._digest.update(batch.data)
        self._out.append(TakeIn(batch))
        if self.stage is Stage.MMU:
            self._deadline = now + self._stage_seconds

    def _vcpu_lost(self, lost: m.VcpuLost, now: float) -> None:
        for member in self._live(m.Role.VCPU):
            if member.vcpu == lost.vcpu:
                self._lose(member, f"the MMU service gave it up: {lost.text}", now)
                return
        self.notes.append(f"the MMU service gave vCPU {lost.vcpu} up: {lost.text}")
        if self.phase in (Phase.STARTING, Phase.RUNNING) and not any(
            member.role is m.Role.VCPU and member.vcpu == lost.vcpu for member in self.members
        ):
            self._problem(f"the MMU service gave vCPU {lost.vcpu} up, which nobody here is: {lost.text}", now)

    def _report(self, member: Member, report: m.Report, now: float) -> None:
        member.report = report
        if report.counters:
            member.counters = report.counters
        if member.role is m.Role.VCPU:
            self._count_instructions(now)
        if not member.drained:
            why = f": {report.info['error']}" if "error" in report.info else ""
            if self.phase is Phase.WAITING:
                self._lose(member, f"it gave up{why}", now)
            else:
                self._problem(f"{member} ended before it was asked to{why}", now)

    # --- members and failures -----------------------------------------------------------------------------------

    def _lose(self, member: Member, text: str, now: float) -> None:
        self._send(member, m.Ended(ErrorCode.GIVEN_UP.value, text[:TEXT_LIMIT]), now)
        member.lost = text
        member.lost_at = now
        if self.phase is Phase.WAITING and member.role is not m.Role.MMU:
            self.notes.append(f"{member} left before the run: {text}")
        elif member.report is None or not member.drained:
            self._problem(f"{member} was lost {self._when(now)}: {text}", now)

    def _when(self, now: float) -> str:
        if self.started_at is None:
            return "before the run began"
        return f"{now - self.started_at:.1f} s after the start"

    def _problem(self, text: str, now: float) -> None:
        self.problems.append(text)
        self._end_run(now)

    def _end_run(self, now: float) -> None:
        """Something ends the run early: by way of draining, if it has begun."""
        if self.phase in (Phase.WAITING, Phase.STARTING):
            self._finish(now)
        elif self.phase is Phase.RUNNING:
            self._drain(now)
        elif self.phase is Phase.DRAINING:
            self._deadline = min(self._deadline, now + self._stage_seconds)

    # --- progress of the run ------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Output]:
        if self.phase is Phase.WAITING:
            self._wait(now)
        if self.phase is Phase.STARTING and self._mmu is not None and self._mmu.started:
            self._run(now)
        if self.phase is Phase.RUNNING:
            self._start_latecomers(now)
            if all(member.done for member in self._live(m.Role.VCPU)):
                self._drain(now)
        while self.phase is Phase.DRAINING and self._stage_is_over():
            self._next_stage(now)
        out, self._out = self._out, []
        return out

    def _welcome(self, now: float) -> None:
        mmu = self._mmu
        for member in self._live():
            if not member.welcomed and (member.role is m.Role.MMU or mmu is not None):
                member.welcomed = True
                member.timer.heard(now)
                endpoint = "" if mmu is None else mmu.endpoint
                joined = m.Joined(member.number, self.settings.config, endpoint, self.settings.heartbeat)
                self._send(member, joined, now)

    def _wait(self, now: float) -> None:
        self._welcome(now)
        joined, ready = self.count(m.Role.VCPU), self.count(m.Role.VCPU, ready=True)
        if (joined, ready) != self._stable_count:
            self._stable_count = (joined, ready)
            self._stable_since = now
        if self._mmu is None or not self._mmu.ready or ready == 0:
            return
        hosts, hosts_ready = self.count(m.Role.HOST), self.count(m.Role.HOST, ready=True)
        if hosts_ready < max(hosts, self.settings.hosts):
            return
        if self.settings.vcpus is not None:
            if ready >= self.settings.vcpus:
                self._start(StartRule.EXPECTED, now)
        elif joined == ready and now - self._stable_since >= self.settings.stable_seconds:
            self._start(StartRule.STABLE, now)

    def _start(self, rule: StartRule, now: float) -> None:
        mmu = self._mmu
        assert mmu is not None
        for member in self._live(m.Role.VCPU, m.Role.HOST):
            if not member.ready:
                self._lose(member, "it was not ready when the run began", now)
        self.start_rule = rule
        self.vcpus = self.count(m.Role.VCPU, ready=True)
        self.phase = Phase.STARTING
        self._deadline = now + self.settings.start_seconds
        self._send(mmu, m.Start(self.vcpus), now)

    def _run(self, now: float) -> None:
        self.phase = Phase.RUNNING
        self.started_at = self._moved_at = now
        for member in self._live(m.Role.VCPU, m.Role.HOST):
            member.started = True
            self._send(member, m.Start(self.vcpus), now)

    def _start_latecomers(self, now: float) -> None:
        """A host agent may join a run that has begun."""
        self._welcome(now)
        for member in self._live(m.Role.HOST):
            if member.ready and not member.started:
                member.started = True
                self.notes.append(f"{member} joined {self._when(now)}")
                self._send(member, m.Start(self.vcpus), now)

    # --- the end ------------------------------------------------------------------------------------------------

    @property
    def _stage_seconds(self) -> float:
        in_order = not self.problems and self.violation is None
        return self.settings.drain_seconds if in_order else self.settings.grace_seconds

    def _stage_members(self) -> list[Member]:
        roles = {Stage.HOSTS: m.Role.HOST, Stage.VCPUS: m.Role.VCPU, Stage.MMU: m.Role.MMU}
        return [] if self.stage is None or self.stage not in roles else self._live(roles[self.stage])

    def _stage_is_over(self) -> bool:
        if self.stage is Stage.CHECKER:
            return self.backlog == 0
        return all(member.report is not None for member in self._stage_members())

    def _drain(self, now: float) -> None:
        self.phase = Phase.DRAINING
        self.drained_at = now
        for member in self._live(m.Role.HOST):
            if not member.started:
                self._lose(member, "the run was over before it was ready", now)
        self._enter_stage(Stage.HOSTS, now)

    def _enter_stage(self, stage: Stage, now: float) -> None:
        self.stage = stage
        self._deadline = now + self._stage_seconds
        for member in self._stage_members():
            member.drained = True
            if member.report is None:
                self._send(member, m.Drain(), now)

    def _next_stage(self, now: float) -> None:
        stages = list(Stage)
        if self.stage is Stage.CHECKER:
            self._check_completeness()
            self._finish(now)
        else:
            assert self.stage is not None
            self._enter_stage(stages[stages.index(self.stage) + 1], now)

    def _check_completeness(self) -> None:
        mmu = next((member for member in self.members if member.role is m.Role.MMU), None)
        if mmu is None or mmu.report is None:
            return
        if not self.settings.config.check:
            return
        told = mmu.report.counters.get("events", self.events)
        if told != self.events:
            self.problems.append(f"the MMU service wrote {told} events, and {self.events} arrived")
        elif mmu.report.info.get("events_digest", self._digest.hexdigest()) != self._digest.hexdigest():
            self.problems.append("the events that arrived do not have the digest of those that were written")

    def _check_deadlines(self, now: float) -> None:
        if self.phase is Phase.RUNNING and now - self._moved_at >= self.settings.stall_seconds:
            self._problem(
                f"no guest instruction was executed for {now - self._moved_at:.0f} s "
                f"({self._instructions} of {self.settings.config.ops} are done)",
                now,
            )
        elif self.phase is not Phase.RUNNING and now >= self._deadline:
            self._deadline_passed(now)

    def _deadline_passed(self, now: float) -> None:
        settings = self.settings
        match self.phase:
            case Phase.WAITING:
                ready = self.count(m.Role.VCPU, ready=True)
                if settings.vcpus is None and ready and self._mmu is not None and self._mmu.ready:
                    if self.count(m.Role.HOST, ready=True) >= settings.hosts:
                        self._start(StartRule.DEADLINE, now)
                        return
                self._problem(self._too_few(), now)
            case Phase.STARTING:
                self._problem(
                    f"the MMU service had not started {settings.start_seconds:g} s after it was told to",
                    now,
                )
            case Phase.DRAINING if self.stage is Stage.CHECKER:
                pass  # our own work: it ends
            case Phase.DRAINING:
                for member in self._stage_members():
                    if member.report is None:
                        self._lose(member, "it did not report when it was asked to", now)
            case _:
                pass

    def _too_few(self) -> str:
        settings = self.settings
        after = f"after {settings.wait_seconds:g} s"
        if self._mmu is None:
            return f"no MMU service had joined {after}"
        if not self._mmu.ready:
            return f"the MMU service had joined, but was not ready {after}"
        ready, joined = self.count(m.Role.VCPU, ready=True), self.count(m.Role.VCPU)
        wanted = "at least 1" if settings.vcpus is None else str(settings.vcpus)
        if ready < (settings.vcpus or 1):
            return f"{ready} vCPU workers were ready {after} ({joined} had joined); {wanted} were wanted"
        hosts = self.count(m.Role.HOST, ready=True)
        return f"{hosts} host agents were ready {after}; {settings.hosts} were wanted"

    def _finish(self, now: float) -> None:
        self.phase = Phase.FINISHED
        self.stage = None
        self.finished_at = now
        if self.violation is not None:
            self.verdict = m.Verdict.VIOLATED
            self.text = str(self.violation)
        elif self.problems:
            self.verdict = m.Verdict.UNKNOWN
            self.text = "; ".join(self.problems)
        else:
            self.verdict = m.Verdict.PASS
            checked = f"in {self.events} events" if self.settings.config.check else "(nothing was checked)"
            self.text = (
                f"{self.vcpus} vCPUs executed {self._instructions} instructions: no violation {checked}"
            )
        text = self.text[:TEXT_LIMIT]
        for member in self._live():
            finished = m.Finished(self.verdict, text)
            ended = m.Ended(ErrorCode.RUN_FINISHED.value, text)
            self._send(member, finished if member.welcomed else ended, now)
        self._out.append(Stop())
