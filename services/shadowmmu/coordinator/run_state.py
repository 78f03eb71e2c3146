"""The run as a pure state machine: who may start, when it ends, and what the verdict is.

No sockets, no clock, no randomness: the user hands in messages, the time (seconds, of any clock that does not go back)
and a source of tokens, and carries out the outputs. Every wait has a deadline, so a run always ends.

    waiting   --enough vCPUs are ready-------------> starting   the MMU service gets Start
    starting  --the MMU service's first Progress---> running    workers and host agents get Start, together
    running   --all vCPUs done, violation, loss----> draining   host agents, then vCPU workers, then the MMU service
                                                                get Drain, and answer with Report
    draining  --everybody reported, events checked-> finished   everybody gets Finished

From each state a failure leads to `finished` as well: before the run has begun directly, later by way of `draining`,
to collect what is to be had.

Once the run has begun, a member that is silent or whose connection is gone is *absent*: it may join again, as the same
member, or be replaced by another process, and is then brought up to date. Time in which nobody can get on because of
that does not count; only a place that stays empty for too long ends the run. Who may have a place is `admission`'s.
"""

from __future__ import annotations

from collections.abc import Hashable

from shadowmmu.checker import Violation
from shadowmmu.coordinator.admission import Admission
from shadowmmu.coordinator.members import Member, Recovery
from shadowmmu.coordinator.roster import NewToken, Roster
from shadowmmu.coordinator.run_types import (
    Forget,
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
from shadowmmu.coordinator.stream_state import StreamError, StreamState
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode

__all__ = ["RunState"]

TEXT_LIMIT = 1000
"""Longest text that goes into a message (the protocol allows 1,024 characters)."""


class RunState:
    """One run. Each input returns the outputs that it causes, to be carried out in order."""

    def __init__(self, settings: RunSettings, now: float, new_token: NewToken) -> None:
        self.settings = settings
        self.phase = Phase.WAITING
        self.stage: Stage | None = None
        self.run_id = new_token()
        self.roster = Roster(settings.heartbeat, new_token)
        self.stream = StreamState(settings.window)
        self.problems: list[str] = []  # why the verdict cannot be "pass"
        self.notes: list[str] = []
        self.violation: Violation | None = None
        self.verdict = m.Verdict.UNKNOWN
        self.text = ""
        self.start_rule: StartRule | None = None
        self.vcpus = 0  # that the run started with
        self.instructions = 0  # executed, as far as is known
        self.began_at = now
        self.started_at: float | None = None
        self.drained_at: float | None = None
        self.finished_at: float | None = None
        self.deadline = now + settings.wait_seconds  # of the phase, or of the stage
        self._stable_since = now
        self._stable_count = (0, 0)
        self._moved_at = now  # when instructions were last executed
        self._ticked_at = now
        self._out: list[Output] = []

    # --- inputs -------------------------------------------------------------------------------------------------

    def receive(self, peer: Hashable, body: m.MemberMessage, now: float) -> list[Output]:
        """A message from a peer."""
        member = self.roster.at(peer)
        if isinstance(body, m.Join):
            self._join(peer, body, now)
        elif member is None:
            self._refuse(peer, ErrorCode.NOT_ATTACHED, "join first")
        elif self.phase is Phase.FINISHED:
            self._refuse(peer, ErrorCode.RUN_FINISHED, self.text)
        else:
            member.timer.heard(now)
            self._message(member, peer, body, now)
        return self._advance(now)

    def taken_in(self, batches: int, now: float) -> list[Output]:
        """The checker has worked off so many event batches more."""
        self._credit(self.stream.taken_in(batches), now)
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
        member = self.roster.at(peer)
        if member is not None:
            self._absent(member, text, now)
        return self._advance(now)

    def ended(self, name: str, text: str, now: float) -> list[Output]:
        """The processes of that name are no more: nobody need wait until they have been silent for long enough."""
        for member in self.roster.present():
            if member.name == name:
                self._absent(member, text, now)
        return self._advance(now)

    def tick(self, now: float) -> list[Output]:
        """Time passes; to be called a few times per heartbeat interval."""
        passed = now - self._ticked_at
        awake = min(passed, self.settings.heartbeat)
        self._ticked_at = now
        if self.phase is not Phase.FINISHED:
            self._leave_out(passed - awake)
            for member in self.roster.present():
                if not member.welcomed:
                    continue  # heartbeats begin with the welcome
                if member.timer.expired(now):
                    self._absent(member, f"nothing was heard of it for {member.timer.silence:.1f} s", now)
                elif member.timer.due(now):
                    self._send(member, m.Heartbeat(), now)
            self._wait_for_absent(awake, now)
            self._check_deadlines(now)
        return self._advance(now)

    # --- what it knows ------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """Everybody who ever joined, probes excepted."""
        return self.roster.members

    @property
    def recoveries(self) -> list[Recovery]:
        """Who was absent, and what came of it; the oldest first."""
        return self.roster.recoveries

    @property
    def mmu_joined(self) -> bool:
        return self.roster.mmu is not None

    @property
    def events(self) -> int:
        """Events received."""
        return self.stream.events

    def count(self, role: m.Role, *, ready: bool = False) -> int:
        """Members of that role that are here; only those that are ready, if asked so."""
        return sum(member.ready or not ready for member in self.roster.present(role))

    # --- outputs ------------------------------------------------------------------------------------------------

    def _send(self, member: Member, body: m.CoordinatorMessage, now: float) -> None:
        if member.peer is not None:
            member.timer.sent(now)
            self._out.append(Send(member.peer, body))

    def _send_start(self, member: Member, now: float) -> None:
        member.start_sent = True
        self._send(member, m.Start(self.vcpus), now)

    @property
    def _ends_early(self) -> bool:
        """Nobody need finish anything."""
        return bool(self.problems) or self.violation is not None

    def _ask_to_drain(self, member: Member, now: float) -> None:
        """If it is ready for that: an MMU service that has come back has to know first that the run has begun, and a
        vCPU that was lost has to finish what its worker before had finished.
        """
        ready = {
            m.Role.MMU: member.start_sent,
            m.Role.VCPU: member.done or self._ends_early or self.started_at is None,
        }
        if member.drained and member.welcomed and ready.get(member.role, True):
            self._send_drain(member, now)

    def _send_drain(self, member: Member, now: float) -> None:
        if member.report is None and not member.drain_sent:
            member.drain_sent = True
            self._send(member, m.Drain(), now)

    def _refuse(self, peer: Hashable, code: ErrorCode, text: str) -> None:
        self._out.append(Refuse(peer, code, text[:TEXT_LIMIT]))

    def _credit(self, batches: int, now: float) -> None:
        mmu = self.roster.mmu
        if batches and mmu is not None and self.phase is not Phase.FINISHED and mmu.report is None:
            self._send(mmu, m.EventCredit(batches), now)

    # --- joining ------------------------------------------------------------------------------------------------

    @property
    def _admission(self) -> Admission:
        return Admission(self.phase, self.roster, self.settings.vcpus, self.vcpus, self.text)

    def _join(self, peer: Hashable, join: m.Join, now: float) -> None:
        admission = self._admission
        if join.role is m.Role.PROBE:
            number = self.roster.next_number()
            settings = self.settings
            joined = m.Joined(number, settings.config, self._mmu_endpoint, settings.heartbeat)
            self._out.append(Send(peer, joined))
        elif self.roster.knows(peer):
            self._refuse(peer, ErrorCode.ALREADY_ATTACHED, "this connection has joined already")
        elif join.member:
            self._join_again(peer, join, now)
        elif join.role is m.Role.MMU and not join.endpoint:
            text = "an MMU service has to say at which endpoint it is to be reached"
            self._refuse(peer, ErrorCode.BAD_ARGUMENT, text)
        elif admission.is_free(join.role):
            self.roster.add(peer, join, now)
            self._welcome(now)
        elif admission.may_become_free(join.role):
            self.roster.wait(peer, join, now)
        else:
            self._refuse(peer, *admission.refusal(join.role))

    def _join_again(self, peer: Hashable, join: m.Join, now: float) -> None:
        member = self.roster.holder(join)
        if member is None:
            self._refuse(peer, ErrorCode.NOT_RESUMABLE, "nobody in this run has that number and that token")
        elif not member.live and not self._admission.may_return(member):
            self._refuse(peer, ErrorCode.GIVEN_UP, f"not a member of the run any more: {member.lost}")
        else:
            former = self.roster.seat(member, peer, now)
            if former is not None:
                self._out.append(Forget(former))
            member.endpoint = join.endpoint
            self._seated(member, now)

    def _seat_candidates(self, now: float) -> None:
        for candidate in list(self.roster.candidates):
            suspect = self.roster.suspect(candidate)
            if suspect is not None:
                text = f"nothing was heard of it for {suspect.timer.silence:.1f} s, and it was started again"
                self._absent(suspect, text, now)
            member = self.roster.place_for(candidate)
            if member is not None:
                self.roster.replace(member, candidate, now)
                self._seated(member, now)
                continue
            role = candidate.join.role
            admission = self._admission
            if now < candidate.until and admission.may_become_free(role):
                continue
            self.roster.candidates.remove(candidate)
            if admission.takes_more(role):
                self.roster.add(candidate.peer, candidate.join, now)
                self._welcome(now)
            else:
                self._refuse(candidate.peer, *admission.refusal(role))

    def _seated(self, member: Member, now: float) -> None:
        """A member is here again: it learns where the run is. The rest it is told once it is ready."""
        if member.role is m.Role.MMU:
            self.stream.reconnected()
        self._welcome(now)
        if self.phase is Phase.FINISHED:
            self._send(member, m.Finished(self.verdict, self.text[:TEXT_LIMIT]), now)
        elif member.role is not m.Role.MMU:
            self._ask_to_drain(member, now)  # whatever it would get ready for is over

    @property
    def _mmu_endpoint(self) -> str:
        return "" if self.roster.mmu is None else self.roster.mmu.endpoint

    def _welcome(self, now: float) -> None:
        """Whoever can be told where the MMU service is; later than WAITING that is everybody."""
        mmu = self.roster.mmu
        for member in self.roster.present():
            if member.welcomed or (member.role is not m.Role.MMU and mmu is None):
                continue
            member.welcomed = True
            member.timer.heard(now)
            joined = m.Joined(
                member.number,
                self.settings.config,
                self._mmu_endpoint,
                self.settings.heartbeat,
                token=member.token,
                run=self.run_id,
                vcpu=None if member.ready else member.vcpu,
                vcpu_token=b"" if member.ready else member.vcpu_token,
                next_event=self.stream.events if member.role is m.Role.MMU else 0,
            )
            self._send(member, joined, now)

    # --- messages -----------------------------------------------------------------------------------------------

    def _message(self, member: Member, peer: Hashable, body: m.MemberMessage, now: float) -> None:
        match body:
            case m.Heartbeat() | m.Join():
                pass
            case m.Ready():
                self._ready(member, body, now)
            case m.Progress():
                self._progress(member, body, now)
            case m.EventBatch() if member.role is m.Role.MMU:
                self._event_batch(body, now)
            case m.VcpuLost() if member.role is m.Role.MMU:
                # Its worker attaches anew, or is replaced; if neither, it falls silent here as well.
                self.notes.append(f"the MMU service gave vCPU {body.vcpu} up {self._when(now)}: {body.text}")
            case m.Report():
                self._report(member, body, now)
            case _:
                text = f"a {type(body).__name__} is not for a {member.role.value} to send"
                self._refuse(peer, ErrorCode.UNEXPECTED_MESSAGE, text)

    def _ready(self, member: Member, ready: m.Ready, now: float) -> None:
        member.ready = True
        if ready.vcpu is not None:
            member.vcpu = ready.vcpu
        # The MMU service has the last word (`_progress`): this may be said by a worker that is about to attach anew.
        member.vcpu_token = member.vcpu_token or ready.token
        if member.report is not None or member.drain_sent:
            return
        under_way = self.phase in (Phase.RUNNING, Phase.DRAINING)
        if under_way or (self.phase is Phase.STARTING and member.role is m.Role.MMU):
            if under_way and not member.started:
                member.started = True
                self.notes.append(f"{member} joined {self._when(now)}")
            self._send_start(member, now)
        self._ask_to_drain(member, now)

    def _progress(self, member: Member, progress: m.Progress, now: float) -> None:
        member.count(progress.counters)
        if member.role is m.Role.MMU and self.phase is Phase.STARTING:
            member.started = True  # it has taken in the Start: workers may begin
        for vcpu, token in progress.tokens if member.role is m.Role.MMU else ():
            for worker in self.roster.live(m.Role.VCPU):
                if worker.vcpu == vcpu:
                    worker.vcpu_token = token
        if member.role is m.Role.VCPU:
            # Not for ever: what its worker had executed and not sent, another one executes again.
            member.done = progress.done
            self._count_instructions(now)
            self._ask_to_drain(member, now)

    def _count_instructions(self, now: float) -> None:
        total = sum(
            member.counters.get("vcpu.instructions", 0)
            for member in self.members
            if member.role is m.Role.VCPU
        )
        if total > self.instructions:
            self.instructions = total
            self._moved_at = now

    def _event_batch(self, batch: m.EventBatch, now: float) -> None:
        try:
            news = self.stream.take(batch)
        except StreamError as error:
            self._problem(str(error), now)
            return
        if news is None:
            self._credit(1, now)
            return
        self._out.append(TakeIn(news))
        if self.stage is Stage.MMU:
            self.deadline = now + self._stage_seconds

    def _report(self, member: Member, report: m.Report, now: float) -> None:
        member.report = report
        if report.counters:
            member.count(report.counters)
        if member.role is m.Role.VCPU:
            self._count_instructions(now)
        if not member.drained:
            why = f": {report.info['error']}" if "error" in report.info else ""
            if self.phase is Phase.WAITING:
                self._lose(member, f"it gave up{why}", now)
            else:
                self._problem(f"{member} ended before it was asked to{why}", now)

    # --- members and failures -----------------------------------------------------------------------------------

    def _absent(self, member: Member, text: str, now: float) -> None:
        """Nothing can be heard of a member any more."""
        missed = self.phase is not Phase.WAITING or member.role is m.Role.MMU
        if not missed or self.settings.absent_seconds <= 0 or (member.report is not None and member.drained):
            self._lose(member, text, now)
        else:
            self._dismiss(member, text, now)
            self.roster.disconnect(member, text, now)

    def _dismiss(self, member: Member, text: str, now: float) -> None:
        """If it hears us nevertheless, it shall know."""
        if member.peer is not None:
            self._send(member, m.Ended(ErrorCode.GIVEN_UP.value, text[:TEXT_LIMIT]), now)
            self._out.append(Forget(member.peer))

    def _lose(self, member: Member, text: str, now: float) -> None:
        self._dismiss(member, text, now)
        self.roster.lose(member, text, now)
        if self.phase is Phase.WAITING and member.role is not m.Role.MMU:
            self.notes.append(f"{member} left before the run: {text}")
        elif member.report is None or not member.drained:
            self._problem(f"{member} was lost {self._when(now)}: {text}", now)

    def _wait_for_absent(self, seconds: float, now: float) -> None:
        """Gives up who was away for too long; while anybody is away, nothing else can be expected to get on."""
        absent = self.roster.absent()
        if absent and not self.problems:
            self._leave_out(seconds)
        for member in absent:
            member.absent_for += seconds
            if member.absent_for >= self.settings.absent_seconds:
                limit = f"it was not back within {self.settings.absent_seconds:g} s"
                self._lose(member, f"{member.absent_reason}; {limit}", now)

    def _leave_out(self, seconds: float) -> None:
        """So much time does not count: nobody could get on in it, or we ourselves were not awake."""
        self._moved_at += seconds
        if self.phase is not Phase.WAITING:
            self.deadline += seconds

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
            self.deadline = min(self.deadline, now + self._stage_seconds)
            for member in self._stage_members():
                self._ask_to_drain(member, now)

    # --- progress of the run ------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Output]:
        if self.phase is Phase.WAITING:
            self._wait(now)
        if self.phase is Phase.STARTING and any(mmu.started for mmu in self.roster.live(m.Role.MMU)):
            self._run(now)
        if self.phase is Phase.RUNNING and all(member.done for member in self.roster.live(m.Role.VCPU)):
            self._drain(now)
        self._seat_candidates(now)
        while self.phase is Phase.DRAINING and self._stage_is_over():
            self._next_stage(now)
        out, self._out = self._out, []
        return out

    def _wait(self, now: float) -> None:
        self._welcome(now)
        joined, ready = self.count(m.Role.VCPU), self.count(m.Role.VCPU, ready=True)
        if (joined, ready) != self._stable_count:
            self._stable_count = (joined, ready)
            self._stable_since = now
        mmu = self.roster.mmu
        if mmu is None or not mmu.ready or mmu.absent or ready == 0:
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
        for member in self.roster.live(m.Role.VCPU, m.Role.HOST):
            if not member.ready or member.absent:
                self._lose(member, "it was not ready when the run began", now)
        self.start_rule = rule
        self.vcpus = self.count(m.Role.VCPU, ready=True)
        self.phase = Phase.STARTING
        self.deadline = now + self.settings.start_seconds
        for member in self.roster.live(m.Role.MMU):
            self._send_start(member, now)

    def _run(self, now: float) -> None:
        self.phase = Phase.RUNNING
        self.started_at = self._moved_at = now
        for member in self.roster.live(m.Role.VCPU, m.Role.HOST):
            if member.ready:
                member.started = True
                if member.present:
                    self._send_start(member, now)

    # --- the end ------------------------------------------------------------------------------------------------

    @property
    def _stage_seconds(self) -> float:
        in_order = not self.problems and self.violation is None
        return self.settings.drain_seconds if in_order else self.settings.grace_seconds

    def _stage_members(self) -> list[Member]:
        roles = {Stage.HOSTS: m.Role.HOST, Stage.VCPUS: m.Role.VCPU, Stage.MMU: m.Role.MMU}
        return [] if self.stage is None or self.stage not in roles else self.roster.live(roles[self.stage])

    def _stage_is_over(self) -> bool:
        if self.stage is Stage.CHECKER:
            return self.stream.backlog == 0
        return all(member.report is not None for member in self._stage_members())

    def _drain(self, now: float) -> None:
        self.phase = Phase.DRAINING
        self.drained_at = now
        self._enter_stage(Stage.HOSTS, now)

    def _enter_stage(self, stage: Stage, now: float) -> None:
        self.stage = stage
        self.deadline = now + self._stage_seconds
        for member in self._stage_members():
            member.drained = True
            self._ask_to_drain(member, now)

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
        elif mmu.report.info.get("events_digest", self.stream.digest) != self.stream.digest:
            self.problems.append("the events that arrived do not have the digest of those that were written")

    def _check_deadlines(self, now: float) -> None:
        if self.phase is Phase.RUNNING and now - self._moved_at >= self.settings.stall_seconds:
            self._problem(
                f"no guest instruction was executed for {now - self._moved_at:.0f} s "
                f"({self.instructions} of {self.settings.config.ops} are done)",
                now,
            )
        elif self.phase is not Phase.RUNNING and now >= self.deadline:
            self._deadline_passed(now)

    def _deadline_passed(self, now: float) -> None:
        settings = self.settings
        match self.phase:
            case Phase.WAITING:
                ready = self.count(m.Role.VCPU, ready=True)
                if settings.vcpus is None and ready and self.roster.mmu is not None and self.roster.mmu.ready:
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
        mmu = self.roster.mmu
        if mmu is None or mmu.absent:
            return f"no MMU service had joined {after}"
        if not mmu.ready:
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
                f"{self.vcpus} vCPUs executed {self.instructions} instructions: no violation {checked}"
            )
        text = self.text[:TEXT_LIMIT]
        for candidate in self.roster.candidates:
            self._refuse(candidate.peer, ErrorCode.RUN_FINISHED, text)
        self.roster.candidates.clear()
        for member in self.roster.live():
            finished = m.Finished(self.verdict, text)
            ended = m.Ended(ErrorCode.RUN_FINISHED.value, text)
            self._send(member, finished if member.welcomed else ended, now)
        self._out.append(Stop())
