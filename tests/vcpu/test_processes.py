"""Workers as real processes: stopped, killed, woken up."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import pytest

from shadowmmu.protocol import MISSED_LIMIT
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.states import State
from tests.vcpu.fakes import VCPU_SCRIPT, Child, FakeCoordinator, FakeMmu

pytestmark = pytest.mark.processes

ENDLESS = m.RunConfig(ops=1 << 40)


@pytest.fixture
async def mmu() -> AsyncIterator[FakeMmu]:
    async with FakeMmu() as mmu:
        yield mmu


@pytest.fixture
async def coordinator(mmu: FakeMmu) -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator(ENDLESS, mmu.address) as coordinator:
        yield coordinator


async def started(coordinator: FakeCoordinator, mmu: FakeMmu) -> None:
    await coordinator.ready()
    coordinator.start()
    await mmu.until(lambda: mmu.vcpu().count(m.Log) > 3)


async def stop(child: Child, mmu: FakeMmu) -> None:
    """Stops a worker for longer than anybody may be silent."""
    child.signal(signal.SIGSTOP)
    await mmu.until(lambda: child.stopped)
    beats = mmu.beats
    await mmu.until(lambda: mmu.beats >= beats + MISSED_LIMIT + 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_leaves_guest_mode_and_detaches(
    mmu: FakeMmu, coordinator: FakeCoordinator, number: signal.Signals
) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address) as child:
        await started(coordinator, mmu)
        child.signal(number)
        status, output = await child.ended()
    assert status == 128 + number, output
    await mmu.until(lambda: mmu.vcpu().session.state is State.ENDED)
    (report,) = await coordinator.reports()
    assert number.name in report.info["error"]
    assert mmu.refused == [] and coordinator.refused == []


async def test_a_signal_is_bounded_when_the_service_does_not_answer(
    mmu: FakeMmu, coordinator: FakeCoordinator
) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address, stop_seconds=0.5) as child:
        await started(coordinator, mmu)
        mmu.holding |= {m.Exit, m.Detach}
        child.signal(signal.SIGTERM)
        status, output = await child.ended()
    assert status == 128 + signal.SIGTERM, output


async def test_a_stopped_worker_that_wakes_up_does_not_go_on(
    mmu: FakeMmu, coordinator: FakeCoordinator
) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address) as child:
        await started(coordinator, mmu)
        await stop(child, mmu)
        vcpu = mmu.vcpu()
        mmu.end(vcpu, "given-up", "stopped")
        heard = len(vcpu.heard)
        child.signal(signal.SIGCONT)
        (report,) = await coordinator.reports()
        assert "given-up" in report.info["error"]
        assert len(vcpu.heard) == heard  # what it sent in the meantime was of an incarnation that had ended
        assert all("STALE_INCARNATION" in text or "has ended" in text for text in mmu.refused)
        coordinator.finish(m.Verdict.UNKNOWN)
        status, output = await child.ended()
    assert status == 2, output
    assert "given-up" in output


async def test_a_stopped_worker_that_nobody_gave_up_goes_on(
    mmu: FakeMmu, coordinator: FakeCoordinator
) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address) as child:
        await started(coordinator, mmu)
        await stop(child, mmu)
        logs = mmu.vcpu().count(m.Log)
        child.signal(signal.SIGCONT)
        await mmu.until(lambda: mmu.vcpu().count(m.Log) > logs + 10)
        assert child.process.returncode is None
        coordinator.drain()
        (report,) = await coordinator.reports()
        coordinator.finish()
        status, output = await child.ended()
    assert status == 0, output
    assert report.info == {}


async def test_a_worker_that_both_services_gave_up_ends(mmu: FakeMmu, coordinator: FakeCoordinator) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address) as child:
        await started(coordinator, mmu)
        child.signal(signal.SIGSTOP)
        mmu.end(mmu.vcpu(), "given-up")
        coordinator.send(coordinator.member, m.Ended("given-up"))
        child.signal(signal.SIGCONT)
        status, output = await child.ended()
    assert status == 2, output
    assert "given-up" in output


async def test_a_killed_worker_is_just_silent(mmu: FakeMmu, coordinator: FakeCoordinator) -> None:
    async with Child(VCPU_SCRIPT, coordinator.address) as child:
        await started(coordinator, mmu)
        child.signal(signal.SIGKILL)
        status, _ = await child.ended()
    assert status == -signal.SIGKILL
    assert mmu.vcpu().session.state is not State.ENDED
    assert mmu.refused == []
