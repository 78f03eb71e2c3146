"""Members that come back and processes that take their places, in the run's state machine driven by hand."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import Forget, Phase
from shadowmmu.coordinator.saved_run import restore_run, save_run
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.events import InputConsumed, encode_events
from tests.coordinator.test_run_state import HOST, MMU, Run

NEW = "new"


def joined(run: Run, peer: Hashable) -> m.Joined:
    (one,) = run.sent(peer, m.Joined)
    return one


def again(run: Run, old: Hashable, new: Hashable, role: m.Role, name: str = "") -> None:
    """The member that joined as `old` joins again on another connection."""
    welcome = joined(run, old)
    endpoint = "tcp://mmu:2" if role is m.Role.MMU else ""
    run.receive(new, m.Join(role, name or f"name-{old}", endpoint, welcome.member, welcome.token))


class TestJoiningAgain:
    def test_the_same_member_goes_on_where_it_was(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        again(run, 1, NEW, m.Role.VCPU)
        assert joined(run, NEW).member == joined(run, 1).member
        assert joined(run, NEW).run == joined(run, 1).run != b""
        assert Forget(1) in run.outputs
        run.receive(NEW, m.Ready(vcpu=1))
        assert run.sent(NEW, m.Start) == [m.Start(2)]
        run.receive(NEW, m.Progress({"vcpu.instructions": 10}, done=True))
        run.receive(0, m.Progress({"vcpu.instructions": 10}, done=True))
        run.receive(0, m.Report({}))
        run.receive(NEW, m.Report({}))
        run.receive(MMU, m.Report({"events": 0}))
        run.assert_finished(m.Verdict.PASS)
        (recovery,) = run.state.recoveries
        assert (recovery.vcpu, recovery.replaced_by) == (1, None)

    def test_a_wrong_token_opens_nothing(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive("thief", m.Join(m.Role.VCPU, "name-0", member=2, token=b"guessed"))
        run.receive("thief", m.Join(m.Role.VCPU, "name-0", member=2))
        assert run.refusals("thief") == [ErrorCode.NOT_RESUMABLE] * 2
        assert run.state.recoveries == []

    def test_a_silent_member_has_time_to_come_back(self) -> None:
        run = Run(vcpus=2, absent_seconds=30.0)
        run.start(2)
        run.wait(20.0, MMU, 0)
        assert run.phase() is Phase.RUNNING
        assert run.sent(1, m.Ended)[0].code == ErrorCode.GIVEN_UP.value
        again(run, 1, NEW, m.Role.VCPU)
        run.receive(NEW, m.Ready(vcpu=1))
        run.wait(30.0, MMU, 0, NEW)
        assert run.phase() is Phase.RUNNING
        (recovery,) = run.state.recoveries
        assert recovery.back_at == recovery.lost_at + 15.0

    def test_a_place_that_stays_empty_ends_the_run(self) -> None:
        run = Run(vcpus=2, absent_seconds=30.0)
        run.start(2)
        run.wait(34.5, MMU, 0)
        assert run.phase() is Phase.RUNNING
        run.wait(1.0, MMU, 0)
        assert run.phase() is Phase.DRAINING
        run.report_all(1)
        run.assert_finished(m.Verdict.UNKNOWN)
        assert "was not back within 30 s" in run.state.text

    def test_time_without_a_member_is_no_stall(self) -> None:
        run = Run(vcpus=2, absent_seconds=30.0, stall_seconds=20.0)
        run.start(2)
        run.wait(30.0, MMU, 0)
        assert run.phase() is Phase.RUNNING
        again(run, 1, NEW, m.Role.VCPU)
        run.wait(16.0, MMU, 0, NEW)
        assert run.phase() is Phase.DRAINING

    def test_before_the_run_its_place_is_free_for_others(self) -> None:
        run = Run(vcpus=1)
        run.join(MMU, m.Role.MMU)
        run.join(0, m.Role.VCPU)
        run.wait(5.0, MMU)
        run.join(1, m.Role.VCPU)
        again(run, 0, NEW, m.Role.VCPU)
        assert run.refusals(NEW) == [ErrorCode.GIVEN_UP]

    def test_before_the_run_it_may_come_back_too(self) -> None:
        run = Run(vcpus=1)
        run.join(MMU, m.Role.MMU)
        run.receive(MMU, m.Ready())
        run.join(0, m.Role.VCPU)
        run.wait(5.0, MMU)
        again(run, 0, NEW, m.Role.VCPU)
        run.receive(NEW, m.Ready(vcpu=0))
        assert run.phase() is Phase.STARTING

    def test_one_that_gave_up_does_not_come_back(self) -> None:
        run = Run(vcpus=1)
        run.join(MMU, m.Role.MMU)
        run.join(0, m.Role.VCPU)
        run.receive(0, m.Report({}, info={"error": "not let in"}))
        again(run, 0, NEW, m.Role.VCPU)
        assert run.refusals(NEW) == [ErrorCode.GIVEN_UP]

    @pytest.mark.parametrize("role", [m.Role.VCPU, m.Role.HOST])
    def test_who_comes_back_when_its_kind_is_drained_is_drained(self, role: m.Role) -> None:
        run = Run(vcpus=1, hosts=1)
        run.start(1, hosts=1)
        run.finish_vcpus(1)
        old: Hashable = "host0"
        if role is m.Role.VCPU:
            run.receive("host0", m.Report({}))
            old = 0
        again(run, old, NEW, role)
        assert run.sent(NEW, m.Drain) == [m.Drain()]
        run.receive(NEW, m.Ready(vcpu=0 if role is m.Role.VCPU else None))
        assert run.sent(NEW, m.Start) == []
        run.receive(NEW, m.Report({}))
        assert run.order(m.Drain)[-1] == (MMU if role is m.Role.VCPU else 0)

    def test_an_mmu_service_learns_the_start_before_the_drain(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.receive(0, m.Report({}))
        again(run, MMU, NEW, m.Role.MMU)
        assert run.sent(NEW, m.Drain) == []
        run.receive(NEW, m.Ready())
        told = [type(body) for body in run.sent(NEW, object)]
        assert told == [m.Joined, m.Start, m.Drain]

    def test_whoever_missed_the_end_is_told_the_verdict(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.finish_vcpus(1)
        run.report_all(1)
        again(run, 0, NEW, m.Role.VCPU)
        assert run.sent(NEW, m.Finished)[0].verdict is m.Verdict.PASS


class TestReplacements:
    def test_a_new_process_takes_the_place_of_an_absent_vcpu(self) -> None:
        run = Run(vcpus=2)
        run.gather(1)
        run.join(1, m.Role.VCPU)
        run.receive(1, m.Ready(vcpu=1, token=b"of-vcpu-1"))
        run.receive(MMU, m.Progress({}))
        run.receive(1, m.Progress({"vcpu.instructions": 8}))
        run.wait(5.0, MMU, 0)
        run.receive(NEW, m.Join(m.Role.VCPU, "spare"))
        welcome = joined(run, NEW)
        assert (welcome.member, welcome.vcpu, welcome.vcpu_token) == (3, 1, b"of-vcpu-1")
        assert welcome.token != joined(run, 1).token
        run.receive(NEW, m.Ready(vcpu=1, token=b"another"))
        assert run.sent(NEW, m.Start) == [m.Start(2)]
        (recovery,) = run.state.recoveries
        assert (recovery.name, recovery.replaced_by) == ("name-1", "spare")
        assert run.state.instructions == 8
        again(run, 1, "late", m.Role.VCPU)
        assert run.refusals("late") == [ErrorCode.NOT_RESUMABLE]

    def test_the_mmu_service_has_the_last_word_on_tokens(self) -> None:
        """A worker that was given up joins again with its old token, attaches anew, and dies before it says the new one."""
        run = Run(vcpus=2)
        run.gather(1)
        run.join(1, m.Role.VCPU)
        run.receive(1, m.Ready(vcpu=1, token=b"first"))
        run.receive(MMU, m.Progress({}, tokens=[(0, b"of another"), (1, b"second")]))
        again(run, 1, "same", m.Role.VCPU)
        run.receive("same", m.Ready(vcpu=1, token=b"first"))
        run.wait(5.0, MMU, 0)
        run.receive(NEW, m.Join(m.Role.VCPU, "spare"))
        assert (joined(run, NEW).vcpu, joined(run, NEW).vcpu_token) == (1, b"second")

    def test_what_a_lost_worker_had_finished_is_to_be_finished_again(self) -> None:
        """What it had executed and not sent has not happened: the run is not over before another one is there and done."""
        run = Run(vcpus=2)
        run.start(2)
        run.receive(1, m.Progress({"vcpu.instructions": 9}, done=True))
        run.wait(5.0, MMU, 0)
        run.receive(0, m.Progress({"vcpu.instructions": 9}, done=True))
        assert run.phase() is Phase.RUNNING
        run.receive(NEW, m.Join(m.Role.VCPU, "spare"))
        run.receive(NEW, m.Ready(vcpu=1))
        run.receive(NEW, m.Progress({"vcpu.instructions": 8}))
        assert run.phase() is Phase.RUNNING
        run.receive(NEW, m.Progress({"vcpu.instructions": 9}, done=True))
        assert run.sent(NEW, m.Drain) == run.sent(0, m.Drain) == [m.Drain()]

    def test_so_it_is_while_the_run_is_drained(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        for vcpu in (0, 1):
            run.receive(vcpu, m.Progress({"vcpu.instructions": 9}, done=True))
        run.receive(0, m.Report({}))
        run.wait(5.0, MMU)
        run.receive(NEW, m.Join(m.Role.VCPU, "spare"))
        run.receive(NEW, m.Ready(vcpu=1))
        assert run.sent(NEW, m.Start) == [m.Start(2)]
        assert run.sent(NEW, m.Drain) == []
        run.receive(NEW, m.Progress({"vcpu.instructions": 9}, done=True))
        assert run.sent(NEW, m.Drain) == [m.Drain()]

    def test_a_new_process_waits_until_the_death_of_the_old_one_is_noticed(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(NEW, m.Join(m.Role.VCPU, "spare"))
        run.wait(4.0, MMU, 0)
        assert run.sent(NEW, m.Joined) == []
        run.wait(1.5, MMU, 0)
        assert joined(run, NEW).vcpu == 1

    def test_one_that_was_started_again_under_its_name_waits_less(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(NEW, m.Join(m.Role.VCPU, "name-1"))
        run.wait(2.0, MMU, 0)
        assert joined(run, NEW).vcpu == 1

    def test_a_name_alone_takes_no_place_of_somebody_who_is_well(self) -> None:
        run = Run(vcpus=2)
        run.start(2)
        run.receive(NEW, m.Join(m.Role.VCPU, "name-1"))
        run.wait(6.5, MMU, 0, 1)
        assert run.refusals(NEW) == [ErrorCode.RUN_FULL]
        assert run.state.recoveries == []

    def test_a_process_that_is_known_to_have_ended_is_replaced_at_once(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.outputs += run.state.ended("name-0", "killed", run.now)
        run.receive(NEW, m.Join(m.Role.VCPU, "name-0"))
        assert joined(run, NEW).vcpu == 0

    def test_the_counters_of_host_agents_are_added(self) -> None:
        run = Run(vcpus=1, hosts=1)
        run.start(1, hosts=1)
        run.receive("host0", m.Progress({"host.unmap": 3, "host.age": 1}))
        run.wait(5.0, MMU, 0)
        run.receive(NEW, m.Join(m.Role.HOST, "name-host0"))
        run.receive(NEW, m.Ready())
        run.receive(NEW, m.Progress({"host.unmap": 2}))
        host = next(member for member in run.state.members if member.role is m.Role.HOST)
        assert host.counters == {"host.unmap": 5, "host.age": 1}

    def test_a_vcpus_counters_go_on(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(0, m.Progress({"vcpu.instructions": 30}))
        run.outputs += run.state.ended("name-0", "killed", run.now)
        run.receive(NEW, m.Join(m.Role.VCPU, "name-0"))
        run.receive(NEW, m.Ready(vcpu=0))
        run.receive(NEW, m.Progress({"vcpu.instructions": 0}))
        assert run.state.instructions == 30
        run.receive(NEW, m.Progress({"vcpu.instructions": 45}))
        assert run.state.instructions == 45

    def test_an_mmu_service_is_replaced_and_told_where_the_stream_goes_on(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        run.receive(MMU, m.EventBatch(0, 3, b""))
        run.wait(5.0, 0)
        run.receive(NEW, m.Join(m.Role.MMU, "name-mmu", "tcp://mmu:2"))
        assert joined(run, NEW).next_event == 3
        run.receive(NEW, m.Ready())
        assert run.sent(NEW, m.Start) == [m.Start(1)]


class TestTheStream:
    def test_credit_for_what_came_before_is_given_to_nobody(self) -> None:
        run = Run(vcpus=1, window=2)
        run.start(1)
        run.receive(MMU, m.EventBatch(0, 1, b"\x01"))
        run.receive(MMU, m.EventBatch(1, 1, b"\x01"))
        again(run, MMU, NEW, m.Role.MMU)
        run.receive(NEW, m.Ready())
        run.receive(NEW, m.EventBatch(2, 1, b"\x01"))
        run.receive(NEW, m.EventBatch(3, 1, b"\x01"))
        assert run.state.problems == []
        run.taken_in(2)
        assert run.sent(NEW, m.EventCredit) == []
        run.taken_in(2)
        assert run.sent(NEW, m.EventCredit) == [m.EventCredit(2)]

    def test_what_comes_twice_is_taken_in_once(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        events = [InputConsumed(number) for number in range(5)]
        run.receive(MMU, m.EventBatch(0, 3, encode_events(events[:3])))
        again(run, MMU, NEW, m.Role.MMU)
        run.receive(NEW, m.Ready())
        run.receive(NEW, m.EventBatch(0, 2, encode_events(events[:2])))
        assert run.sent(NEW, m.EventCredit) == [m.EventCredit(1)]
        run.receive(NEW, m.EventBatch(2, 3, encode_events(events[2:])))
        assert run.state.events == 5
        other = Run(vcpus=1)
        other.start(1)
        other.receive(MMU, m.EventBatch(0, 5, encode_events(events)))
        assert run.state.stream.digest == other.state.stream.digest


class TestAnotherCoordinator:
    def restarted(self, run: Run) -> Run:
        """The run, gone on with by another process an hour later by its clock."""
        saved = save_run(run.state, "then", run.now)
        other = Run(vcpus=run.state.settings.vcpus, hosts=run.state.settings.hosts)
        other.now = run.now + 3600.0
        other.state = RunState(run.state.settings, other.now, lambda: b"another-token")
        restore_run(other.state, saved, other.now)
        return other

    def test_everybody_joins_again_and_the_run_goes_on(self) -> None:
        run = Run(vcpus=1, hosts=1)
        run.start(1, hosts=1)
        run.receive(0, m.Progress({"vcpu.instructions": 7}))
        run.now += 2.0
        other = self.restarted(run)
        assert other.phase() is Phase.RUNNING
        assert other.state.instructions == 7
        other.wait(10.0)
        for old, role in ((MMU, m.Role.MMU), ("host0", m.Role.HOST), (0, m.Role.VCPU)):
            welcome = joined(run, old)
            name = f"name-{old}"
            other.receive(old, m.Join(role, name, "tcp://mmu:1", welcome.member, welcome.token))
            assert joined(other, old).run == welcome.run
            other.receive(old, m.Ready(vcpu=0 if old == 0 else None))
            assert other.sent(old, m.Start) == [m.Start(1)]
        other.finish_vcpus(1)
        other.report_all(1, hosts=1)
        other.assert_finished(m.Verdict.PASS)
        assert other.state.started_at is not None and other.state.finished_at is not None
        assert other.state.finished_at - other.state.started_at == 12.0
        assert {one.back_at is not None for one in other.state.recoveries} == {True}

    def test_new_processes_may_take_all_places(self) -> None:
        run = Run(vcpus=1)
        run.start(1)
        other = self.restarted(run)
        other.receive(NEW, m.Join(m.Role.VCPU, "fresh"))
        other.receive("mmu2", m.Join(m.Role.MMU, "mmu2", "tcp://mmu:2"))
        assert joined(other, NEW).vcpu == 0
        assert joined(other, "mmu2").member == 1

    def test_who_had_reported_is_not_waited_for(self) -> None:
        run = Run(vcpus=1, hosts=1)
        run.start(1, hosts=1)
        run.finish_vcpus(1)
        run.receive(f"{HOST}0", m.Report({}))
        run.receive(0, m.Report({}))
        other = self.restarted(run)
        assert [member.role for member in other.state.roster.absent() if not member.report] == [m.Role.MMU]
        welcome = joined(run, MMU)
        other.receive(MMU, m.Join(m.Role.MMU, "mmu", "tcp://mmu:1", welcome.member, welcome.token))
        other.receive(MMU, m.Ready())
        assert other.sent(MMU, m.Drain) == [m.Drain()]
        other.receive(MMU, m.Report({"events": 0}))
        other.assert_finished(m.Verdict.PASS)
