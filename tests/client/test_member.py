"""The member's side of a run against an honest coordinator on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import zmq

from shadowmmu.client import MemberClient, RequestRefused, ServiceLost, SessionEnded
from shadowmmu.mmu.event_sender import EventSender
from shadowmmu.protocol import EVENT_CREDITS, Envelope, ErrorCode, LocalProtocolError, Message, State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import InputConsumed, encode_events
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


class Rejoining(FakeCoordinator):
    """A coordinator that knows tokens: it welcomes the same member again."""

    heartbeat = 0.1
    next_event = 0

    def answer(self, peer: bytes, envelope: Envelope) -> Message | None:
        match envelope.body:
            case m.Join():
                return m.Joined(
                    1,
                    self.config,
                    "tcp://127.0.0.1:1",
                    self.heartbeat,
                    token=b"secret",
                    next_event=self.next_event,
                )
            case _:
                return super().answer(peer, envelope)

    def last(self) -> bytes:
        """The connection that joined last."""
        return [peer for peer, body in self.taken if isinstance(body, m.Join)][-1]

    def joins(self) -> list[m.Join]:
        return [body for _, body in self.taken if isinstance(body, m.Join)]


@pytest.fixture
async def again(context: Context) -> AsyncIterator[Rejoining]:
    async with Rejoining(context) as service:
        yield service


async def test_a_member_that_was_given_up_joins_again_as_the_same_one(
    again: Rejoining, context: Context, until: Until
) -> None:
    async with await MemberClient.join(again.address, m.Role.VCPU, name="w", context=context) as member:
        member.ready(3, b"vcpu-token")
        await until(lambda: taken(again, m.Ready))
        again.send(again.last(), m.Start(2))
        assert await member.started() == m.Start(2)
        member.progress({"instructions": 7})
        await until(lambda: taken(again, m.Progress))
        again.send(again.last(), m.Ended(ErrorCode.GIVEN_UP, "silent"))
        await until(lambda: len(taken(again, m.Ready)) == 2)
        assert again.joins()[1] == m.Join(m.Role.VCPU, "w", member=1, token=b"secret")
        assert taken(again, m.Ready)[1] == m.Ready(3, b"vcpu-token")
        again.send(again.last(), m.Start(2))
        await until(lambda: len(taken(again, m.Progress)) == 2)
        assert taken(again, m.Progress)[1] == m.Progress({"instructions": 7})
        assert not member.lost.is_set()
        again.send(again.last(), m.Finished(m.Verdict.PASS))
        assert await member.finished() == m.Finished(m.Verdict.PASS)
    assert not member.lost.is_set()


async def test_silence_and_a_forgotten_session_make_a_member_join_again(
    again: Rejoining, context: Context, until: Until
) -> None:
    async with await MemberClient.join(again.address, m.Role.VCPU, missed=3, context=context) as member:
        again.silent = True
        await until(lambda: len(again.joins()) == 2)
        again.silent = False
        await until(lambda: member.rejoined)
        again.sessions.clear()  # as another process would be that took the coordinator's place
        before = len(again.joins())
        await until(lambda: len(again.joins()) > before)
        await until(lambda: member.rejoined == 2)


async def test_what_is_said_while_there_is_no_connection_is_said_later(
    again: Rejoining, context: Context, until: Until
) -> None:
    endpoint = "tcp://127.0.0.1:5701"
    member = await MemberClient.join(again.address, m.Role.MMU, endpoint=endpoint, missed=3, context=context)
    async with member:
        again.silent = True
        again.send(again.last(), m.Ended(ErrorCode.GIVEN_UP, "silent"))
        await until(lambda: not member.session.attached)
        assert member.event_credits == 0
        member.ready()
        member.vcpu_lost(2, "silent")
        member.report({"events": 5})
        again.silent = False
        await until(lambda: taken(again, m.Report))
        assert again.joins()[-1].endpoint == endpoint
        assert taken(again, m.VcpuLost) == [m.VcpuLost(2, "silent")]
        assert taken(again, m.Report) == [m.Report({"events": 5})]


async def test_event_batches_that_were_not_credited_are_sent_again(
    again: Rejoining, context: Context, until: Until
) -> None:
    member = await MemberClient.join(again.address, m.Role.MMU, endpoint="tcp://127.0.0.1:1", context=context)
    async with member:
        sender = EventSender(member.event_batch, lambda: member.event_credits)
        member.events = sender
        for number in range(4):
            sender.listen(number, [InputConsumed(number)], encode_events([InputConsumed(number)]))
            sender.close_batch()
        await until(lambda: len(taken(again, m.EventBatch)) == 4)
        again.send(again.last(), m.EventCredit(1))
        await until(lambda: member.session.batches == 3)
        again.next_event = 2
        again.send(again.last(), m.Ended(ErrorCode.GIVEN_UP, "silent"))
        await until(lambda: len(taken(again, m.EventBatch)) == 6)
        assert [batch.first for batch in taken(again, m.EventBatch)[4:]] == [2, 3]  # type: ignore[attr-defined]
        assert not sender.finished
        again.send(again.last(), m.EventCredit(2))
        await member.events_taken_in()
        assert sender.finished


async def test_a_refusal_to_join_again_ends_the_membership(again: Rejoining, context: Context) -> None:
    async with await MemberClient.join(again.address, m.Role.VCPU, context=context) as member:
        again.answers[m.Join] = lambda _peer, _envelope: m.ErrorReply(ErrorCode.NOT_RESUMABLE, "replaced")
        again.send(again.last(), m.Ended(ErrorCode.GIVEN_UP, "silent"))
        with pytest.raises(RequestRefused, match="not-resumable"):
            await member.finished()
        assert member.lost.is_set()
