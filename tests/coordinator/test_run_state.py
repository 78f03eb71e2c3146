"""The run's state machine, driven by hand."""

from collections.abc import Hashable
from itertools import count
from typing import Any, TypeVar

import pytest

from shadowmmu.checker import Rule, Violation
from shadowmmu.coordinator.run_state import RunState
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

MMU = "mmu"
HOST = "host"

VIOLATION = Violation(
    rule=Rule.WRITE_PROTECTION_BREACH,
    text="store of 8 bytes",
    vcpu=1,
    access=None,
    journal_record=17,
    event_index=99,
    blame="somebody",
)

Body = TypeVar("Body")


class Run:
    """A RunState with a clock and with what it sent, by peer."""

    def __init__(self, **settings: Any) -> None:
        config = settings.pop("config", m.RunConfig())
        self.now = 100.0
        tokens = count(1)
        self.state = RunState(
            RunSettings(config=config, **settings), self.now, lambda: b"token-%d" % next(tokens)
        )
        self.outputs: list[Output] = []

    def phase(self) -> Phase:
        return self.state.phase

    def _note(self, outputs: list[Output]) -> None:
        self.outputs += outputs

    def receive(self, peer: Hashable, body: m.MemberMessage) -> None:
        self._note(self.state.receive(peer, body, self.now))

    def wait(self, seconds: float, *speakers: Hashable) -> None:
        """Let time pass in small steps, in which the speakers send heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            for peer in speakers:
                self.receive(peer, m.Heartbeat())
            self._note(self.state.tick(self.now))

    def taken_in(self, batches: int = 1) -> None:
        self._note(self.state.taken_in(batches, self.now))

    def violated(self) -> None:
        self._note(self.state.violated(VIOLATION, self.now))

    def sent(self, peer: Hashable, kind: type[Body]) -> list[Body]:
        return [
            output.body
            for output in self.outputs
            if isinstance(output, Send) and output.peer == peer and isinstance(output.body, kind)
        ]

    def refusals(self, peer: Hashable) -> list[ErrorCode]:
        return [output.code for output in self.outputs if isinstance(output, Refuse) and output.peer == peer]

    def order(self, kind: type[m.CoordinatorMessage]) -> list[Hashable]:
        return [o.peer for o in self.outputs if isinstance(o, Send) and isinstance(o.body, kind)]

    # --- the usual course ---------------------------------------------------------------------------------------

    def join(self, peer: Hashable, role: m.Role) -> None:
        endpoint = "tcp://mmu:1" if role is m.Role.MMU else ""
        self.receive(peer, m.Join(role, f"name-{peer}", endpoint))

    def gather(self, vcpus: int, hosts: int = 0) -> None:
        self.join(MMU, m.Role.MMU)
        self.receive(MMU, m.Ready())
        for host in range(hosts):
            self.join(f"{HOST}{host}", m.Role.HOST)
            self.receive(f"{HOST}{host}", m.Ready())
        for vcpu in range(vcpus):
            self.join(vcpu, m.Role.VCPU)
            self.receive(vcpu, m.Ready(vcpu=vcpu))

    def start(self, vcpus: int, hosts: int = 0) -> None:
        self.gather(vcpus, hosts)
        assert self.phase() is Phase.STARTING
        self.receive(MMU, m.Progress({}))
        assert self.phase() is Phase.RUNNING

    def finish_vcpus(self, vcpus: int) -> None:
        for vcpu in range(vcpus):
            self.receive(vcpu, m.Progress({"vcpu.instructions": 10}, done=True))

    def report_all(self, vcpus: int, hosts: int = 0, events: int = 0) -> None:
        for host in range(hosts):
            self.receive(f"{HOST}{host}", m.Report({}))
        for vcpu in range(vcpus):
            self.receive(vcpu, m.Report({"vcpu.instructions": 10}))
        self.receive(MMU, m.Report({"events": events}))

    def assert_finished(self, verdict: m.Verdict) -> None:
        assert self.phase() is Phase.FINISHED
        assert self.state.verdict is verdict
        assert isinstance(self.outputs[-1], Stop)
        assert sum(isinstance(output, Stop) for output in self.outputs) == 1


class TestTheUsualCourse:
    def test_workers_are_welcomed_once_the_mmu_service_is_known(self) -> None:
        run = Run(vcpus=1)
        run.join(0, m.Role.VCPU)
        assert run.sent(0, m.Joined) == []
        run.join(MMU, m.Role.MMU)
        (joined,) = run.sent(0, m.Joined)
        assert joined.mmu_endpoint == "tcp://mmu:1"
        assert run.sent(MMU, m.Joined)

    def test_the_mmu_service_starts_first_and_the_workers_together(self) -> None:
        run = Run(vcpus=2, hosts=1)
        run.gather(2, hosts=1)
        assert run.order(m.Start) == [MMU]
        run.receive(MMU, m.Progress({}))
        assert run.order(m.Start) == [MMU, "host0", 0, 1]
        assert run.sent(0, m.Start) == [m.Start(2)]
        assert run.state.start_rule is StartRule.EXPECTED

    def test_members_are_drained_in_order_and_everybody_is_told_the_verdict(self) -> None:
        run = Run(vcpus=2, hosts=1)
        run.start(2, hosts=1)
        run.finish_vcpus(2)
        assert run.order(m.Drain) == ["host0"]
        run.receive("host0", m.Report({}))
        assert run.order(m.Drain) == ["host0", 0, 1]
        run.receive(0, m.Report({}))
        assert run.state.stage is Stage.VCPUS
        run.receive(1, m.Report({}))
        assert run.order(m.Drain) == ["host0", 0, 1, MMU]
        run.receive(MMU, m.Report({"events": 0}))
        run.assert_finished(m.Verdict.PASS)
        assert run.order(m.Finished) == [MMU, "host0", 0, 1]

    def test_without_a_number_the_run_starts_when_it_has_been_stable(self) -> None:
        run = Run(stable_seconds=3.0)
        run.gather(2)
        run.wait(2.5, MMU, 0, 1)
        run.join(2, m.Role.VCPU)
        run.wait(2.0, MMU, 0, 1, 2)
        run.receive(2, m.Ready(vcpu=2))
        run.wait(2.75, MMU, 0, 1, 2)
        assert run.phase() is Phase.WAITING
        run.wait(0.5, MMU, 0, 1, 2)
        assert run.phase() is Phase.STARTING
        assert run.state.start_rule is StartRule.STABLE
        assert run.sent(MMU, m.Start) == [m.Start(3)]

    def test_a_host_agent_that_is_late_is_taken_into_the_run(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.join("late", m.Role.HOST)
        run.receive("late", m.Ready())
        assert run.sent("late", m.Start) == [m.Start(1)]
        run.finish_vcpus(1)
        assert run.order(m.Drain) == ["late"]

    def test_a_probe_is_answered_at_any_time_and_is_no_member(self) -> None:
        run = Run(vcpus=1)
        run.join("probe", m.Role.PROBE)
        assert run.sent("probe", m.Joined)[0].member > 0
        assert run.state.members == []

    def test_heartbeats_are_sent_in_silence(self) -> None:
        run = Run(vcpus=2)
        run.gather(1)
        run.wait(3.0, MMU, 0)
        assert len(run.sent(0, m.Heartbeat)) == len(run.sent(MMU, m.Heartbeat)) == 3

    def test_progress_is_summed(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(0, m.Progress({"vcpu.instructions": 7}))
        run.receive(1, m.Progress({"vcpu.instructions": 5}))
        assert run.state.instructions == 12


class TestEvents:
    def test_batches_are_handed_on_and_credited(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(MMU, m.EventBatch(0, 3, b""))
        run.receive(MMU, m.EventBatch(3, 2, b""))
        assert [o.batch.first for o in run.outputs if isinstance(o, TakeIn)] == [0, 3]
        assert run.state.stream.backlog == 2
        run.taken_in(2)
        assert run.sent(MMU, m.EventCredit) == [m.EventCredit(2)]
        assert run.state.events == 5

    def test_the_run_ends_only_when_all_events_are_checked(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.receive(0, m.Report({}))
        run.receive(MMU, m.EventBatch(0, 3, b""))
        run.receive(MMU, m.Report({"events": 3}))
        assert run.state.stage is Stage.CHECKER
        run.taken_in()
        run.assert_finished(m.Verdict.PASS)
        assert run.sent(MMU, m.EventCredit) == []  # nobody needs it any more

    def test_a_gap_makes_the_verdict_unknown(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(MMU, m.EventBatch(0, 3, b""))
        run.taken_in()
        run.receive(MMU, m.EventBatch(4, 1, b""))
        assert run.phase() is Phase.DRAINING
        run.report_all(1, events=5)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "gap: event 3 should come next, and 4 came" in run.state.text

    def test_more_batches_than_credits_make_the_verdict_unknown(self) -> None:
        run = Run(vcpus=1, window=2)
        run.start(1)
        for first in range(3):
            run.receive(MMU, m.EventBatch(first, 1, b""))
        assert "more event batches than the 2" in run.state.problems[0]

    def test_missing_events_at_the_end_make_the_verdict_unknown(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.report_all(1, events=8)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "wrote 8 events, and 0 arrived" in run.state.text

    def test_a_wrong_digest_makes_the_verdict_unknown(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(MMU, m.EventBatch(0, 1, b"x"))
        run.taken_in()
        run.finish_vcpus(1)
        run.receive(0, m.Report({}))
        run.receive(MMU, m.Report({"events": 1}, info={"events_digest": "00"}))
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "digest" in run.state.text

    def test_without_a_checker_no_events_need_to_come(self) -> None:
        run = Run(vcpus=1, config=m.RunConfig(check=False))
        run.start(1)
        run.finish_vcpus(1)
        run.report_all(1, events=8)
        run.assert_finished(m.Verdict.PASS)
        assert "nothing was checked" in run.state.text

    def test_batches_put_the_end_of_the_draining_off(self) -> None:
        run = Run(vcpus=1, drain_seconds=3.0)
        run.start(1)
        run.finish_vcpus(1)
        run.receive(0, m.Report({}))
        for first in range(4):
            run.wait(2.0, MMU, 0)
            run.receive(MMU, m.EventBatch(first, 1, b""))
            run.taken_in()
        assert run.phase() is Phase.DRAINING
        run.wait(3.0, MMU, 0)
        run.assert_finished(m.Verdict.UNKNOWN)


class TestViolations:
    def test_a_violation_ends_the_run_in_order(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.violated()
        assert run.order(m.Drain) == [0, 1]
        run.report_all(2)
        run.assert_finished(m.Verdict.VIOLATED)
        assert "rule 4 (write-protection breach) at journal record 17" in run.state.text
        assert run.sent(0, m.Finished)[0].verdict is m.Verdict.VIOLATED

    def test_the_first_violation_counts(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.violated()
        run.violated()
        assert run.order(m.Drain) == [0]

    def test_a_violation_outweighs_a_lost_member(self) -> None:
        run = Run(vcpus=2, absent_seconds=0.0)
        run.start(2)
        run.wait(5.0, MMU, 0)
        run.violated()
        run.report_all(1)
        run.assert_finished(m.Verdict.VIOLATED)
        assert "lost" in run.state.problems[0]

    def test_a_violation_found_after_the_vcpus_were_done_counts(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.receive(MMU, m.EventBatch(0, 1, b""))
        run.report_all(1, events=1)
        run.violated()
        run.taken_in()
        run.assert_finished(m.Verdict.VIOLATED)


class TestTooFew:
    @pytest.mark.parametrize(
        "vcpus, expected, words",
        [
            (0, None, "0 vCPU workers were ready after 60 s (0 had joined); at least 1 were wanted"),
            (1, 2, "1 vCPU workers were ready after 60 s (1 had joined); 2 were wanted"),
        ],
    )
    def test_workers(self, vcpus: int, expected: int | None, words: str) -> None:
        run = Run(vcpus=expected, wait_seconds=60.0)
        run.gather(vcpus)
        run.wait(60.0, MMU, *range(vcpus))
        run.assert_finished(m.Verdict.UNKNOWN)
        assert run.state.text == words
        assert run.sent(MMU, m.Finished)

    def test_no_mmu_service(self) -> None:
        run = Run(wait_seconds=5.0)
        run.join(0, m.Role.VCPU)
        run.wait(5.0)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "no MMU service" in run.state.text
        assert run.sent(0, m.Ended)[0].code == ErrorCode.RUN_FINISHED.value  # it was never welcomed

    def test_an_mmu_service_that_is_not_ready(self) -> None:
        run = Run(wait_seconds=5.0)
        run.join(MMU, m.Role.MMU)
        run.wait(5.0, MMU)
        assert "was not ready" in run.state.text

    def test_no_host_agent(self) -> None:
        run = Run(vcpus=1, hosts=1, wait_seconds=5.0)
        run.gather(1)
        run.wait(5.0, MMU, 0)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "0 host agents were ready after 5 s; 1 were wanted" in run.state.text

    def test_at_the_deadline_the_run_starts_with_those_that_are_ready(self) -> None:
        run = Run(wait_seconds=10.0, stable_seconds=3.0)
        run.gather(1)
        run.join("slow", m.Role.VCPU)
        run.wait(10.0, MMU, 0, "slow")
        assert run.phase() is Phase.STARTING
        assert run.state.start_rule is StartRule.DEADLINE
        assert run.sent(MMU, m.Start) == [m.Start(1)]
        assert run.sent("slow", m.Ended)

    def test_an_mmu_service_that_does_not_start(self) -> None:
        run = Run(vcpus=1, start_seconds=5.0)
        run.gather(1)
        run.wait(5.0, MMU, 0)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "had not started 5 s after" in run.state.text


class TestLostMembers:
    def test_a_silent_worker_ends_the_run_and_is_named(self) -> None:
        run = Run(vcpus=2, heartbeat=1.0, absent_seconds=0.0)
        run.start(2)
        run.wait(5.0, MMU, 0)
        assert run.phase() is Phase.DRAINING
        assert run.order(m.Drain) == [0]
        run.report_all(1)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "vCPU worker 3 (vCPU 1, name-1) was lost 5.0 s after the start" in run.state.text
        lost = [member for member in run.state.members if member.lost]
        assert [member.vcpu for member in lost] == [1]

    def test_a_vcpu_that_the_mmu_service_gives_up_is_only_noted(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(MMU, m.VcpuLost(1, "no answer to a kick"))
        assert run.phase() is Phase.RUNNING
        assert "gave vCPU 1 up 0.0 s after the start: no answer to a kick" in run.state.notes[0]

    def test_one_that_wakes_up_afterwards_is_refused_and_changes_nothing(self) -> None:
        run = Run(vcpus=2, absent_seconds=0.0)
        run.start(2)
        run.wait(5.0, MMU, 0)
        assert run.sent(1, m.Ended)[0].code == ErrorCode.GIVEN_UP.value
        run.receive(1, m.Progress({"vcpu.instructions": 1000}, done=True))
        assert run.refusals(1) == [ErrorCode.NOT_ATTACHED]
        assert run.state.instructions == 0
        run.receive(1, m.Join(m.Role.VCPU, "name-1", member=3, token=b"token-4"))
        assert run.refusals(1)[-1] is ErrorCode.GIVEN_UP
        run.report_all(1)
        run.receive(1, m.Heartbeat())
        run.join(1, m.Role.VCPU)
        assert run.refusals(1)[-1] is ErrorCode.RUN_FINISHED

    def test_a_lost_mmu_service_ends_the_run_within_bounds(self) -> None:
        run = Run(vcpus=1, hosts=1, grace_seconds=4.0, absent_seconds=0.0)
        run.start(1, hosts=1)
        run.wait(5.0, 0, "host0")
        assert run.phase() is Phase.DRAINING
        run.wait(8.0, 0, "host0")
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "MMU service 1 (name-mmu) was lost" in run.state.problems[0]
        assert "it did not report when it was asked to" in run.state.problems[1]

    def test_everybody_lost_at_once(self) -> None:
        run = Run(vcpus=2, hosts=1)
        run.start(2, hosts=1)
        run.wait(60.0)
        run.assert_finished(m.Verdict.UNKNOWN)

    def test_a_worker_lost_before_the_run_is_waited_for_anew(self) -> None:
        run = Run(vcpus=1, hosts=1)
        run.gather(1)
        run.wait(5.0, MMU)
        assert run.phase() is Phase.WAITING
        run.join("host0", m.Role.HOST)
        run.receive("host0", m.Ready())
        run.join(0, m.Role.VCPU)
        run.receive(0, m.Ready(vcpu=0))
        assert run.phase() is Phase.STARTING
        assert "left before the run" in run.state.notes[0]

    def test_a_worker_lost_while_the_run_starts(self) -> None:
        run = Run(vcpus=1, absent_seconds=0.0)
        run.gather(1)
        run.wait(5.0, MMU)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "before the run began" in run.state.text

    def test_a_member_that_does_not_report_is_given_up(self) -> None:
        run = Run(vcpus=2, drain_seconds=10.0)
        run.start(2)
        run.finish_vcpus(2)
        run.receive(0, m.Report({}))
        run.wait(10.0, MMU, 0, 1)
        assert run.order(m.Drain) == [0, 1, MMU]
        run.receive(MMU, m.Report({}))
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "did not report" in run.state.text

    def test_a_member_lost_after_its_report_changes_nothing(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.receive(0, m.Report({}))
        run.wait(6.0, MMU)
        run.receive(MMU, m.Report({}))
        run.assert_finished(m.Verdict.PASS)

    def test_a_worker_that_gives_up_by_itself(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(1, m.Report({"vcpu.instructions": 4}, info={"error": "the MMU service ended my session"}))
        run.receive(0, m.Report({}))
        run.receive(MMU, m.Report({}))
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "ended before it was asked to: the MMU service ended my session" in run.state.text
        assert run.state.instructions == 4

    def test_a_worker_that_gives_up_before_the_run_is_waited_for_anew(self) -> None:
        run = Run(vcpus=1)
        run.join(MMU, m.Role.MMU)
        run.receive(MMU, m.Ready())
        run.join(0, m.Role.VCPU)
        run.receive(0, m.Report({}, info={"error": "not let in"}))
        assert run.phase() is Phase.WAITING
        assert "left before the run: it gave up: not let in" in run.state.notes[0]
        run.join(1, m.Role.VCPU)
        run.receive(1, m.Ready(vcpu=0))
        assert run.phase() is Phase.STARTING

    def test_a_run_without_progress_ends(self) -> None:
        run = Run(vcpus=1, stall_seconds=20.0)
        run.start(1)
        run.wait(10.0, MMU, 0)
        run.receive(0, m.Progress({"vcpu.instructions": 1}))
        run.wait(19.0, MMU, 0)
        assert run.phase() is Phase.RUNNING
        run.wait(1.0, MMU, 0)
        assert run.phase() is Phase.DRAINING
        assert "no guest instruction was executed for 20 s (1 of 100000 are done)" in run.state.problems[0]

    def test_something_of_our_own_fails(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.outputs += run.state.failed("the worker's process ended with status 3", run.now)
        run.report_all(1)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert run.state.text == "the worker's process ended with status 3"

    def test_a_pause_of_the_coordinator_loses_nobody(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.now += 3600.0
        run.outputs += run.state.tick(run.now)
        assert not any(member.lost for member in run.state.members)


class TestRefusals:
    def test_a_second_mmu_service(self) -> None:
        run = Run()
        run.join(MMU, m.Role.MMU)
        run.join("other", m.Role.MMU)
        assert run.refusals("other") == []  # the first one may be dead
        run.wait(6.5, MMU)
        assert run.refusals("other") == [ErrorCode.RUN_FULL]

    def test_more_vcpus_than_wanted(self) -> None:
        run = Run(vcpus=1)
        run.join(0, m.Role.VCPU)
        run.join(1, m.Role.VCPU)
        assert run.refusals(1) == [ErrorCode.RUN_FULL]

    def test_a_vcpu_that_is_late(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.join("late", m.Role.VCPU)
        run.wait(6.5, MMU, 0)
        assert run.refusals("late") == [ErrorCode.RUN_FULL]

    def test_somebody_who_did_not_join(self) -> None:
        run = Run()
        run.receive("stranger", m.Heartbeat())
        assert run.refusals("stranger") == [ErrorCode.NOT_ATTACHED]

    def test_an_mmu_service_without_an_endpoint(self) -> None:
        run = Run()
        run.receive(MMU, m.Join(m.Role.MMU, "mmu"))
        assert run.refusals(MMU) == [ErrorCode.BAD_ARGUMENT]

    def test_joining_twice(self) -> None:
        run = Run()
        run.join(0, m.Role.VCPU)
        run.join(0, m.Role.VCPU)
        assert run.refusals(0) == [ErrorCode.ALREADY_ATTACHED]

    def test_a_message_that_is_not_for_this_role(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(0, m.EventBatch(0, 1, b""))
        assert run.refusals(0) == [ErrorCode.UNEXPECTED_MESSAGE]
        assert run.state.events == 0
