"""The host agent against a fake coordinator and a fake MMU service, over real sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hdrh.histogram import HdrHistogram

from shadowmmu.hostagent import AgentOptions, run_agent
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.states import State
from tests.vcpu.fakes import LIMIT, Child, FakeCoordinator, FakeMmu

SCRIPT = Path(__file__).with_name("host_process.py")


class Run:
    def __init__(self, mmu: FakeMmu, coordinator: FakeCoordinator) -> None:
        self.mmu = mmu
        self.coordinator = coordinator
        self.agent: asyncio.Task[int]

    async def running(self, **options: float) -> None:
        self.agent = asyncio.create_task(
            run_agent(AgentOptions(coordinator=self.coordinator.address, name="host-1", **options))  # type: ignore[arg-type]
        )
        await self.coordinator.ready()
        assert self.coordinator.member.all(m.Ready) == [m.Ready(None)]
        self.coordinator.start(4)

    async def status(self) -> int:
        return await asyncio.wait_for(self.agent, LIMIT)


@pytest.fixture
async def run(request: pytest.FixtureRequest) -> AsyncIterator[Run]:
    config = m.RunConfig(**(request.param if hasattr(request, "param") else {}))
    async with FakeMmu() as mmu, FakeCoordinator(config, mmu.address) as coordinator:
        run = Run(mmu, coordinator)
        yield run
        run.agent.cancel()
        await asyncio.gather(run.agent, return_exceptions=True)
        assert coordinator.refused == mmu.refused == []


async def test_a_run_from_join_to_finish(run: Run) -> None:
    await run.running()
    await run.mmu.until(lambda: len(run.mmu.host.paced) == 2)
    for _ in range(20):
        run.mmu.start_paced(run.mmu.host, 1)
        await run.mmu.until(lambda: len(run.mmu.host.paced) == 2)
    assert run.mmu.host.count(m.HostRequest) == 22
    run.coordinator.drain()
    (report,) = await run.coordinator.reports()
    last = run.mmu.host.all(m.HostRequest)[-1]
    assert last == m.HostRequest(23, m.TestAge(0), paced=False)
    assert run.mmu.host.session.state is State.ENDED
    run.coordinator.finish()
    assert await run.status() == 0
    assert report.info == {}
    assert sum(report.counters.values()) == 23 and all(name.startswith("host.") for name in report.counters)
    assert HdrHistogram.decode(report.histograms["host_latency_us"]).get_total_count() == 23


@pytest.mark.parametrize("run", [{"host_rate": 0.0}], indirect=True)
async def test_a_host_rate_of_zero(run: Run) -> None:
    await run.running()
    await run.coordinator.until(lambda: run.coordinator.member.count(m.Progress) >= 2)
    run.coordinator.drain()
    await run.coordinator.reports()
    run.coordinator.finish()
    assert await run.status() == 0
    assert run.mmu.host.count(m.HostRequest) == 0 and run.mmu.host.session.state is State.ENDED


async def failed_report(run: Run) -> m.Report:
    (report,) = await run.coordinator.reports()
    run.coordinator.finish(m.Verdict.UNKNOWN)
    assert await run.status() == 2
    return report


async def test_replies_that_do_not_come(run: Run) -> None:
    await run.running(leave_seconds=0.2, stop_seconds=0.2)
    await run.mmu.until(lambda: len(run.mmu.host.paced) == 2)
    run.mmu.holding.add(m.HostRequest)
    run.coordinator.drain()
    report = await failed_report(run)
    assert "could not leave" in report.info["error"]
    await run.mmu.until(lambda: run.mmu.host.session.state is State.ENDED)


async def test_a_request_that_is_refused_is_a_defect(run: Run) -> None:
    await run.running()
    await run.mmu.until(lambda: len(run.mmu.host.paced) == 2)
    run.mmu.send(run.mmu.host, m.ErrorReply("bad-argument", "no such page", 1))
    report = await failed_report(run)
    assert "bad-argument" in report.info["error"]


async def test_a_lost_mmu_service(run: Run) -> None:
    await run.running()
    run.mmu.silent = True
    report = await failed_report(run)
    assert "the MMU service is lost" in report.info["error"]


async def test_a_lost_coordinator(run: Run) -> None:
    await run.running(stop_seconds=5.0)
    run.coordinator.silent = True
    assert await run.status() == 2
    assert run.mmu.host.session.state is State.ENDED


async def test_a_service_that_does_not_attach(run: Run) -> None:
    run.mmu.holding.add(m.Attach)
    run.agent = asyncio.create_task(
        run_agent(AgentOptions(coordinator=run.coordinator.address, attach_seconds=0.2, stop_seconds=0.2))
    )
    report = await failed_report(run)
    assert "did not take us in" in report.info["error"]


@pytest.mark.processes
async def test_a_signal_ends_the_process_in_order() -> None:
    async with FakeMmu() as mmu, FakeCoordinator(m.RunConfig(), mmu.address) as coordinator:
        async with Child(SCRIPT, coordinator.address) as child:
            await coordinator.ready()
            coordinator.start(4)
            await mmu.until(lambda: len(mmu.host.paced) == 2)
            child.signal(signal.SIGTERM)
            status, output = await child.ended()
        assert status == 128 + signal.SIGTERM, output
        assert mmu.host.session.state is State.ENDED
        assert len(mmu.host.all(m.HostRequest)) == 3
