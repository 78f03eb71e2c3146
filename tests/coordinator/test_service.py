"""The coordinator on real sockets, with fake members."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hdrh.histogram import HdrHistogram

from shadowmmu.coordinator import Coordinator, RunReport, RunSettings, RunState, decode_report
from shadowmmu.coordinator.event_store import EventStore
from shadowmmu.coordinator.run_store import RunStore
from shadowmmu.coordinator.run_types import Phase
from shadowmmu.coordinator.saved_run import save_run
from shadowmmu.protocol import TO_COORDINATOR
from shadowmmu.protocol import events as ev
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.stream_digest import StreamDigest
from tests.coordinator.conftest import FakeMember, MakeMember

LOOPBACK = "tcp://127.0.0.1:*"
STORE = int(ev.AccessFlag.WRITE)


class Cluster:
    """A coordinator at work, and the fake members of its run."""

    def __init__(self, coordinator: Coordinator, run: "asyncio.Task[object]", make: MakeMember) -> None:
        self.coordinator = coordinator
        self.address = coordinator.address
        self._run = run
        self._make = make
        self.mmu: FakeMember
        self.vcpus: list[FakeMember] = []
        self.hosts: list[FakeMember] = []
        self._sent = 0
        self._digest = StreamDigest()

    def member(self) -> FakeMember:
        return self._make(self.address)

    async def report(self) -> RunReport:
        async with asyncio.timeout(30):
            report = await self._run
        assert isinstance(report, RunReport)
        return report

    async def gather(self, vcpus: int, hosts: int = 0) -> None:
        self.mmu = self.member()
        await self.mmu.join(m.Role.MMU, "mmu", "tcp://mmu:1")
        self.mmu.send(m.Ready())
        for _ in range(hosts):
            host = self.member()
            await host.join(m.Role.HOST, "host")
            host.send(m.Ready())
            self.hosts.append(host)
        for number in range(vcpus):
            vcpu = self.member()
            await vcpu.join(m.Role.VCPU, f"worker{number}")
            vcpu.send(m.Ready(vcpu=number))
            self.vcpus.append(vcpu)

    async def start(self, vcpus: int, hosts: int = 0) -> None:
        await self.gather(vcpus, hosts)
        await self.mmu.get(m.Start)
        self.mmu.send(m.Progress({}))
        for worker in [*self.vcpus, *self.hosts]:
            await worker.get(m.Start)

    def emit(self, *events: ev.Event) -> None:
        data = ev.encode_events(events)
        self._digest.update(data)
        self.mmu.send(m.EventBatch(self._sent, len(events), data))
        self._sent += len(events)

    async def end(self) -> None:
        """Everybody is done and reports when asked to."""
        for vcpu in self.vcpus:
            vcpu.send(m.Progress({"vcpu.instructions": 100}, done=True))
        await self.drain()

    async def drain(self) -> None:
        for worker in [*self.hosts, *self.vcpus]:
            await worker.get(m.Drain)
            worker.send(m.Report({"vcpu.instructions": 100} if worker in self.vcpus else {"host.unmap": 1}))
        await self.mmu.get(m.Drain)
        self.mmu.send(
            m.Report(
                {"events": self._sent, "records": 12, "kvm.pf_fixed": 3},
                info={"events_digest": self._digest.hexdigest(), "journal_digest": "def"},
            )
        )


MakeCluster = Callable[..., Cluster]


@pytest.fixture
async def cluster(
    member: MakeMember, in_background: Callable[[Awaitable[object]], "asyncio.Task[object]"]
) -> AsyncIterator[MakeCluster]:
    coordinators: list[Coordinator] = []

    def make(**settings: Any) -> Cluster:
        settings.setdefault("heartbeat", 0.1)
        config = settings.pop("config", m.RunConfig())
        coordinator = Coordinator(RunSettings(config=config, **settings))
        coordinators.append(coordinator)
        coordinator.bind(LOOPBACK)
        return Cluster(coordinator, in_background(coordinator.run()), member)

    yield make
    for coordinator in coordinators:
        await coordinator.__aexit__(None, None, None)


async def test_a_whole_run(cluster: MakeCluster) -> None:
    run = cluster(vcpus=2, hosts=1)
    await run.start(2, hosts=1)
    run.emit(ev.InputConsumed(1), ev.LockTaken(1), ev.LockReleased(1))
    assert (await run.mmu.get(m.EventCredit)).batches == 1
    await run.end()
    report = await run.report()
    assert report.verdict is m.Verdict.PASS
    assert report.exit_status == 0
    assert report.vcpus == 2
    assert report.start_rule == "expected"
    assert report.stream.events == 3
    assert len(report.stream.events_digest) == 32
    assert report.counters["vcpu.instructions"] == 200
    assert report.counters["host.unmap"] == 1
    assert [one.role for one in report.members] == [m.Role.MMU, m.Role.HOST, m.Role.VCPU, m.Role.VCPU]
    for worker in [run.mmu, *run.vcpus, *run.hosts]:
        assert (await worker.get(m.Finished)).verdict is m.Verdict.PASS


async def test_the_number_of_vcpus_may_be_what_comes(cluster: MakeCluster) -> None:
    run = cluster(stable_seconds=0.3)
    await run.start(2)
    await run.end()
    report = await run.report()
    assert (report.vcpus, report.start_rule) == (2, "stable")


async def test_a_violation_ends_the_run(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    run.emit(
        ev.InputConsumed(5),
        ev.ShadowPageCreated(1, 7, 1, False, 0),
        ev.LockReleased(1),
        ev.Accesses(0, 1, [(STORE, 0x1000, 7, 107, 8, 1)]),
        ev.InputConsumed(6),
    )
    await run.drain()
    report = await run.report()
    assert report.verdict is m.Verdict.VIOLATED
    assert report.exit_status == 1
    assert report.violation is not None
    assert (report.violation.rule, report.violation.journal_record) == (4, 5)
    assert [one.type for one in report.violation.related] == ["ShadowPageCreated", "LockReleased"]
    assert "write-protection breach" in (await run.vcpus[0].get(m.Finished)).text


async def test_many_batches_get_their_credits_back(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    total = 100
    for number in range(total):
        run.emit(*(ev.InputConsumed(number) for _ in range(500)))
        await run.mmu.get(m.EventCredit)
        while run.mmu.session.batches >= 16:
            run.mmu.received.clear()
            await run.mmu.get(m.EventCredit)
    await run.end()
    report = await run.report()
    assert report.verdict is m.Verdict.PASS
    assert report.stream.events == total * 500


async def test_events_that_cannot_be_read(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    run.mmu.send(m.EventBatch(0, 2, b"\x93\x00"))
    await run.drain()
    report = await run.report()
    assert report.verdict is m.Verdict.UNKNOWN
    assert report.exit_status == 2
    assert "not readable" in report.text


async def test_too_few_workers(cluster: MakeCluster) -> None:
    run = cluster(vcpus=2, wait_seconds=0.5)
    await run.gather(1)
    report = await run.report()
    assert report.verdict is m.Verdict.UNKNOWN
    assert "1 vCPU workers were ready after 0.5 s (1 had joined); 2 were wanted" in report.text
    assert (await run.vcpus[0].get(m.Finished)).verdict is m.Verdict.UNKNOWN


async def test_a_worker_that_dies_is_noticed_and_named(cluster: MakeCluster) -> None:
    run = cluster(vcpus=2, absent_seconds=0.0)
    await run.start(2)
    dead = run.vcpus.pop()
    await dead.endpoint.close()
    await run.drain()
    report = await run.report()
    assert report.verdict is m.Verdict.UNKNOWN
    (lost,) = report.lost
    assert (lost.role, lost.vcpu, lost.name) == (m.Role.VCPU, 1, "worker1")
    assert lost.seconds is not None


async def test_a_worker_that_is_stopped_and_wakes_up(cluster: MakeCluster) -> None:
    run = cluster(vcpus=2, absent_seconds=0.0)
    await run.start(2)
    asleep = run.vcpus.pop()
    asleep.endpoint.pause()
    await run.drain()
    report = await run.report()
    assert "nothing was heard of it" in report.lost[0].reason
    asleep.endpoint.resume()
    assert (await asleep.get(m.Ended)).code == ErrorCode.GIVEN_UP.value


async def test_a_latecomer_is_refused_and_the_run_goes_on(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    late = run.member()
    late.send(m.Join(m.Role.VCPU, "late"))
    assert (await late.get(m.ErrorReply)).code == ErrorCode.RUN_FULL.value
    await run.end()
    assert (await run.report()).verdict is m.Verdict.PASS


async def test_rubbish_is_refused_and_changes_nothing(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    stranger = run.member()
    stranger.session.send(m.Join(m.Role.VCPU, "liar"))  # as if it had been sent
    stranger.send_raw([b"SMMU/1.0", b"\xc1"])
    assert (await stranger.get(m.ErrorReply)).code == ErrorCode.MALFORMED.value
    await run.end()
    assert (await run.report()).verdict is m.Verdict.PASS


async def test_a_gap_in_the_events_ends_the_session_of_the_mmu_service(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1, grace_seconds=1.0, absent_seconds=0.0)
    await run.start(1)
    run.emit(ev.InputConsumed(1))
    run.mmu.session.next_event = 5
    run._sent = 5
    run.emit(ev.InputConsumed(2))
    await run.vcpus[0].get(m.Drain)
    run.vcpus[0].send(m.Report({}))
    report = await run.report()
    assert report.verdict is m.Verdict.UNKNOWN
    assert "sequence-gap" in report.text


async def test_a_failure_outside_ends_the_run_in_order(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.start(1)
    run.coordinator.fail("interrupted")
    await run.drain()
    report = await run.report()
    assert report.verdict is m.Verdict.UNKNOWN
    assert report.text == "interrupted"


async def test_a_probe_is_answered(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    await run.member().join(m.Role.PROBE)
    await run.start(1)
    await run.member().join(m.Role.PROBE)
    await run.end()
    assert (await run.report()).verdict is m.Verdict.PASS


async def test_histograms_are_merged(cluster: MakeCluster) -> None:
    run = cluster(vcpus=2)
    await run.start(2)
    for vcpu in run.vcpus:
        vcpu.send(m.Progress({}, done=True))
    for number, vcpu in enumerate(run.vcpus):
        histogram = HdrHistogram(1, 60_000_000, 3)
        histogram.record_value(100 * (number + 1), 10)
        await vcpu.get(m.Drain)
        encoded = histogram.encode().decode()
        vcpu.send(m.Report({}, {"exit_latency_us": encoded, "bad_us": "rubbish"}))
    await run.mmu.get(m.Drain)
    run.mmu.send(m.Report({"events": 0}))
    report = await run.report()
    merged = report.histograms["exit_latency_us"]
    assert (merged.count, merged.min, merged.max) == (20, 100, 200)
    assert "bad_us" not in report.histograms
    assert any("bad_us" in note for note in report.notes)


async def test_a_join_that_comes_twice_is_answered_once(cluster: MakeCluster) -> None:
    run = cluster(vcpus=1)
    vcpu = run.member()
    frames = TO_COORDINATOR.encode(vcpu.session.send(m.Join(m.Role.VCPU, "worker")))
    vcpu.send_raw(frames)
    vcpu.send_raw(frames)
    mmu = run.member()
    await mmu.join(m.Role.MMU, "mmu", "tcp://mmu:1")
    await vcpu.get(m.Joined)
    await vcpu.get(m.Heartbeat)
    # The second may come when the first is answered already: it is refused then, and that changes nothing.
    told = [body for body in vcpu.received if not isinstance(body, m.Heartbeat)]
    assert [type(body) for body in told if not isinstance(body, m.ErrorReply)] == [m.Joined]
    assert {body.code for body in told if isinstance(body, m.ErrorReply)} <= {"already-attached"}


async def test_a_coordinator_that_is_started_again_goes_on(tmp_path: Path, member: MakeMember) -> None:
    settings = RunSettings(config=m.RunConfig(), vcpus=1, heartbeat=0.1)
    events: list[ev.Event] = [ev.InputConsumed(1), ev.LockTaken(1), ev.LockReleased(1)]
    data = ev.encode_events(events)
    digest = StreamDigest()
    digest.update(data)
    async with Coordinator(settings, folder=tmp_path) as first:
        conducting = asyncio.create_task(first.run())
        address = first.bind(LOOPBACK)
        mmu, vcpu = member(address), member(address)
        of_mmu = await mmu.join(m.Role.MMU, "mmu", "tcp://mmu:1")
        mmu.send(m.Ready())
        of_vcpu = await vcpu.join(m.Role.VCPU, "worker")
        vcpu.send(m.Ready(vcpu=0, token=b"of-the-vcpu"))
        await mmu.get(m.Start)
        mmu.send(m.Progress({}))
        await vcpu.get(m.Start)
        mmu.send(m.EventBatch(0, 2, ev.encode_events(events[:2])))
        await mmu.get(m.EventCredit)
        conducting.cancel()
        await asyncio.gather(conducting, return_exceptions=True)
    async with Coordinator(settings, folder=tmp_path) as second:
        conducting = asyncio.create_task(second.run())
        address = second.bind(LOOPBACK)
        mmu, vcpu = member(address), member(address)
        mmu.send(m.Join(m.Role.MMU, "mmu", "tcp://mmu:1", of_mmu.member, of_mmu.token))
        vcpu.send(m.Join(m.Role.VCPU, "worker", "", of_vcpu.member, of_vcpu.token))
        welcome = await mmu.get(m.Joined)
        assert (welcome.next_event, welcome.run) == (2, of_mmu.run)
        mmu.send(m.Ready())
        await mmu.get(m.Start)
        assert (await vcpu.get(m.Joined)).token == of_vcpu.token
        vcpu.send(m.Ready(vcpu=0))
        await vcpu.get(m.Start)
        mmu.send(m.EventBatch(2, 1, ev.encode_events(events[2:])))
        vcpu.send(m.Progress({"vcpu.instructions": 5}, done=True))
        await vcpu.get(m.Drain)
        vcpu.send(m.Report({"vcpu.instructions": 5}))
        await mmu.get(m.Drain)
        mmu.send(m.Report({"events": 3}, info={"events_digest": digest.hexdigest()}))
        report = await asyncio.wait_for(conducting, 30)
    assert report.verdict is m.Verdict.PASS, report.text
    assert report.stream.events == 3
    assert decode_report((tmp_path / "report.json").read_bytes()) == report
    stored = RunStore(tmp_path).load()
    assert stored is not None
    assert stored.phase is Phase.FINISHED


async def test_a_violation_in_the_stored_events_is_found_again(tmp_path: Path) -> None:
    settings = RunSettings(
        config=m.RunConfig(), vcpus=1, heartbeat=0.1, grace_seconds=0.5, absent_seconds=1.0
    )
    state = RunState(settings, 0.0, lambda: b"token")
    state.phase = Phase.RUNNING
    state.started_at = 0.0
    RunStore(tmp_path).save(save_run(state, "2026-01-01T00:00:00+00:00", 1.0))
    events: list[ev.Event] = [
        ev.InputConsumed(5),
        ev.ShadowPageCreated(1, 7, 1, False, 0),
        ev.LockReleased(1),
        ev.Accesses(0, 1, [(STORE, 0x1000, 7, 107, 8, 1)]),
    ]
    with EventStore(tmp_path, fresh=True) as store:
        store.append(m.EventBatch(0, len(events), ev.encode_events(events)))
    async with Coordinator(settings, folder=tmp_path) as coordinator:
        coordinator.bind(LOOPBACK)
        report = await asyncio.wait_for(coordinator.run(), 30)
    assert report.verdict is m.Verdict.VIOLATED
