"""The member's side of a run against an honest coordinator on loopback."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from shadowmmu.client import MemberClient, RequestRefused, ServiceLost, SessionEnded
from shadowmmu.protocol import EVENT_CREDITS, ErrorCode, LocalProtocolError, State
from shadowmmu.protocol import messages as m
from tests.client.conftest import Until
from tests.client.fakes import FakeCoordinator

Context = zmq.Context[zmq.Socket[bytes]]


def taken(coordinator: FakeCoordinator, kind: type) -> list[object]:
    return [body for _, body in coordinator.taken if isinstance(body, kind)]


async def test_a_run_from_end_to_end(coordinator: FakeCoordinator, context: Context, until: Until) -> None:
    member = await MemberClient.join(coordinator.address, m.Role.VCPU, name="vcpu-1", context=context)
    async with member:
        assert member.joined.config == coordinator.config
        assert member.session.incarnation == 1
        member.ready(3)
        started = asyncio.create_task(member.started())
        await until(lambda: taken(coordinator, m.Ready))
        coordinator.send(coordinator.peer, m.Start(4))
        assert await started == m.Start(4)
        member.progress({"instructions": 5})
        coordinator.send(coordinator.peer, m.Drain())
        await asyncio.wait_for(member.drain.wait(), 20)
        member.progress({"instructions": 9}, done=True)
        member.report({"instructions": 9}, {"walk": "SGlzdA=="}, {"seed": "7"})
        await until(lambda: taken(coordinator, m.Report))
        coordinator.send(coordinator.peer, m.Finished(m.Verdict.PASS, "all is well"))
        assert await member.finished() == m.Finished(m.Verdict.PASS, "all is well")
        assert not member.lost.is_set()
        with pytest.raises(SessionEnded, match="run-finished"):
            member.progress({})
    assert not member.lost.is_set()
    assert taken(coordinator, m.Progress) == [
        m.Progress({"instructions": 5}),
        m.Progress({"instructions": 9}, done=True),
    ]


async def test_a_run_that_does_not_come_about(
    coordinator: FakeCoordinator, context: Context, until: Until
) -> None:
    async with await MemberClient.join(coordinator.address, m.Role.HOST, context=context) as member:
        coordinator.send(coordinator.peer, m.Drain())
        assert await member.started() is None
        member.ready()  # too late, and harmless
        member.report({})
        await until(lambda: taken(coordinator, m.Report))
        assert not taken(coordinator, m.Ready)


async def test_event_batches_and_their_credit(
    coordinator: FakeCoordinator, context: Context, until: Until
) -> None:
    endpoint = "tcp://127.0.0.1:5701"
    member = await MemberClient.join(coordinator.address, m.Role.MMU, endpoint=endpoint, context=context)
    async with member:
        for i in range(EVENT_CREDITS):
            await member.event_credit()
            member.event_batch(i * 2, 2, b"..")
        assert member.event_credits == 0
        with pytest.raises(LocalProtocolError, match="credit-exceeded"):
            member.event_batch(EVENT_CREDITS * 2, 1, b".")
        credit = asyncio.create_task(member.event_credit())
        await until(lambda: len(taken(coordinator, m.EventBatch)) == EVENT_CREDITS)
        assert not credit.done()
        coordinator.send(coordinator.peer, m.EventCredit(3))
        await credit
        member.vcpu_lost(2, "silent")
        coordinator.send(coordinator.peer, m.EventCredit(EVENT_CREDITS - 3))
        await member.events_taken_in()
        await until(lambda: taken(coordinator, m.VcpuLost))


async def test_only_the_mmu_service_sends_events(coordinator: FakeCoordinator, context: Context) -> None:
    async with await MemberClient.join(coordinator.address, m.Role.VCPU, context=context) as member:
        with pytest.raises(LocalProtocolError, match="EventBatch"):
            member.event_batch(0, 1, b".")


async def test_the_coordinator_falls_silent(coordinator: FakeCoordinator, context: Context) -> None:
    coordinator.heartbeat = 0.05
    async with await MemberClient.join(coordinator.address, m.Role.VCPU, missed=4, context=context) as member:
        coordinator.silent = True
        await asyncio.wait_for(member.lost.wait(), 20)
        assert member.drain.is_set()
        with pytest.raises(ServiceLost):
            await member.finished()
        with pytest.raises(ServiceLost):
            await member.started()


async def test_the_coordinator_ends_the_membership(coordinator: FakeCoordinator, context: Context) -> None:
    async with await MemberClient.join(coordinator.address, m.Role.VCPU, context=context) as member:
        coordinator.send(coordinator.peer, m.Ended(ErrorCode.GIVEN_UP, "silent"))
        with pytest.raises(SessionEnded, match="given-up"):
            await member.finished()
        assert member.lost.is_set()


async def test_a_refused_join(coordinator: FakeCoordinator, context: Context) -> None:
    coordinator.answers[m.Join] = lambda _peer, _envelope: m.ErrorReply(ErrorCode.DRAINING, "the run ends")
    with pytest.raises(RequestRefused, match="draining"):
        await MemberClient.join(coordinator.address, m.Role.VCPU, context=context)
    assert coordinator.sessions[coordinator.peer].state is State.DETACHED


async def test_closing_is_no_loss(coordinator: FakeCoordinator, context: Context) -> None:
    member = await MemberClient.join(coordinator.address, m.Role.VCPU, context=context)
    waiting = asyncio.create_task(member.finished())
    await asyncio.sleep(0)
    await member.close()
    assert not member.lost.is_set()
    with pytest.raises(SessionEnded, match="the client was closed"):
        await waiting
    await member.close()
