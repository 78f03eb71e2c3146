"""The vCPU worker against a fake coordinator and a fake MMU service, over real sockets in one event loop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import pytest
from hdrh.histogram import HdrHistogram

from shadowmmu.protocol import MISSED_LIMIT
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.states import State
from shadowmmu.vcpu import WorkerOptions, run_worker
from tests.vcpu import simple_program
from tests.vcpu.fakes import LIMIT, FakeCoordinator, FakeMmu, Peer

OPS = 3000


class Run:
    """A run with workers in this event loop."""

    def __init__(self, mmu: FakeMmu, coordinator: FakeCoordinator) -> None:
        self.mmu = mmu
        self.coordinator = coordinator
        self.workers: list[asyncio.Task[int]] = []

    def join(self, **options: float) -> asyncio.Task[int]:
        name = f"worker-{len(self.workers)}"
        worker = asyncio.create_task(
            run_worker(WorkerOptions(coordinator=self.coordinator.address, name=name, **options))  # type: ignore[arg-type]
        )
        self.workers.append(worker)
        return worker

    async def running(self, workers: int = 1, **options: float) -> None:
        """Workers that execute instructions."""
        for _ in range(workers):
            self.join(**options)
        await self.coordinator.ready(workers)
        self.coordinator.start()
        await self.mmu.until(lambda: all(self.mmu.vcpu(number).count(m.Log) for number in range(workers)))

    async def status(self, worker: int = 0) -> int:
        return await asyncio.wait_for(self.workers[worker], LIMIT)

    def told_done(self) -> bool:
        return all(
            any(isinstance(body, m.Progress) and body.done for body in peer.heard)
            for peer in self.coordinator.members
        )


def config(**changes: object) -> m.RunConfig:
    return m.RunConfig(**{"ops": OPS, **changes})  # type: ignore[arg-type]


@pytest.fixture
async def run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> AsyncIterator[Run]:
    monkeypatch.setattr("shadowmmu.vcpu.worker.make_program", lambda *_: simple_program.SimpleProgram())
    changes = request.param if hasattr(request, "param") else {}
    async with FakeMmu() as mmu, FakeCoordinator(config(**changes), mmu.address) as coordinator:
        run = Run(mmu, coordinator)
        yield run
        for worker in run.workers:
            worker.cancel()
        await asyncio.gather(*run.workers, return_exceptions=True)
        assert coordinator.refused == []


endless = pytest.mark.parametrize("run", [{"ops": 1 << 40}], indirect=True)


async def test_a_run_from_join_to_finish(run: Run) -> None:
    run.join()
    await run.coordinator.ready()
    assert run.coordinator.member.all(m.Ready) == [m.Ready(0)]
    run.coordinator.start()
    await run.coordinator.until(run.told_done)
    run.coordinator.drain()
    (report,) = await run.coordinator.reports()
    assert run.mmu.vcpu().session.state is State.ENDED
    assert run.mmu.refused == []
    run.coordinator.finish()
    assert await run.status() == 0
    assert report.counters["vcpu.instructions"] >= OPS
    assert report.counters["vcpu.error_replies"] == 0
    assert report.info == {}
    for name, counted in (("exit_latency_us", m.Exit), ("walk_latency_us", m.Walk)):
        histogram = HdrHistogram.decode(report.histograms[name])
        assert 0 < histogram.get_total_count() <= run.mmu.vcpu().count(counted)


async def test_several_workers_share_the_instructions(run: Run) -> None:
    for _ in range(3):
        run.join()
    await run.coordinator.ready(3)
    run.coordinator.start()
    await run.coordinator.until(run.told_done)
    run.coordinator.drain()
    reports = await run.coordinator.reports()
    run.coordinator.finish()
    assert [await run.status(n) for n in range(3)] == [0, 0, 0]
    assert [report.counters["vcpu.instructions"] // 100 for report in reports] == [10, 10, 10]
    assert {peer.session.vcpu for peer in run.mmu.peers.values()} == {0, 1, 2}


@endless
async def test_progress_is_told_from_time_to_time(run: Run) -> None:
    await run.running()
    await run.coordinator.until(lambda: run.coordinator.member.count(m.Progress) >= 3)
    told = [body for body in run.coordinator.member.heard if isinstance(body, m.Progress)]
    counts = [body.counters["vcpu.instructions"] for body in told]
    assert counts == sorted(counts) and counts[-1] > counts[0]
    assert not any(body.done for body in told)


@endless
async def test_a_busy_worker_answers_kicks_after_its_log(run: Run) -> None:
    await run.running()
    vcpu = run.mmu.vcpu()
    for _ in range(50):
        answers = vcpu.count(m.Exit)
        if run.mmu.kick(vcpu):
            await run.mmu.until(partial(more_exits, vcpu, answers))
    kicked = [body for body in vcpu.heard if body_is_answer(body)]
    assert kicked
    assert run.mmu.refused == []


def more_exits(vcpu: Peer, than: int) -> bool:
    return vcpu.count(m.Exit) > than


def body_is_answer(body: m.Message) -> bool:
    return isinstance(body, m.Exit) and isinstance(body.reason, m.ExternalInterruptExit)


@endless
async def test_a_busy_worker_stays_a_member_by_its_heartbeats(run: Run) -> None:
    await run.running()
    beats = run.coordinator.beats
    await run.coordinator.until(lambda: run.coordinator.beats > beats + MISSED_LIMIT + 2)
    assert not run.workers[0].done()


async def test_a_halted_worker_sends_heartbeats_and_drains(run: Run) -> None:
    run.join()
    await run.coordinator.ready()
    run.coordinator.start()
    await run.mmu.until(lambda: run.mmu.halted)
    vcpu = run.mmu.vcpu()
    before = vcpu.count(m.Heartbeat)
    await run.mmu.until(lambda: vcpu.count(m.Heartbeat) >= before + 3)
    run.coordinator.drain()
    await run.coordinator.reports()
    run.coordinator.finish()
    assert await run.status() == 0


async def test_drain_before_the_start(run: Run) -> None:
    run.join()
    await run.coordinator.ready()
    run.coordinator.drain()
    (report,) = await run.coordinator.reports()
    assert run.mmu.vcpu().session.state is State.ENDED
    run.coordinator.finish(m.Verdict.UNKNOWN)
    assert await run.status() == 0
    assert report.counters.get("vcpu.instructions", 0) == 0


@endless
async def test_the_end_of_the_run_in_the_middle_of_it(run: Run) -> None:
    await run.running()
    run.coordinator.finish(m.Verdict.VIOLATED)
    assert await run.status() == 0
    assert run.mmu.vcpu().session.state is State.ENDED  # it detached


@endless
async def test_a_lost_coordinator_ends_the_worker_in_order(run: Run) -> None:
    await run.running()
    run.coordinator.silent = True
    assert await run.status() == 2
    assert run.mmu.vcpu().count(m.Detach) == 1


async def test_a_coordinator_that_goes_after_the_report_is_no_failure(run: Run) -> None:
    run.join()
    await run.coordinator.ready()
    run.coordinator.start()
    await run.coordinator.until(run.told_done)
    run.coordinator.drain()
    await run.coordinator.reports()
    run.coordinator.silent = True
    assert await run.status() == 0


async def failed_report(run: Run) -> m.Report:
    """The report of a worker that failed, which then stays until the run is finished."""
    (report,) = await run.coordinator.reports()
    assert not run.workers[0].done()
    run.coordinator.finish(m.Verdict.UNKNOWN)
    assert await run.status() == 2
    return report


@endless
async def test_a_lost_mmu_service_ends_the_worker(run: Run) -> None:
    await run.running()
    run.mmu.silent = True
    report = await failed_report(run)
    assert "nothing was heard of the MMU service" in report.info["error"]
    assert report.counters["vcpu.instructions"] > 0


@endless
async def test_an_ended_incarnation_ends_the_worker(run: Run) -> None:
    await run.running()
    run.mmu.end(run.mmu.vcpu(), "given-up", "silent for 5 s")
    report = await failed_report(run)
    assert "given-up" in report.info["error"] and "silent for 5 s" in report.info["error"]


@endless
async def test_an_error_reply_ends_the_worker(run: Run) -> None:
    await run.running()
    vcpu = run.mmu.vcpu()
    refusal = m.Envelope(vcpu.session.incarnation, 0, m.ErrorReply("unknown-frame", "no such frame", 5))
    run.mmu._endpoint.send(vcpu.id, run.mmu.outgoing.encode(refusal))
    report = await failed_report(run)
    assert "unknown-frame" in report.info["error"]
    assert report.counters["vcpu.error_replies"] == 1


@endless
async def test_nonsense_from_the_service_ends_the_worker(run: Run) -> None:
    await run.running()
    run.mmu._endpoint.send(run.mmu.vcpu().id, [b"what", b"is this"])
    report = await failed_report(run)
    assert "may not" in report.info["error"]


@endless
async def test_a_processor_that_fails_still_leaves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_program: object) -> None:
        raise RuntimeError("no such instruction")

    await run.running()
    monkeypatch.setattr(simple_program.SimpleProgram, "fetch", fetch)
    report = await failed_report(run)
    assert "no such instruction" in report.info["error"]
    assert run.mmu.vcpu().session.state is State.ENDED


async def test_a_service_that_does_not_attach(run: Run) -> None:
    run.mmu.holding.add(m.Attach)
    run.join(attach_seconds=0.2, stop_seconds=0.2)
    report = await failed_report(run)
    assert "did not take us in" in report.info["error"]


async def test_a_service_that_does_not_let_us_detach(run: Run) -> None:
    run.mmu.holding.add(m.Detach)
    run.join(leave_seconds=0.2, stop_seconds=0.2)
    await run.coordinator.ready()
    run.coordinator.drain()
    report = await failed_report(run)
    assert "could not leave" in report.info["error"]


async def test_a_coordinator_that_does_not_answer() -> None:
    options = WorkerOptions(coordinator="tcp://127.0.0.1:9", name="alone", join_seconds=0.2)
    assert await asyncio.wait_for(run_worker(options), LIMIT) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_before_the_join(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    worker = asyncio.create_task(run_worker(WorkerOptions(coordinator="tcp://127.0.0.1:9", name="alone")))
    while signal.getsignal(number) is before:  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    assert await asyncio.wait_for(worker, LIMIT) == 128 + number


@endless
async def test_a_signal_in_the_middle_of_the_run(run: Run) -> None:
    await run.running()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await run.status() == 128 + signal.SIGTERM
    assert run.mmu.vcpu().session.state is State.ENDED
    (report,) = await run.coordinator.reports()
    assert report.info["error"] == "stopped by SIGTERM"
